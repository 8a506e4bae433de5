"""What the kernel has and what to write, as values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from kabpf.digests import blake2b
from kabpf.plan.names import Piece
from kabpf.policy.model import (
    BEFORE_SYN,
    IN_RANGES,
    Destination,
    Direction,
    Mode,
    Options,
    Policy,
    Rules,
)

FORMER_MAX = 4  # KABPF_FORMER in kabpf.h
RECORDS_MAX = 4095  # KABPF_POLICIES there, without 0


class Cgroup:
    """A directory of the cgroup2 tree. The root has parent_id 0 and path /.

    One that `child` made keeps its parent and its name alone: a path may have thousands of names.
    """

    __slots__ = ("_above", "_rest", "id", "parent_id")

    def __init__(self, id: int, parent_id: int, path: str, above: Cgroup | None = None) -> None:
        self.id, self.parent_id = id, parent_id
        self._rest, self._above = path, above  # a name where there is one above

    def child(self, id: int, name: str) -> Cgroup:
        """The one of this id and name right below."""
        return Cgroup(id, self.id, name, self)

    @property
    def path(self) -> str:
        """The cgroup path."""
        names: list[str] = []
        one = self
        while one._above is not None:
            names.append(one._rest)
            one = one._above
        return "/".join((one._rest.rstrip("/"), *reversed(names))) if names else one._rest

    @property
    def name(self) -> str:
        """The last name of the path; "" of the root."""
        return self._rest.rpartition("/")[2]

    def __repr__(self) -> str:
        return f"Cgroup({self.id}, {self.parent_id}, {self.path!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cgroup):
            return NotImplemented
        ids = (self.id, self.parent_id) == (other.id, other.parent_id)
        return ids and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.id)


class PolicyRecord(NamedTuple):
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
    destinations: tuple[Destination, ...] = ()

    @property
    def kept(self) -> PolicyRecord:
        """The record as the kernel's tables have it."""
        return self._replace(destinations=()) if self.destinations else self

    @property
    def acts(self) -> bool:
        """Whether it sets anything on any socket."""
        return self.options.keepalive or self.mode != Mode.FILL or self.digest != 0

    @property
    def gives(self) -> tuple[object, ...]:
        """All that decides what a socket gets."""
        return self.options, self.mode, self.direction, self.loopback, self.digest

    @property
    def is_plain(self) -> bool:
        """Whether every connection of its cgroups gets the same options."""
        return self.loopback and self.direction == Direction.BOTH and not self.digest


class Resolved(NamedTuple):
    """What a cgroup should have: the automaton's state and a policy of its own or an ancestor's."""

    state: int
    policy: Policy | None
    # It is in a container that a selector names, or that container's own: of selectors only exact
    # paths name what is below.
    contained: bool = False


class CgroupEntry(NamedTuple):
    """What the kernel has for a cgroup, as kabpf_cgroup in kabpf.h says; 0 is no policy. The state
    has its generation of globs in it."""

    state: int
    policy_id: int
    owed: bool = False
    was: tuple[int, ...] = ()  # the latest first
    succeeds: bool = False  # owed after each open socket had what the first of `was` gives
    forgot: bool = False  # policies before those are not known any more
    contained: bool = False  # in a container that a selector names


class BirthEntry(NamedTuple):
    """What the kernel does with a new cgroup, as kabpf_birth in kabpf.h says."""

    state: int
    policy_id: int  # 0: the parent's
    ask: bool
    strength: int


class Needs(NamedTuple):
    """What costs connections or applications time, and is therefore on only for a policy that
    needs it."""

    # To see what applications set: enforce, ranges, and logs. None: half of it is there.
    setsockopt: bool | None = False
    before_syn: bool = False  # to look at a connection before its SYN


class GlobsEntry(NamedTuple):
    """A generation of globs: the kernel has up to GENERATIONS of them by their numbers, each with
    states and rows of its own."""

    number: int
    digest: int  # UNFINISHED while it is written
    blocks: tuple[bytes, ...]


UNFINISHED = 1


NONE: Mapping[Any, Any] = MappingProxyType({})


class Changes(NamedTuple):
    """What to write, in this order: what is new comes before whatever refers to it, and what is
    stale goes when nothing refers to it any more."""

    records: Mapping[int, PolicyRecord] = NONE
    needs: Needs | None = None
    globs: GlobsEntry | None = None
    names: Mapping[Piece, int] = NONE
    births: Mapping[tuple[int, int], BirthEntry] = NONE
    cgroups: Mapping[int, CgroupEntry] = NONE
    updates: Mapping[int, CgroupEntry] = NONE  # once their open sockets are updated
    attachments: Mapping[int, bool] = NONE
    stale_attachments: tuple[int, ...] = ()
    stale_births: tuple[tuple[int, int], ...] = ()
    stale_names: tuple[Piece, ...] = ()
    stale_generations: tuple[int, ...] = ()
    stale_cgroups: tuple[int, ...] = ()
    stale_records: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return any(self)

    @property
    def is_of_cgroups(self) -> bool:
        """Whether it writes entries of cgroups, and nothing else."""
        others = self._replace(cgroups={}, updates={}, stale_cgroups=())
        return bool(self) and not others

    @property
    def is_of_stale(self) -> bool:
        """Whether it removes what nothing refers to, and writes nothing."""
        return not any(self[: self._fields.index("stale_attachments")])


def record(policy: Policy) -> PolicyRecord:
    """The record that a policy makes."""
    rules = policy.rules
    return PolicyRecord(
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


def needs_of(policies: Iterable[Policy]) -> Needs:
    """What these policies need."""
    found = {_needs_of_rules(policy.rules, logs=policy.log) for policy in policies}
    return Needs(any(each.setsockopt for each in found), any(each.before_syn for each in found))


@functools.lru_cache(maxsize=128)  # thousands of policies may have the same
def _needs_of_rules(rules: Rules, *, logs: bool) -> Needs:
    options = [each for each in _every_option(rules) if each.keepalive or rules.mode != Mode.FILL]
    return Needs(
        any(
            rules.mode == Mode.ENFORCE or has_range(each) or (logs and each.keepalive)
            for each in options
        ),
        any(getattr(each, row.field) for each in options for row in BEFORE_SYN),
    )


def _every_option(rules: Rules) -> list[Options]:
    return [rules.options, *(destination.options for destination in rules.destinations)]


def has_range(options: Options) -> bool:
    """Whether an option has bounds that differ."""
    return any(each and each.low != each.high for each in _in_ranges(options))


_in_ranges = attrgetter(*(row.field for row in IN_RANGES))  # of thousands of policies


def _digest(destinations: tuple[Destination, ...]) -> int:
    if not destinations:
        return 0
    digest = blake2b(repr(destinations).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1
