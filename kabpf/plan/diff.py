"""Desired state, actual state, and the difference: pure, without kernel or files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kabpf.matching import UNKNOWN, Automaton, Birth
from kabpf.policy import Destination, Direction, Mode, Options, Policy, Range, Rules

FORMER_MAX = 4  # KABPF_FORMER in kabpf.h


class Cgroup(NamedTuple):
    """A directory of the cgroup2 tree. The root has parent_id 0 and path /."""

    id: int
    parent_id: int
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Record:
    """A policy as the kernel has it. It never changes: other options make another record.

    What it says of destinations is told apart by a digest, 0 for none, because the kernel's tables
    are not read back.
    """

    name: str
    options: Options
    mode: Mode = Mode.FILL
    direction: Direction = Direction.BOTH
    loopback: bool = True
    existing: bool = True
    log: bool = False
    digest: int = 0
    destinations: tuple[Destination, ...] = field(default=(), compare=False)

    @property
    def acts(self) -> bool:
        """Whether it sets anything on any socket."""
        return self.options.keepalive or self.digest != 0

    @property
    def is_plain(self) -> bool:
        """Whether every connection of its cgroups gets the same options."""
        return self.loopback and self.direction == Direction.BOTH and not self.digest


class Resolved(NamedTuple):
    """What a cgroup should have: the automaton's state and a policy of its own or an ancestor's."""

    state: int
    policy: Policy | None


class Entry(NamedTuple):
    """What the kernel has for a cgroup, as kabpf_cgroup in kabpf.h says; 0 is no policy."""

    state: int
    policy_id: int
    owed: bool = False
    was: tuple[int, ...] = ()  # the latest first


class BirthEntry(NamedTuple):
    """What the kernel does with a new cgroup, as kabpf_birth in kabpf.h says."""

    state: int
    policy_id: int  # 0: the parent's
    ask: bool
    strength: int


class Needs(NamedTuple):
    """What costs connections or applications time, and is therefore on only for a policy that
    needs it."""

    setsockopt: bool = False  # to see what applications set: enforce, and ranges
    syn_retries: bool = False  # to look at a connection before its SYN


Step = tuple[int, str]


@dataclass(frozen=True)
class Plan:
    """Desired state."""

    policies: tuple[Policy, ...] = ()
    births: dict[Step, Birth] = field(default_factory=dict)
    cgroups: dict[int, Resolved] = field(default_factory=dict)
    births_max: int = 0  # that the kernel has room for
    # Of the data plane without BTF: cgroups that need an attachment of their own, and whether
    # another one is above or below.
    attachments: dict[int, bool] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether some new cgroups have to wait for user space, because a selector has a glob
        within a name, or because there are more rules than the kernel has room for."""
        return any(birth.ask or birth.state == UNKNOWN for birth in self.births.values())

    @property
    def needs(self) -> Needs:
        """What the policies need."""
        options = [
            (policy.rules.mode, each)
            for policy in self.policies
            for each in _every_option(policy.rules)
            if each.keepalive
        ]
        return Needs(
            any(mode == Mode.ENFORCE or _has_range(each) for mode, each in options),
            any(each.syn_retries for _, each in options),
        )


@dataclass(frozen=True)
class Actual:
    """What is in the kernel."""

    records: dict[int, Record] = field(default_factory=dict)
    births: dict[Step, BirthEntry] = field(default_factory=dict)
    cgroups: dict[int, Entry] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    attachments: dict[int, bool | None] = field(default_factory=dict)  # None: one half of it


@dataclass(frozen=True)
class Changes:
    """What to write, in this order: what is new comes before whatever refers to it, and what is
    stale goes when nothing refers to it any more."""

    records: dict[int, Record] = field(default_factory=dict)
    needs: Needs | None = None
    births: dict[Step, BirthEntry] = field(default_factory=dict)
    cgroups: dict[int, Entry] = field(default_factory=dict)
    retrofits: dict[int, Entry] = field(default_factory=dict)  # as they are once it is done
    attachments: dict[int, bool] = field(default_factory=dict)
    stale_attachments: tuple[int, ...] = ()
    stale_births: tuple[Step, ...] = ()
    stale_cgroups: tuple[int, ...] = ()
    stale_records: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.needs is not None or any(vars(self).values())


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
    return Plan(policies, automaton.table(births_max), resolved, births_max)


def with_attachments(plan: Plan, cgroups: Mapping[int, Cgroup]) -> Plan:
    """The same for a data plane that sees no birth, and is attached to each cgroup that has another
    policy than its parent: what is below inherits the attachment."""
    own = {id for id, found in plan.cgroups.items() if _has_its_own(plan, cgroups[id], found)}
    nested: set[int] = set()
    for id in own:
        if above := own.intersection(_above(cgroups, id)):
            nested |= {id, *above}
    return replace(plan, births={}, attachments={id: id in nested for id in own})


def _has_its_own(plan: Plan, cgroup: Cgroup, found: Resolved) -> bool:
    above = plan.cgroups.get(cgroup.parent_id)
    return found.policy is not None and (above is None or found.policy is not above.policy)


def _above(cgroups: Mapping[int, Cgroup], id: int) -> Iterator[int]:
    while (id := cgroups[id].parent_id) in cgroups:
        yield id


def resolve_one(automaton: Automaton, cgroup: Cgroup, parent: Resolved | None) -> Resolved:
    """One cgroup from its parent; None for the root's."""
    birth = automaton.step(parent.state, cgroup.name) if parent else automaton.root
    own = automaton.bound.get(cgroup.id) or birth.policy or automaton.owned.get(cgroup.id)
    return Resolved(birth.state, own or (parent.policy if parent else None))


def number(policies: Iterable[Policy], records: dict[int, Record], limit: int) -> dict[int, Record]:
    """The record of each policy under an id below `limit`: the one it has, or a free one.

    Raises TooManyError where there are not enough.
    """
    present = {record: id for id, record in records.items()}
    free = (id for id in range(1, limit) if id not in records)
    try:
        return {present.get(wanted) or next(free): wanted for wanted in map(record, policies)}
    except StopIteration:
        raise TooManyError from None


def diff(plan: Plan, actual: Actual, wanted: dict[int, Record], *, visits: bool = True) -> Changes:
    """What brings `actual` to `plan`, whose records are `wanted`; without `visits` open
    sockets stay owed.

    Stale births and records are left alone as long as anything else is to be written: a cgroup that
    is born meanwhile may still need them. So apply, read again and diff until nothing is left.
    """
    records = {id: record for id, record in wanted.items() if id not in actual.records}
    known = actual.records | records
    owed = {id: entry for id, entry in actual.cgroups.items() if entry.owed}
    if owed and visits:  # what an interrupted apply left
        return Changes(retrofits=settled(owed, known))
    ids = policy_ids(wanted)
    births = {
        step: entry
        for step, birth in plan.births.items()
        for entry in [_birth_entry(birth, ids)]
        if actual.births.get(step) != entry
    }
    stale_births = tuple(actual.births.keys() - plan.births.keys())
    if len(actual.births.keys() | births.keys()) > plan.births_max and stale_births:
        # Not room for both: until the next pass, user space is asked about some cgroups.
        return Changes(stale_births=stale_births)
    cgroups = changed_entries(plan, plan.cgroups, actual.cgroups, known, ids)
    stale_cgroups = tuple(actual.cgroups.keys() - plan.cgroups.keys())
    both = Needs(*map(any, zip(plan.needs, actual.needs, strict=True)))
    stale_attachments = tuple(actual.attachments.keys() - plan.attachments.keys())
    attachments = _attachments(plan, actual, stale=bool(stale_attachments))
    if records or births or cgroups or attachments or both != actual.needs:
        owed = {id: entry for id, entry in cgroups.items() if entry.owed}
        return Changes(
            records,
            both if both != actual.needs else None,
            births,
            cgroups,
            settled(owed, known) if visits else {},
            attachments,
            stale_cgroups=stale_cgroups,
        )
    return Changes(
        stale_attachments=stale_attachments,
        needs=plan.needs if plan.needs != actual.needs else None,
        stale_cgroups=stale_cgroups,
        stale_births=stale_births,
        stale_records=_unused(actual, actual.cgroups.values(), wanted),
    )


def _attachments(plan: Plan, actual: Actual, *, stale: bool) -> dict[int, bool]:
    """Those to write, the ones that are there first: of two nested ones the outer learns of it
    before the inner is there. As long as stale ones are there, all count as nested."""
    wanted = plan.attachments
    if stale:
        there = (id for id, nested in actual.attachments.items() if nested is not None)
        wanted = dict.fromkeys((*there, *plan.attachments), True)
    written = {id: nested for id, nested in wanted.items() if actual.attachments.get(id) != nested}
    return dict(sorted(written.items(), key=lambda item: item[0] not in actual.attachments))


def forget_former(actual: Actual) -> Changes:
    """What makes room for new records where there is none: no former policy is remembered."""
    entries = {id: entry._replace(was=()) for id, entry in actual.cgroups.items()}
    changed = {id: entry for id, entry in entries.items() if entry != actual.cgroups[id]}
    return Changes(cgroups=changed, stale_records=_unused(actual, entries.values(), ()))


def changed_entries(
    plan: Plan,
    desired: Mapping[int, Resolved],
    now: Mapping[int, Entry],
    records: Mapping[int, Record],
    ids: Mapping[str, int],
    *,
    new: bool = False,
) -> dict[int, Entry]:
    """The entries that differ from what is wanted, as they should be; `ids` are the policies' by
    name, `records` all that are in the kernel.

    A state that the plan's births had no room for is UNKNOWN, so that user space is asked about
    births below. With `new` the cgroups are younger than their policies, whose `existing` says
    nothing about them then.
    """
    changed = {}
    for id, resolved in desired.items():
        state = resolved.state if (resolved.state, "") in plan.births else UNKNOWN
        policy_id = _id(ids, resolved.policy)
        before = now.get(id)
        if before and before.policy_id == policy_id:
            entry = before._replace(state=state)
        else:
            record = records.get(policy_id)
            owed = record is not None and record.acts and (new or record.existing)
            entry = Entry(state, policy_id, owed, _former(before, records))
        if entry != before:
            changed[id] = entry
    return changed


def settled(entries: Mapping[int, Entry], records: Mapping[int, Record]) -> dict[int, Entry]:
    """The entries after their open sockets were visited: a former policy is forgotten once no
    socket can have a value from it."""
    return {
        cgroup_id: entry._replace(
            owed=False,
            was=tuple(
                id for id in entry.was if not _replaces(records[entry.policy_id], records[id])
            ),
        )
        for cgroup_id, entry in entries.items()
    }


def record(policy: Policy) -> Record:
    """The record that a policy makes."""
    rules = policy.rules
    return Record(
        policy.name,
        rules.options,
        rules.mode,
        rules.direction,
        rules.loopback,
        policy.existing,
        policy.log,
        _digest(rules.destinations),
        rules.destinations,
    )


def policy_ids(wanted: Mapping[int, Record]) -> dict[str, int]:
    """The ids of these records by their policies' names."""
    return {record.name: id for id, record in wanted.items()}


def _id(ids: Mapping[str, int], policy: Policy | None) -> int:
    return ids[policy.name] if policy else 0


def _unused(actual: Actual, entries: Iterable[Entry], wanted: Iterable[int]) -> tuple[int, ...]:
    """The records that no birth, none of these entries, and nothing wanted refers to."""
    used = {id for entry in entries for id in (entry.policy_id, *entry.was)}
    used |= {birth.policy_id for birth in actual.births.values()}
    return tuple(actual.records.keys() - used - set(wanted))


def _birth_entry(birth: Birth, ids: Mapping[str, int]) -> BirthEntry:
    return BirthEntry(birth.state, _id(ids, birth.policy), birth.ask, birth.strength)


def _former(before: Entry | None, records: Mapping[int, Record]) -> tuple[int, ...]:
    if before is None:
        return ()
    # A policy that comes back is its own former one.
    ids = dict.fromkeys((before.policy_id, *before.was))
    return tuple(id for id in ids if id and records[id].acts)[:FORMER_MAX]


def _replaces(record: Record, former: Record) -> bool:
    """Whether every value that `former` may have set is another one's after a visit by `record`."""
    return (
        record.is_plain
        and record.options.keepalive
        and not former.digest
        and all(
            given or not before
            for given, before in zip(
                _numbers(record.options), _numbers(former.options), strict=True
            )
        )
    )


def _numbers(options: Options) -> tuple[Range | None, ...]:
    return (options.idle_s, options.interval_s, options.probes, options.user_timeout_ms)


def _every_option(rules: Rules) -> list[Options]:
    return [rules.options, *(destination.options for destination in rules.destinations)]


def _has_range(options: Options) -> bool:
    return any(each.low != each.high for each in _numbers(options) if each)


def _digest(destinations: tuple[Destination, ...]) -> int:
    if not destinations:
        return 0
    digest = hashlib.blake2b(repr(destinations).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1
