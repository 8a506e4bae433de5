"""kabpfctl monitor: a line for each thing that happens to a socket of a covered cgroup."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from kabpf import output, tables
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, dataplane, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.observe import containers, sockets
from kabpf.observe.events import KINDS, Event, Filter, Lost, Monitor, Option
from kabpf.observe.sockets import Address
from kabpf.policy.model import ON_SOCKETS
from kabpf.systemd import names

LINES = 200  # that are written at once where more wait
LOOK_S = 1  # how often it is looked whether the data plane is another one
TRIES = 3  # so many looks in a row at one that is being replaced

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_GAP = "kabpfctl: kabpf was replaced, or a processor was added; up to a second of events is missing"

# With the widths that what is usual takes.
_WIDE = {
    "TIME": 12, "EVENT": 11, "CGROUP": 26, "PID": 7, "COMMAND": 15, "DIRECTION": 9, "LOCAL": 21,
    "PEER": 21, "POLICY": 22, "KEEPALIVE": 9, "IDLE": 8, "INTERVAL": 8, "PROBES": 6,
    "USER TIMEOUT": 12,
}  # fmt: skip
_COLUMNS = {
    "TIME": 8, "EVENT": max(map(len, KINDS)), "UNIT": 30, "DIRECTION": 9, "PEER": 21,
    "KEEPALIVE": 11,
}  # fmt: skip
_PEER_MAX = 47  # an IPv6 address with its port
_NOTE_INDENT = 10  # of a note on a line of its own: below EVENT


class _Ended(BaseException):
    """A signal said to stop, or nobody reads any more."""


def monitor(arguments: argparse.Namespace) -> int:
    """Print events until a signal comes, or standard output is closed."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    cgroup = None if arguments.cgroup is None else names.find(tree, arguments.cgroup).path
    units = None
    if arguments.unit is not None:
        names.require_unit(arguments.unit, tree)
        units = names.covered_by(arguments.unit)
    selection = Filter(cgroup, units, arguments.policy, container=arguments.container)
    if arguments.event:
        selection = replace(selection, events=frozenset(arguments.event))
    heeded = (number for number in _ENDS if signal.getsignal(number) != signal.SIG_IGN)  # nohup(1)
    former = {number: signal.signal(number, _end) for number in heeded}
    try:
        _follow(tree, selection, None if arguments.json else Screen(is_wide=arguments.wide))
    except _Ended:
        pass
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return 0


def _end(_number: int, _frame: object) -> None:
    for number in _ENDS:  # systemd sends SIGHUP right after SIGTERM to what is on a terminal
        signal.signal(number, _end_again)
    raise _Ended


def _end_again(_number: int, _frame: object) -> None:
    pass


def _follow(tree: CgroupTree, selection: Filter, screen: Screen | None) -> None:
    """Also what is loaded later, and what takes another's place."""
    is_told = was_heard = False
    while True:
        with _opened(tree, observes="turned_off" in selection.events) as heard:
            if heard is None:
                if not is_told:
                    print("kabpfctl: kabpf is not active; waiting", file=sys.stderr)
                is_told, was_heard = True, False
                _wait_for(None)
                continue
            if was_heard:
                print(_GAP, file=sys.stderr)
            is_told, was_heard = False, True
            if screen:
                _write(screen.heads())
            due = time.monotonic() + LOOK_S
            while time.monotonic() < due or heard.is_current():
                if time.monotonic() >= due:
                    due = time.monotonic() + LOOK_S
                _wait_for(heard)
                _print(_read(heard), selection, screen)
            for _ in range(2):  # what came meanwhile, or is too young for the first look
                _print(_read(heard), selection, screen)


@contextlib.contextmanager
def _opened(tree: CgroupTree, *, observes: bool) -> Iterator[Monitor | None]:
    for attempt in itertools.count(1):
        if not dataplane.PINS.exists():
            yield None
            return
        try:
            opened = Monitor(dataplane.PINS, tree, observes=observes)
        except RefusedError:
            if attempt == TRIES:
                raise
            _wait_for(None)
        else:
            with opened:
                yield opened
            return


def _wait_for(heard: Monitor | None) -> None:
    """Wait for events, or a second; raise _Ended where standard output is closed."""
    poll = select.poll()
    for descriptor in heard.descriptors() if heard else ():
        poll.register(descriptor, select.POLLIN)
    poll.register(1, 0)
    is_waiting = heard is not None and heard.is_waiting
    for descriptor, events in poll.poll(0 if is_waiting else LOOK_S * 1000):
        if descriptor == 1 and events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            raise _Ended


def _read(heard: Monitor) -> list[Event | Lost]:
    """In one piece: an exception of a signal's would be lost in a function that libbpf calls."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        return heard.read()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)


def _print(events: list[Event | Lost], selection: Filter, screen: Screen | None) -> None:
    """On a screen, or else as JSON."""
    if screen and events:
        _write(screen.heads())
    line = screen.line if screen else as_json
    lines = (line(event) for event in events if isinstance(event, Lost) or selection(event))
    while piece := "".join(itertools.islice(lines, LINES)):
        _write(piece)


def _write(text: str) -> None:
    """Past Python's buffer, whose flush at the end could wait for a reader that is stuck."""
    raw = output.encodable(text).encode(errors="backslashreplace")
    while raw:
        try:
            raw = raw[os.write(1, raw) :]
        except BlockingIOError:  # another process has made it so
            select.select([], [1], [])
        except BrokenPipeError:
            raise _Ended from None
        except OSError as error:
            raise RefusedError("write to standard output", error.errno or 0) from None


class Screen:
    """Lines for people, as aligned as can be without waiting for more of them: on a terminal as
    wide as that, in a file and a pipe with nothing cut."""

    def __init__(self, *, is_wide: bool) -> None:
        self._is_wide = is_wide
        self._is_begun = False
        self._room: int | None = None
        self._widths: dict[str, int] = {}

    def heads(self) -> str:
        """The line of heads, where it is due: at the beginning, and where the width is another."""
        room = None if self._is_wide else output.room()
        if self._is_begun and room == self._room:
            return ""
        self._is_begun, self._room = True, room
        self._widths = _WIDE if self._is_wide else _widths(room)
        return _aligned(list(self._widths), self._widths) + "\n" if self._widths else ""

    def line(self, event: Event | Lost) -> str:
        """What happened, as wide as the heads that came before; a note that does not fit stands on
        lines of its own."""
        cells, note = _wide_cells(event) if self._is_wide else _cells(event)
        if self._room is None:
            return _aligned([*cells, note], self._widths) + "\n"
        if not self._widths:  # too narrow for a line
            heads = tables.columns(*_COLUMNS, "NOTE")
            return tables.blocks(heads, [[*cells, note]], self._room) + "\n"
        fitted = list(map(tables.cut, cells, self._widths.values()))
        if len(line := _aligned([*fitted, note], self._widths)) <= self._room:
            return line + "\n"
        notes = tables.folded(note, self._room - _NOTE_INDENT)
        return "\n".join(
            [_aligned(fitted, self._widths), *(" " * _NOTE_INDENT + each for each in notes), ""]
        )


def _widths(room: int | None) -> dict[str, int]:
    """Of _COLUMNS on a terminal; none where it is too narrow."""
    if room is None:
        return _COLUMNS
    fixed = sum(_COLUMNS.values()) - _COLUMNS["UNIT"] - _COLUMNS["PEER"]
    left = room - fixed - len(tables.GAP) * (len(_COLUMNS) - 1)
    unit = min(left * 2 // 5, _COLUMNS["UNIT"])
    if unit < tables.TEXT_MIN:
        return {}
    return _COLUMNS | {"UNIT": unit, "PEER": min(left - unit, _PEER_MAX)}


def _aligned(cells: list[str], widths: dict[str, int]) -> str:
    """With a note behind where there is one cell more."""
    padded = zip_longest(cells, widths.values(), fillvalue=0)
    return tables.GAP.join(f"{cell:{width}}" for cell, width in padded).rstrip()


def _cells(event: Event | Lost) -> tuple[list[str], str]:
    """Of _COLUMNS, and a note."""
    clock = _local_second(event.time_ns // 10**9)
    if isinstance(event, Lost):
        return _lost_cells(event, clock, len(_COLUMNS))
    cells = [
        clock,
        event.kind,
        output.shown(sockets.name(event.cgroup)) if event.cgroup else output.UNKNOWN,
        event.direction,
        str(event.peer),
        _keepalive(tuple(event.options.items())),
    ]
    return cells, _note(event)


def _wide_cells(event: Event | Lost) -> tuple[list[str], str]:
    """Of _WIDE, and a note."""
    second, rest_ns = divmod(event.time_ns, 10**9)
    clock = f"{_local_second(second)}.{rest_ns // 10**6:03}"
    if isinstance(event, Lost):
        return _lost_cells(event, clock, len(_WIDE))
    cells = [
        clock,
        event.kind,
        output.shown(event.cgroup or output.UNKNOWN),
        str(event.pid or output.UNKNOWN),
        output.shown(event.command or output.UNKNOWN),
        event.direction,
        str(event.local),
        str(event.peer),
        output.shown(event.policy or output.UNKNOWN),
        *event.option_texts.values(),
    ]
    return cells, event.details


def _lost_cells(lost: Lost, clock: str, columns: int) -> tuple[list[str], str]:
    note = f"{output.count(lost.count, 'event')}, because nobody read them in time"
    return [clock, "lost", *[""] * (columns - 2)], note


def _note(event: Event) -> str:
    """What a line has no column for: what was refused or kept, a call, a timeout."""
    if event.kind in ("failed", "kept"):
        return _outcomes(tuple(event.options.items()))
    if event.direction == "listen":
        return event.details or f"listens at {event.local}"
    return event.details


@functools.lru_cache(maxsize=4096)
def _keepalive(options: tuple[tuple[str, Option], ...]) -> str:
    """As `sockets` shows it."""
    values = {name: option.value for name, option in options}
    if not values["keepalive"]:
        return "off"
    return "/".join(
        output.cell(None if value is None else int(value), row.unit)
        for row in ON_SOCKETS
        if row.field in ("idle_s", "interval_s", "probes")
        for value in [values[row.field]]
    )


@functools.lru_cache(maxsize=4096)
def _outcomes(options: tuple[tuple[str, Option], ...]) -> str:
    names = {row.field: row.name for row in ON_SOCKETS}
    by_outcome: dict[str, list[str]] = {}
    for name, option in options:
        if option.outcome not in (None, "set"):
            by_outcome.setdefault(option.outcome, []).append(names.get(name, name))
    return "; ".join(f"{outcome}: {', '.join(each)}" for outcome, each in by_outcome.items())


def as_json(event: Event | Lost) -> str:
    """One line for programs."""
    second, rest_ns = divmod(event.time_ns, 10**9)
    moment = f"{_utc_second(second)}.{rest_ns // 1000:06}+00:00"
    if isinstance(event, Lost):
        lost = {"time": moment, "event": "lost", "count": event.count}
        return json.dumps({"version": output.JSON_VERSION, **lost}) + "\n"
    result = {
        "version": output.JSON_VERSION,
        "time": moment,
        "event": event.kind,
        "cgroup": event.cgroup,
        "cgroup_id": event.report.cgroup_id,
        "unit": event.unit,
        "container": containers.as_json(event.cgroup),
        "network_namespace": event.report.namespace,
        "pid": event.pid,
        "command": event.command,
        "direction": event.direction,
        "family": event.family,
        "local": _end_json(event.local),
        "peer": _end_json(event.peer),
        "policy": event.policy,
        "setsockopt": event.call and event.call._asdict(),
        "timeout": event.timeout and event.timeout._asdict(),
    }
    options = _options_json(tuple(event.options.items()))
    return f'{json.dumps(result)[:-1]}, "options": {options}}}\n'


def _end_json(end: Address) -> dict[str, str | int]:
    return {"address": end.address, "port": end.port}


# Twenty thousand events a second have few different options, and times of one second.


@functools.lru_cache(maxsize=4096)
def _options_json(options: tuple[tuple[str, Option], ...]) -> str:
    return json.dumps({name: option._asdict() for name, option in options})


@functools.lru_cache(maxsize=4)
def _local_second(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))


@functools.lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
