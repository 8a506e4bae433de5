"""What happens to the sockets of covered cgroups, as values."""

from __future__ import annotations

import bisect
import errno
import functools
import operator
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel import abi, loading
from kabpf.kernel.abi import CEvent, Report
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Dataplane
from kabpf.observe import sockets
from kabpf.observe.reports import Reports
from kabpf.observe.sockets import Address
from kabpf.plan.state import Cgroup
from kabpf.policy.model import ON_SOCKETS
from kabpf.runtime.locks import RUN
from kabpf.runtime.pace import Pace

KINDS = ("set", "updated", "kept", "failed", "ignored", "clamped", "turned_off", "timed_out")

_CALLS = {abi.IGNORED: "ignored", abi.CLAMPED: "clamped", abi.TURNED_OFF: "turned_off"}

REASONS = {  # KABPF_KEEPALIVE and so on
    1: "keepalive",
    2: "user timeout",
    3: "retransmissions",
    4: "zero window",
}
DIRECTIONS = {0: "listen", abi.OUT: "out", abi.IN: "in"}

PATHS_MAX = 200_000  # cgroups, most of them gone, whose paths are remembered
CALLERS_MAX = 50_000  # connections whose processes are remembered


class Option(NamedTuple):
    """An option as a socket has it now. `outcome` says what kabpf did: "set"; "kept" as the
    application had it; an errno's name where the kernel refused; or None where there was nothing to
    do, as on a connection that has it from its listener."""

    value: int | bool | None  # None: not set on the socket, so that the system's counts
    outcome: str | None


class Timeout(NamedTuple):
    """How a connection timed out: by keepalive, by the user timeout, or by the kernel's retries."""

    reason: str  # one of REASONS
    error: str  # as the application reads it: ETIMEDOUT, or what ICMP had said
    silent_ms: int  # since the last receipt
    unanswered: int  # keepalive or window probes, or retransmissions
    window_closed_ms: int  # since the first probe of the peer's closed window; 0: it was open


class Call(NamedTuple):
    """A setsockopt(2) that was ignored, clamped, or undid the policy."""

    option: str
    requested: int | bool


class Event(NamedTuple):
    """Something that happened to one socket; None is unknown, or does not apply."""

    time_ns: int  # since 1970
    report: Report
    cgroup: str | None  # the path; None: removed, or its birth was lost a moment ago
    policy: str | None

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return _kind(self.report.what, self.report.outcomes)

    @property
    def unit(self) -> str | None:
        """The innermost systemd unit that the cgroup is in."""
        return next(reversed(sockets.units(self.cgroup)), None)

    @property
    def pid(self) -> int | None:
        """The process that the kernel worked for, where it is known."""
        return self.report.pid or None

    @property
    def command(self) -> str | None:
        """The first 15 bytes of its name, as the kernel keeps them."""
        # Where __set_task_comm() does not pad it, as in v5.15, the rest of a longer name follows.
        command, _, _ = self.report.command.partition(b"\0")
        return os.fsdecode(command) if self.report.pid else None

    @property
    def direction(self) -> str:
        """out, in, or listen."""
        return DIRECTIONS[self.report.direction]

    @property
    def family(self) -> str:
        """ipv4, ipv6, or another one's number."""
        return sockets.FAMILIES.get(self.report.family, str(self.report.family))

    @property
    def local(self) -> Address:
        """The end on this machine."""
        return Address(_text(self.report.local), self.report.local_port)

    @property
    def peer(self) -> Address:
        """The other end; of a listener none."""
        return Address(_text(self.report.remote), self.report.remote_port)

    @property
    def options(self) -> dict[str, Option]:
        """Each option as the socket has it, by name, as in `sockets.SET`."""
        report = self.report
        return _options(report.outcomes, report.keepalive, _numbers(report))

    @property
    def call(self) -> Call | None:
        """The setsockopt(2) that the event is about."""
        if self.report.what not in _CALLS:
            return None
        option, asked = sockets.SET[self.report.option], self.report.asked
        return Call(option, bool(asked) if option == "keepalive" else asked)

    @property
    def timeout(self) -> Timeout | None:
        """How the connection ended, where that is the event."""
        if self.report.what != abi.TIMED_OUT:
            return None
        report = self.report
        reason, error = REASONS[report.reason], _errno(report.error)
        return Timeout(reason, error, report.silent_ms, report.sent, report.closed_ms)

    @property
    def option_texts(self) -> dict[str, str]:
        """Each option as a person would say it: keepalive, idle, interval, probes, user timeout. A
        value that was kept says so; what was refused is its errno; - is not set."""
        return _option_texts(*self.options.values())

    @property
    def details(self) -> str:
        """The call or the timeout as a person would say it; "" where the event is neither."""
        if call := self.call:
            name, unit = _NAMES[call.option]
            return f"setsockopt of {name} {_option_text(Option(call.requested, None), unit)}"
        if timeout := self.timeout:
            silent = f"silent for {timeout.silent_ms / 1000:.1f}s"
            if closed_ms := timeout.window_closed_ms:
                silent = f"the peer's window closed for {closed_ms / 1000:.1f}s, {silent}"
            return f"{timeout.reason}: {silent}, {timeout.unanswered} unanswered, {timeout.error}"
        return ""


_NAMES = {  # of options, with their units
    "keepalive": ("keepalive", ""),
    **{row.field: (row.name, row.unit) for row in ON_SOCKETS},
}
_numbers = operator.itemgetter(*(Report._fields.index(row.field) for row in ON_SOCKETS))


@dataclass(frozen=True)
class Lost:
    """Events that were lost because nobody read them in time."""

    time_ns: int
    count: int


@dataclass(frozen=True)
class Filter:
    """Which events are asked for; None is any."""

    cgroup: str | None = None  # a cgroup path, and all below it
    units: tuple[str, ...] | None = None  # units' names or globs, and all inside them
    policy: str | None = None
    events: frozenset[str] = frozenset(KINDS)
    container: str | None = None  # as `containers.is_meant` takes it

    def __call__(self, event: Event) -> bool:
        """Whether an event is asked for."""
        return (
            (self.policy is None or event.policy == self.policy)
            and sockets.is_inside(event.cgroup, self.cgroup, self.units, self.container)
            and event.kind in self.events
        )


class Monitor:
    """Hears of every event from now on. A context manager, whose end leaves nothing behind, as does
    that of its process.

    Raises RefusedError where the data plane is not loaded or is another version's, or where there
    are too many monitors; UnsupportedError where bcc's data plane is loaded, which tells nothing,
    or this process lacks a capability. With `log` only policies count that want their sockets
    logged. With `observes`, events come of kind turned_off, for which each setsockopt(2) of the
    machine is looked at; without it where a policy needs that anyway.
    """

    def __init__(
        self,
        pins: Path,
        tree: CgroupTree,
        run: Path = RUN,
        *,
        log: bool = False,
        observes: bool = False,
    ) -> None:
        self._received: list[bytes] = []
        self._waiting: list[Report | CEvent] = []
        self._lost = 0
        if not loading.kind(pins).reports_events:
            raise UnsupportedError(
                "monitor needs BTF, which the bcc loader does without;"
                " try: kabpfctl apply --loader libbpf"
            )
        self._loaded = Dataplane(pins, tree)
        try:
            self._identity = self._loaded.identity()
            root = tree.mount if observes else None
            self._reports = Reports(pins, run, self._received.append, log=log, root=root)
        except BaseException:
            self._loaded.close()
            raise
        self._paths = _Paths(tree)
        self._names: dict[int, str] = {}
        self._callers: dict[_Ends, tuple[int, bytes]] = {}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._reports.close()
        self._loaded.close()

    def descriptors(self) -> list[int]:
        """Descriptors, of which one is readable when events have come since the last poll."""
        return self._reports.descriptors()

    def is_current(self) -> bool:
        """Whether the data plane is still the one that is listened to, and tells everything."""
        try:
            return self._loaded.identity() == self._identity and self._reports.is_heard()
        except RefusedError:
            return False

    def read(self) -> list[Event | Lost]:
        """The events that wait, in their order."""
        # Each processor has a buffer of its own. What is younger than this waits for what another
        # one may have told before it.
        until_ns = time.monotonic_ns()
        self._reports.consume()
        self._waiting += map(abi.read_report, self._received)
        self._received.clear()
        self._waiting.sort(key=_moment)
        ripe = bisect.bisect(self._waiting, until_ns, key=_moment)
        reports, self._waiting = self._waiting[:ripe], self._waiting[ripe:]
        events = list(self._events(reports))
        if (lost := self._reports.lost()) > self._lost:
            events.append(Lost(time.time_ns(), lost - self._lost))
            self._lost = lost
        return events

    @property
    def is_waiting(self) -> bool:
        """Whether `read` has more to give, although there is nothing new."""
        return bool(self._waiting)

    def _events(self, reports: list[Report | CEvent]) -> Iterator[Event | Lost]:
        offset = time.time_ns() - time.monotonic_ns()
        names: dict[int, str | None] = {}
        for report in reports:
            if isinstance(report, CEvent):
                self._paths.born(report.cgroup_id, report.parent_id, os.fsdecode(report.name))
                continue
            if report.what == abi.CALLED:
                self._remember(report)
                if not _has_failed(report.outcomes):
                    continue
            elif not report.pid:
                pid, command = self._callers.get(_ends(report), (0, b""))
                report = report._replace(pid=pid, command=command)
            if report.policy_id not in names:
                names[report.policy_id] = self._name(report.policy_id)
            path = self._paths.find(report.cgroup_id)
            yield Event(report.time_ns + offset, report, path, names[report.policy_id])

    def _remember(self, report: Report) -> None:
        if len(self._callers) >= CALLERS_MAX:
            del self._callers[next(iter(self._callers))]
        ends = _ends(report)
        self._callers.pop(ends, None)  # to be the youngest
        self._callers[ends] = report.pid, report.command

    def _name(self, policy_id: int) -> str | None:
        """The policy's name, also of one that was removed since."""
        if name := self._loaded.policy_name(policy_id):
            self._names[policy_id] = name
        return self._names.get(policy_id)


_Ends = tuple[bytes, bytes, int, int, int]


def _ends(report: Report) -> _Ends:
    return report[6:11]


def _moment(report: Report | CEvent) -> int:
    return report.time_ns


def _has_failed(outcomes: int) -> bool:
    return bool({*abi.read_outcomes(outcomes)} - {0, abi.SET, abi.KEPT})


class _Paths:
    """The paths of cgroups by their ids, those removed meanwhile included."""

    def __init__(self, tree: CgroupTree) -> None:
        self._tree = tree
        self._cgroups: dict[int, Cgroup | None] = {}
        self._looks = Pace()
        self._read_tree()

    def born(self, id: int, parent_id: int, name: str) -> None:
        if parent := self._cgroups.get(parent_id):
            self._cgroups[id] = parent.child(id, name)
        if len(self._cgroups) > PATHS_MAX:
            self._cgroups.clear()

    def find(self, id: int) -> str | None:
        """None also where its birth was lost, and the tree was read a moment ago."""
        if id not in self._cgroups and self._looks.is_due:
            with self._looks.taken():
                self._read_tree()
            self._cgroups.setdefault(id, None)
        cgroup = self._cgroups.get(id)
        return cgroup.path if cgroup else None

    def _read_tree(self) -> None:
        self._cgroups.update((cgroup.id, cgroup) for cgroup in self._tree.cgroups())


_text = functools.lru_cache(maxsize=4096)(sockets.text)


@functools.lru_cache(maxsize=1024)
def _kind(what: int, outcomes: int) -> str:
    if what == abi.TIMED_OUT:
        return "timed_out"
    if what in _CALLS:
        return _CALLS[what]
    if _has_failed(outcomes):
        return "failed"
    if abi.KEPT in abi.read_outcomes(outcomes):
        return "kept"
    return "updated" if what == abi.OPEN else "set"


@functools.lru_cache(maxsize=4096)
def _options(outcomes: int, keepalive: int, numbers: tuple[int, ...]) -> dict[str, Option]:
    values = (*(number or None for number in numbers), bool(keepalive))
    return {
        name: Option(value, _outcome(outcome))
        for name, value, outcome in zip(
            sockets.SET, values, abi.read_outcomes(outcomes), strict=False
        )
    }


@functools.lru_cache(maxsize=4096)
def _option_texts(*options: Option) -> dict[str, str]:
    by_field = dict(zip(sockets.SET, options, strict=True))
    return {name: _option_text(by_field[option], unit) for option, (name, unit) in _NAMES.items()}


def _option_text(option: Option, unit: str) -> str:
    if option.outcome not in (None, "set", "kept"):
        return option.outcome
    if option.value is None:
        text = "-"
    elif isinstance(option.value, bool):
        text = "on" if option.value else "off"
    elif unit == "ms" and option.value % 1000 == 0:
        text = f"{option.value // 1000}s"
    else:
        text = f"{option.value}{unit}"
    return f"{text} (kept)" if option.outcome == "kept" else text


def _outcome(outcome: int) -> str | None:
    return {0: None, abi.SET: "set", abi.KEPT: "kept"}.get(outcome) or (
        _errno(outcome) if outcome else None
    )


def _errno(number: int) -> str:
    return errno.errorcode.get(number, str(number))
