"""What can be seen of sockets and BPF objects by root from outside, kabpf not asked."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from programs.peer import OPTIONS

SYS_PIDFD_GETFD = 438  # the same number on every architecture
ESTABLISHED, LISTEN = 1, 10  # include/net/tcp_states.h

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Socket:
    """A TCP socket of some process; `peer` is None unless it is connected."""

    state: int
    local: tuple[str, int]
    peer: tuple[str, int] | None
    options: dict[str, int]


def connections(cgroup: Path) -> list[Socket]:
    """The established ones of the processes below a cgroup."""
    return [one for one in sockets(cgroup) if one.state == ESTABLISHED]


def sockets(cgroup: Path) -> list[Socket]:
    """The TCP sockets that the processes below a cgroup hold."""
    found = {}
    for pid in processes(cgroup):
        for number, inode in _descriptors(pid):
            if inode not in found and (seen := _look(pid, number)):
                found[inode] = seen
    return list(found.values())


def processes(cgroup: Path) -> list[int]:
    """The process ids below a cgroup, here and now."""
    pids = []
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(FileNotFoundError):
            pids += [int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()]
    return pids


def kernel_objects() -> dict[str, dict[int, str]]:
    """The ids and names of kabpf's programs and maps, and its links, by kind."""
    objects = {}
    for kind in ("prog", "map"):
        listed = json.loads(subprocess.check_output(["bpftool", kind, "list", "--json"]))
        named = {one["id"]: one.get("name", "") for one in listed}
        objects[kind] = {id: name for id, name in named.items() if name.startswith("kabpf")}
    listed = json.loads(subprocess.check_output(["bpftool", "link", "list", "--json"]) or b"[]")
    programs = objects["prog"]
    objects["link"] = {
        one["id"]: programs[one["prog_id"]] for one in listed if one.get("prog_id") in programs
    }
    return objects


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if (target := os.readlink(f"/proc/{pid}/fd/{name}")).startswith("socket:"):
                    yield int(name), target


def _look(pid: int, number: int) -> Socket | None:
    """None for what is no TCP socket, or is gone."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        descriptor = _libc.syscall(SYS_PIDFD_GETFD, process, number, 0)
    finally:
        os.close(process)
    if descriptor < 0:
        return None
    with socket.socket(fileno=descriptor) as held:
        if held.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        if held.type != socket.SOCK_STREAM:
            return None
        peer = None
        with contextlib.suppress(OSError):
            peer = held.getpeername()[:2]
        return Socket(
            state=held.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 1)[0],
            local=held.getsockname()[:2],
            peer=peer,
            options={name: held.getsockopt(*where) for name, where in OPTIONS.items()},
        )
