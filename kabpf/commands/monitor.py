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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from kabpf import output
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, dataplane, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.observe.events import Event, Filter, Lost, Monitor, Option
from kabpf.observe.sockets import Address
from kabpf.systemd import names

LINES = 200  # that are written at once where more wait
LOOK_S = 1  # how often it is looked whether the data plane is another one
TRIES = 3  # so many looks in a row at one that is being replaced

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_GAP = (
    "kabpfctl: another build of kabpf was loaded, or a processor came;"
    " events of up to a second are missing"
)

_COLUMNS = (  # with the width that what is usual takes
    ("TIME", 12), ("EVENT", 11), ("CGROUP", 26), ("PID", 7), ("COMMAND", 15), ("WAY", 6),
    ("LOCAL", 21), ("REMOTE", 21), ("POLICY", 22), ("KEEPALIVE", 9), ("IDLE", 8),
    ("INTERVAL", 8), ("PROBES", 6), ("USER-TIMEOUT", 12), ("MORE", 0),
)  # fmt: skip


_FORMAT = "  ".join(f"{{:{width}}}" if width else "{}" for _, width in _COLUMNS)


def _line(cells: list[str]) -> str:
    return _FORMAT.format(*cells).rstrip() + "\n"


HEADS = _line([name for name, _ in _COLUMNS])

Line = Callable[[Event | Lost], str]


class _Ended(BaseException):
    """A signal said to stop, or nobody reads any more."""


def monitor(arguments: argparse.Namespace) -> int:
    """Print events until a signal comes, or standard output is closed."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    cgroup = None if arguments.cgroup is None else names.path(tree, arguments.cgroup)
    units = None if arguments.unit is None else names.covered_by(arguments.unit)
    selection = Filter(cgroup, units, arguments.policy)
    if arguments.event:
        selection = replace(selection, events=frozenset(arguments.event))
    heeded = (number for number in _ENDS if signal.getsignal(number) != signal.SIG_IGN)  # nohup(1)
    former = {number: signal.signal(number, _end) for number in heeded}
    try:
        _follow(tree, selection, as_json if arguments.json else text)
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


def _follow(tree: CgroupTree, selection: Filter, line: Line) -> None:
    """Also what is loaded later, and what takes another's place."""
    is_told = has_heads = was_heard = False
    while True:
        with _opened(tree) as heard:
            if heard is None:
                if not is_told:
                    print("kabpfctl: kabpf is not in force; waiting", file=sys.stderr)
                is_told, was_heard = True, False
                _wait_for(None)
                continue
            if was_heard:
                print(_GAP, file=sys.stderr)
            is_told, was_heard = False, True
            if line is text and not has_heads:
                _write(HEADS)
                has_heads = True
            due = time.monotonic() + LOOK_S
            while time.monotonic() < due or heard.is_current():
                if time.monotonic() >= due:
                    due = time.monotonic() + LOOK_S
                _wait_for(heard)
                _print(_read(heard), selection, line)
            for _ in range(2):  # what came meanwhile, or is too young for the first look
                _print(_read(heard), selection, line)


@contextlib.contextmanager
def _opened(tree: CgroupTree) -> Iterator[Monitor | None]:
    for attempt in itertools.count(1):
        if not dataplane.PINS.exists():
            yield None
            return
        try:
            opened = Monitor(dataplane.PINS, tree)
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


def _print(events: Iterable[Event | Lost], selection: Filter, line: Line) -> None:
    lines = (line(event) for event in events if isinstance(event, Lost) or selection(event))
    while piece := "".join(itertools.islice(lines, LINES)):
        _write(piece)


def _write(text: str) -> None:
    """Past Python's buffer, whose flush at the end could wait for a reader that is stuck."""
    raw = text.encode(errors="backslashreplace")
    while raw:
        try:
            raw = raw[os.write(1, raw) :]
        except BlockingIOError:  # another process has made it so
            select.select([], [1], [])
        except BrokenPipeError:
            raise _Ended from None
        except OSError as error:
            raise RefusedError("write to standard output", error.errno or 0) from None


def text(event: Event | Lost) -> str:
    """One line for people."""
    second, rest_ns = divmod(event.time_ns, 10**9)
    clock = f"{_local_second(second)}.{rest_ns // 10**6:03}"
    if isinstance(event, Lost):
        lost = output.count(event.count, "event")
        return f"{clock}  lost         {lost}, because nobody read them in time\n"
    return _line(
        [
            clock,
            event.kind,
            output.shown(event.unit or event.cgroup or "(removed)"),
            str(event.pid or "-"),
            output.shown(event.command or "-"),
            event.way,
            str(event.local),
            str(event.remote),
            output.shown(event.policy or "-"),
            *event.option_texts.values(),
            event.details,
        ]
    )


def as_json(event: Event | Lost) -> str:
    """One line for programs."""
    second, rest_ns = divmod(event.time_ns, 10**9)
    moment = f"{_utc_second(second)}.{rest_ns // 1000:06}+00:00"
    if isinstance(event, Lost):
        return json.dumps({"time": moment, "event": "lost", "count": event.count}) + "\n"
    result = {
        "time": moment,
        "event": event.kind,
        "cgroup": event.cgroup,
        "cgroup_id": event.report.cgroup_id,
        "unit": event.unit,
        "network_namespace": event.report.namespace,
        "pid": event.pid,
        "command": event.command,
        "way": event.way,
        "family": event.family,
        "local": _end_json(event.local),
        "remote": _end_json(event.remote),
        "policy": event.policy,
        "setsockopt": event.call and event.call._asdict(),
        "death": event.timeout and event.timeout._asdict(),
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
