"""What can be seen of sockets and BPF objects by root from outside, kabpf not asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyroute2
from programs.peer import OPTIONS

SYS_PIDFD_GETFD = 438  # the same number on every architecture
ESTABLISHED = "01"  # as /proc/net/tcp has TCP_ESTABLISHED
KEEPALIVE_TIMER = 2  # idiag_timer (sock_diag(7))

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Connection:
    """An established TCP connection of some process."""

    local: tuple[str, int]
    peer: tuple[str, int]
    options: dict[str, int]


def connections(cgroup: Path) -> list[Connection]:
    """The established connections that the processes below a cgroup hold.

    Listeners are left alone: one that is held here would be in the way of a server that starts."""
    found = {}
    for pid in processes(cgroup):
        established = _established(pid)
        for number, inode in _sockets(pid):
            if inode in established and inode not in found and (seen := _look(pid, number)):
                found[inode] = seen
    return list(found.values())


@contextlib.contextmanager
def connected_to(cgroup: Path, port: int) -> Iterator[socket.socket]:
    """The only socket, of any kind, that the processes below a cgroup have connected to a port."""
    with contextlib.ExitStack() as stack:
        found = {}
        for pid in processes(cgroup):
            for number, inode in _sockets(pid):
                held = stack.enter_context(_copied(pid, number))
                with contextlib.suppress(OSError):  # not connected
                    if held and held.getpeername()[1:2] == (port,):
                        found[inode] = held
        (only,) = found.values()
        yield only


def established(
    namespace: str, source: int | None = None, destination: int | None = None
) -> list[Any]:
    """The established IPv4 connections of a namespace by port, as inet_diag has them."""
    pyroute2.netns.pushns(namespace)
    try:
        with pyroute2.DiagSocket() as diagnosis:
            diagnosis.bind()
            found = diagnosis.get_sock_stats(family=socket.AF_INET, states=1 << int(ESTABLISHED))
    finally:
        pyroute2.netns.popns()
    return [
        one
        for one in found
        if source in (None, one["idiag_sport"]) and destination in (None, one["idiag_dport"])
    ]


def processes(cgroup: Path) -> list[int]:
    """The process ids below a cgroup, here and now."""
    pids = []
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):  # removed before it was opened, or after
            pids += [int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()]
    return pids


def _established(pid: int) -> set[str]:
    """The inodes of the established connections in a process's network namespace."""
    inodes = set()
    with contextlib.suppress(OSError):
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == ESTABLISHED:
                    inodes.add(fields[9])
    return inodes


def _sockets(pid: int) -> Iterator[tuple[int, str]]:
    """The numbers and inodes of a process's sockets."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if (target := os.readlink(f"/proc/{pid}/fd/{name}")).startswith("socket:"):
                    yield int(name), target.removeprefix("socket:[").removesuffix("]")


def _look(pid: int, number: int) -> Connection | None:
    """None for what is gone, or has become something else meanwhile."""
    with _copied(pid, number) as held, contextlib.suppress(OSError):
        if held:
            return Connection(
                local=held.getsockname()[:2],
                peer=held.getpeername()[:2],
                options={name: held.getsockopt(*where) for name, where in OPTIONS.items()},
            )
    return None


@contextlib.contextmanager
def _copied(pid: int, number: int) -> Iterator[socket.socket | None]:
    """A process's socket by its number, for a moment; None for what is gone, or no socket."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        descriptor = _libc.syscall(SYS_PIDFD_GETFD, process, number, 0)
    finally:
        os.close(process)
    try:
        held = socket.socket(fileno=descriptor) if descriptor >= 0 else None
    except OSError:
        os.close(descriptor)
        held = None
    with held or contextlib.nullcontext():
        yield held
