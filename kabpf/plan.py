"""Desired state, actual state, and the difference: pure, without kernel or files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kabpf.matching import UNKNOWN, Automaton, Birth
from kabpf.policy import Options, Policy


class Cgroup(NamedTuple):
    """A directory of the cgroup2 tree. The root has parent_id 0 and path /."""

    id: int
    parent_id: int
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Record(NamedTuple):
    """A policy as the kernel has it. It never changes: other options make another record."""

    name: str
    options: Options


class Resolved(NamedTuple):
    """What a cgroup should have: the automaton's state and a policy of its own or an ancestor's."""

    state: int
    policy: Policy | None


class Entry(NamedTuple):
    """What the kernel has for a cgroup, as kabpf_cgroup in kabpf.h says; 0 is no policy."""

    state: int
    policy_id: int
    was_id: int = 0
    owed: bool = False


class BirthEntry(NamedTuple):
    """What the kernel does with a new cgroup, as kabpf_birth in kabpf.h says."""

    state: int
    policy_id: int  # 0: the parent's
    ask: bool


Step = tuple[int, str]


@dataclass(frozen=True)
class Plan:
    """Desired state."""

    policies: tuple[Policy, ...] = ()
    births: dict[Step, Birth] = field(default_factory=dict)
    cgroups: dict[int, Resolved] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether some new cgroups have to wait for user space, because a selector has a glob
        within a name, or because there are more rules than the kernel has room for."""
        return any(birth.ask or birth.state == UNKNOWN for birth in self.births.values())


@dataclass(frozen=True)
class Actual:
    """What is in the kernel."""

    records: dict[int, Record] = field(default_factory=dict)
    births: dict[Step, BirthEntry] = field(default_factory=dict)
    cgroups: dict[int, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """What to write, in this order: what is new comes before whatever refers to it, and what is
    stale goes when nothing refers to it any more."""

    records: dict[int, Record] = field(default_factory=dict)
    births: dict[Step, BirthEntry] = field(default_factory=dict)
    cgroups: dict[int, Entry] = field(default_factory=dict)
    retrofits: dict[int, Entry] = field(default_factory=dict)  # entries that owe their open sockets
    stale_births: tuple[Step, ...] = ()
    stale_cgroups: tuple[int, ...] = ()
    stale_records: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())


class TooManyError(Exception):
    """More policies than the kernel's table has slots."""


def resolve(
    policies: tuple[Policy, ...],
    automaton: Automaton,
    cgroups: Iterable[Cgroup],
    births_max: int,
) -> Plan:
    """The plan for these cgroups, parents before their children, and for all that may be born."""
    resolved: dict[int, Resolved] = {}
    for cgroup in cgroups:
        resolved[cgroup.id] = resolve_one(automaton, cgroup, resolved.get(cgroup.parent_id))
    return Plan(policies, automaton.table(births_max), resolved)


def resolve_one(automaton: Automaton, cgroup: Cgroup, parent: Resolved | None) -> Resolved:
    """One cgroup from its parent; None for the root's."""
    birth = automaton.step(parent.state, cgroup.name) if parent else automaton.root
    return Resolved(birth.state, birth.policy or (parent.policy if parent else None))


def number(policies: Iterable[Policy], records: dict[int, Record], limit: int) -> dict[Record, int]:
    """An id below `limit` for the record of each policy: the one it has, or a free one.

    Raises TooManyError where there are not enough.
    """
    present = {record: id for id, record in records.items()}
    free = (id for id in range(1, limit) if id not in records)
    wanted = dict.fromkeys(map(record, policies))
    try:
        return {record: present.get(record) or next(free) for record in wanted}
    except StopIteration:
        raise TooManyError from None


def diff(plan: Plan, actual: Actual, numbers: dict[Record, int]) -> Changes:
    """What brings `actual` to `plan`, whose records have these `numbers`.

    Stale births and records are left alone as long as anything else is to be written: a cgroup that
    is born meanwhile may still need them. So apply, read again and diff until nothing is left.
    """
    if owed := {id: entry for id, entry in actual.cgroups.items() if entry.owed}:
        return Changes(retrofits=owed)  # what an interrupted apply left
    records = {id: record for record, id in numbers.items() if id not in actual.records}
    births = {
        step: entry
        for step, birth in plan.births.items()
        for entry in [BirthEntry(birth.state, _id(numbers, birth.policy), birth.ask)]
        if actual.births.get(step) != entry
    }
    cgroups = changed_entries(plan.births, plan.cgroups, actual.cgroups, numbers)
    stale_cgroups = tuple(actual.cgroups.keys() - plan.cgroups.keys())
    if records or births or cgroups:
        retrofits = {id: entry for id, entry in cgroups.items() if entry.owed}
        return Changes(records, births, cgroups, retrofits, stale_cgroups=stale_cgroups)
    used = {id for entry in actual.cgroups.values() for id in (entry.policy_id, entry.was_id)}
    used |= {birth.policy_id for birth in actual.births.values()}
    return Changes(
        stale_cgroups=stale_cgroups,
        stale_births=tuple(actual.births.keys() - plan.births.keys()),
        stale_records=tuple(actual.records.keys() - used - set(numbers.values())),
    )


def changed_entries(
    births: dict[Step, Birth],
    desired: dict[int, Resolved],
    now: dict[int, Entry],
    numbers: dict[Record, int],
) -> dict[int, Entry]:
    """The entries that differ from what is wanted, as they should be. A state that `births` had no
    room for is UNKNOWN, so that user space is asked about births below."""
    return {
        id: entry
        for id, resolved in desired.items()
        for state in [resolved.state if (resolved.state, "") in births else UNKNOWN]
        for entry in [_entry(resolved, state, _id(numbers, resolved.policy), now.get(id))]
        if now.get(id) != entry
    }


def settled(entry: Entry) -> Entry:
    """The entry after its open sockets were visited."""
    return entry._replace(was_id=0, owed=False)


def record(policy: Policy) -> Record:
    """The record that a policy makes."""
    return Record(policy.name, policy.options)


def _id(numbers: dict[Record, int], policy: Policy | None) -> int:
    return numbers[record(policy)] if policy else 0


def _entry(resolved: Resolved, state: int, policy_id: int, now: Entry | None) -> Entry:
    if now and now.policy_id == policy_id:
        return now._replace(state=state)
    owed = resolved.policy is not None and resolved.policy.options.keepalive
    was_id = now.was_id or now.policy_id if now else 0
    return Entry(state, policy_id, was_id, owed)
