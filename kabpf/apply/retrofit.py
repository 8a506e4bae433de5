"""Updates the sockets that are open when a policy becomes active.

The iterator sees one network namespace. Which ones have sockets of cgroups that are owed the update
is what processes' descriptors say, at a price that does not grow with the namespaces of others. To
enter them needs capabilities that kabpfd lacks; it calls kabpf-retrofit (systemd/), which has
them and does nothing else: one connection is one request, which names processes, or none for the
whole machine. Both sides speak JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kabpf.apply import left_behind, one_by_one
from kabpf.apply.visitors import LATE, Outcome, Part, outcomes
from kabpf.errors import RefusedError
from kabpf.faults import fault_point
from kabpf.kernel import abi, capabilities, dataplane
from kabpf.kernel.dataplane import PINS, RETROFIT, Holder
from kabpf.kernel.namespaces import WAYS_MAX, Namespace, held_namespaces, own_namespace

HELPER = Path("/run/kabpf/retrofit.socket")
ANSWER_S = 120  # what a hundred million sockets take; RuntimeMaxSec= of the helper
BEGIN_S = 20  # to ask it, which needs it at work where there are many cgroups to name

# For namespaces in which no descriptor of a process is known to be of a socket that is owed the
# update: it may be in flight between two processes, or registered with an io_uring.
UNKNOWN_S = 1.0

# For the others, of which users may make as many as they like: some 2 ms each, where it has few
# sockets. What this is too short for is updated one by one.
KNOWN_S = 10.0

_HELP = f"update open sockets through {HELPER}"
_RESTART = "CAP_SYS_ADMIN is missing; try: systemctl restart kabpf-retrofit.socket"

NAMED_MAX = 3  # processes in a message
SAID_MAX = 5  # messages


@dataclass(frozen=True)
class Left:
    """What could not be updated yet; false where that is nothing."""

    cgroups: frozenset[int] = frozenset()  # that have sockets there, and stay owed
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasons)

    @property
    def refused(self) -> str:
        """Why cgroups stay owed the update; empty where nothing is known to be missing: somebody
        else's socket is in the way, or a namespace was not searched."""
        return "; ".join(self.reasons) if self.cgroups else ""


def update(
    owed: Iterable[int], pins: Path, root: Path, processes: Iterable[int] | None = None
) -> Left:
    """Give the open sockets of the cgroups `owed`, which the kernel has as owed it, what their
    policies say: in the network namespaces of these processes, and where a descriptor is known to
    be of a socket that is owed the update; with None in every one of the machine. `root` is the
    root of the cgroup2 tree.

    Raises RefusedError with all that was refused; the other namespaces are updated.
    """
    if capabilities.missing(("CAP_SYS_ADMIN",)):
        with _asked(owed, processes, ANSWER_S) as connection:
            try:
                answer = _received(connection)
            except OSError as error:
                raise RefusedError(_HELP, error.errno or 0, _RESTART) from None
        return answered(answer)
    return _update(pins, root, frozenset(owed), processes)


def begin(owed: Iterable[int], pins: Path, root: Path, processes: Iterable[int] | None) -> int:
    """Have another process do the same; the descriptor at whose end is what `answered` takes.
    Raises RefusedError."""
    if capabilities.missing(("CAP_SYS_ADMIN",)):
        return _asked(owed, processes, BEGIN_S).detach()
    owed = frozenset(owed)

    def work(pipe: int) -> None:
        with open(pipe, "wb") as stream:
            stream.write(_answer(pins, root, owed, processes))

    _, pipe = left_behind.start(work)
    return pipe


def answered(answer: bytes) -> Left:
    """What is left, by the answer of another process. Raises RefusedError as `update` does, and
    where it did not come to its end."""
    try:
        found = json.loads(answer)
    except ValueError:
        raise RefusedError(_HELP, 0, _RESTART) from None
    if found["refused"]:
        raise RefusedError(found["refused"])
    return Left(frozenset(found["cgroups"]), tuple(found["left"]))


def serve(descriptor: int, root: Path) -> None:
    """Do what `update` asks for at the other end of a stream socket, which may be gone any time.

    Raises RefusedError where the descriptor is no socket.
    """
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError as error:
        raise RefusedError("read a request", error.errno or 0, "expected a socket") from None
    with connection, contextlib.suppress(ConnectionError):
        if not (request := _received(connection)):
            return
        asked = json.loads(request)
        connection.sendall(_answer(PINS, root, frozenset(asked["owed"]), asked["processes"]))


def _answer(pins: Path, root: Path, owed: frozenset[int], processes: Iterable[int] | None) -> bytes:
    refused, left = "", Left()
    try:
        left = _update(pins, root, owed, processes)
    except RefusedError as error:
        refused = str(error)
    answer = {"refused": refused, "cgroups": sorted(left.cgroups), "left": left.reasons}
    return json.dumps(answer).encode()


def _update(pins: Path, root: Path, owed: frozenset[int], processes: Iterable[int] | None) -> Left:
    fault_point("retrofit")
    own = own_namespace()
    holders: list[Holder] = []
    are_owed: set[int] = set()  # namespaces

    def parts() -> Iterator[Part]:
        yield Part([own])
        # While a visitor is at work there already: most sockets are in this one.
        holders.extend(_holders(pins))
        held = held_namespaces(processes)
        known, others = sorted_namespaces(own, holders, held)
        are_owed.update(each.inode for each in known)
        yield Part(known, KNOWN_S)
        if processes is not None:  # and no others'
            others = [each for each in others if each.inode in held]
        yield Part(others, UNKNOWN_S)

    refused: dict[str, None] = {}
    unreached: dict[int, Outcome] = {}
    skipped = 0
    for outcome in outcomes(partial(dataplane.output, pins / RETROFIT), parts()):
        if outcome.was_skipped and outcome.namespace in are_owed:
            unreached[outcome.namespace] = outcome._replace(refused=LATE)
        elif outcome.was_skipped:
            skipped += 1
        elif outcome.is_held:
            unreached[outcome.namespace] = outcome
        elif outcome.refused:
            refused[outcome.refused] = None
    if refused:
        raise RefusedError("; ".join(refused))
    if not unreached:
        return Left(frozenset(), _skipped(skipped))
    holders += _holders(pins)
    try:
        left = one_by_one.update(pins, root, unreached.keys())
    except RefusedError:  # by others' programs there, which `doctor` lists
        left = [one for one in holders if one.namespace in unreached]
    of_them = {one.namespace for one in left if one.cgroup_id in owed}
    reasons = [
        _reason(outcome, holders, is_owed=outcome.namespace in of_them)
        for outcome in unreached.values()
    ]
    cgroups = owed & {one.cgroup_id for one in left}
    return Left(cgroups, (*reasons[:SAID_MAX], *_more(reasons), *_skipped(skipped)))


def _holders(pins: Path) -> list[Holder]:
    """One of a process's descriptors for each cgroup and network namespace, as it may have any
    number of them."""
    found: dict[tuple[int, ...], Holder] = {}
    for one in dataplane.holders(pins):
        found.setdefault((one.process, one.cgroup_id, one.namespace, one.flags), one)
    return [*found.values()]


def sorted_namespaces(
    own: Namespace, holders: Iterable[Holder], held: Mapping[int, Namespace]
) -> tuple[list[Namespace], list[Namespace]]:
    """The namespaces other than `own`: those that have sockets of cgroups that are owed the update,
    the ones in which a process has a socket's lock last; and all others."""
    found = dict(held)
    are_owed: set[int] = set()
    are_locked: set[int] = set()
    for one in holders:
        sockets = found.setdefault(one.namespace, Namespace(one.namespace)).sockets
        if len(sockets) < WAYS_MAX:
            sockets.append((one.process, one.descriptor))
        if one.flags & abi.OWED:
            are_owed.add(one.namespace)
        if one.flags & abi.HELD:
            are_locked.add(one.namespace)
    found.pop(own.inode, None)
    known = [found[inode] for inode in are_owed & found.keys()]
    known.sort(key=lambda namespace: namespace.inode in are_locked)
    return known, [each for inode, each in found.items() if inode not in are_owed]


def _reason(outcome: Outcome, holders: Iterable[Holder], *, is_owed: bool) -> str:
    if is_owed:
        where = f"open sockets in network namespace {outcome.namespace} are not updated yet"
    else:
        where = (
            f"open sockets in network namespace {outcome.namespace} are updated only where a"
            " process has a descriptor of them"
        )
    if outcome.refused:
        return f"{where}: {outcome.refused}"
    processes = {
        one.process
        for one in holders
        if one.namespace == outcome.namespace and one.flags & abi.HELD
    }
    if not processes:
        return f"{where}: a socket there is held"
    named = ", ".join(map(str, sorted(processes)[:NAMED_MAX]))
    who = f"process {named} holds" if len(processes) == 1 else f"one of the processes {named} holds"
    return f"{where}: {who} a socket there"


def _more(reasons: list[str]) -> tuple[str, ...]:
    more = len(reasons) - SAID_MAX
    return (f"and so in {more} more network namespaces",) if more > 0 else ()


def _skipped(count: int) -> tuple[str, ...]:
    if not count:
        return ()
    return (
        f"{count} network namespaces were not searched: no process has a socket of these cgroups"
        " open there",
    )


def _asked(owed: Iterable[int], processes: Iterable[int] | None, seconds: float) -> socket.socket:
    """A connection to the helper, which was told what to do; each step has so many seconds."""
    request = {"owed": sorted(owed), "processes": None if processes is None else sorted(processes)}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(seconds)
        connection.connect(str(HELPER))
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
    except OSError as error:
        connection.close()
        raise RefusedError(_HELP, error.errno or 0, _RESTART) from None
    return connection


def _received(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))
