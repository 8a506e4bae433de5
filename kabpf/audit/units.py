"""What an audit finds of each unit: numbers, and the connections that are at risk. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kabpf.audit import effect, silence
from kabpf.audit.connections import Connection, Keepalive, Place
from kabpf.audit.silence import NEVER_FORGOTTEN, Silence

UNITS_MAX = 16384  # that several looks together remember

Changed = Callable[[Connection], Keepalive]


class AtRisk(NamedTuple):
    """A connection that the shortest of the idle timeouts puts at risk."""

    connection: Connection
    silence: Silence


@dataclass
class Counts:
    """How many connections one idle timeout puts at risk."""

    at_risk: int = 0
    silent: int = 0  # of these, for at least the idle timeout already
    without_policies: int = 0
    with_file: int = 0

    def raise_to(self, other: Counts) -> None:
        """Make each number the greater of the two."""
        for name, value in vars(other).items():
            setattr(self, name, max(getattr(self, name), value))


@dataclass
class Unit:
    """What was found of a unit, or of a cgroup in none."""

    name: str  # as other commands call it
    cgroup: str | None  # its path; None: removed
    counts: list[Counts]  # by idle timeout, in the order asked for
    connections: int = 0
    loopback: int = 0
    same_network: int = 0
    unknown: int = 0  # nobody can tell whether they are at risk
    longest_silence_ms: int = 0  # of those that a middlebox may forget
    at_risk: list[AtRisk] = field(default_factory=list)

    def raise_to(self, other: Unit) -> None:
        """Make it what two looks found together: of numbers the greater one, and the connections of
        the other one, the later."""
        for name in ("connections", "loopback", "same_network", "unknown", "longest_silence_ms"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for counts, others in zip(self.counts, other.counts, strict=True):
            counts.raise_to(others)
        self.at_risk = other.at_risk


class Named(NamedTuple):
    """The unit, or cgroup in none, that a cgroup belongs to."""

    name: str
    cgroup: str | None


def found(
    connections: Iterable[Connection],
    named: Callable[[int], Named],
    timeouts_s: tuple[int, ...],
    with_file: Callable[[int], Changed] | None = None,
) -> dict[Named, Unit]:
    """What there is of each unit that has connections. `named` tells whose a cgroup is, by its id,
    and `with_file` what connections of the cgroup would have under a policy file that is not
    applied."""
    units: dict[Named, Unit] = {}
    shortest = timeouts_s.index(min(timeouts_s))
    of_cgroups: dict[int, tuple[Unit, Changed | None]] = {}
    for each in connections:
        id = each.cgroup_id
        if id not in of_cgroups:
            name = named(id)
            unit = units.setdefault(name, Unit(*name, [Counts() for _ in timeouts_s]))
            of_cgroups[id] = unit, with_file and with_file(id)
        unit, changed = of_cgroups[id]
        _count(unit, each, timeouts_s, shortest, changed)
    return {name: unit for name, unit in units.items() if unit.connections}


def _count(
    unit: Unit,
    connection: Connection,
    timeouts_s: tuple[int, ...],
    shortest: int,
    changed: Changed | None,
) -> None:
    now = silence.of(connection)
    if now.why == silence.Why.LISTENER:
        return
    unit.connections += 1
    if now.why == silence.Why.LOOPBACK:
        unit.loopback += 1
    if now.why in NEVER_FORGOTTEN:
        return
    if connection.place == Place.NETWORK:
        unit.same_network += 1
    lasted_ms = connection.silence_ms or 0
    unit.longest_silence_ms = max(unit.longest_silence_ms, lasted_ms)
    unset = effect.without_policies(connection)
    before = now if unset is connection.keepalive else silence.of(connection, unset)
    after = silence.of(connection, changed(connection)) if changed else None
    for place, timeout_s in enumerate(timeouts_s):
        counts = unit.counts[place]
        is_at_risk = now.is_at_risk(timeout_s)
        if is_at_risk:
            counts.at_risk += 1
            counts.silent += lasted_ms >= timeout_s * 1000
        counts.without_policies += before.is_at_risk(timeout_s) is True
        counts.with_file += after is not None and after.is_at_risk(timeout_s) is True
        if place == shortest:
            unit.unknown += is_at_risk is None
            if is_at_risk:
                unit.at_risk.append(AtRisk(connection, now))


class Looks:
    """What several looks found together, of a bounded number of units."""

    def __init__(self) -> None:
        self.units: dict[Named, Unit] = {}
        self.count = 0
        self.left_out = False  # of units that there was no room for

    def add(self, units: dict[Named, Unit]) -> None:
        """Add what a look found."""
        self.count += 1
        for name, former in self.units.items():
            if name not in units:
                former.at_risk = []
        for name, unit in units.items():
            if known := self.units.get(name):
                known.raise_to(unit)
            elif len(self.units) < UNITS_MAX:
                self.units[name] = unit
            else:
                self.left_out = True
