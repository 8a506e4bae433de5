"""Updates open sockets one at a time, where the iterator waits for one that is held.

A copy of a process's descriptor of a socket (pidfd_getfd(2)), and a call of setsockopt(2) on that,
have kabpf_retrofit_one see to this socket and take no other's lock. So a process that holds one
keeps that one alone from being updated. What is held by then is passed over; what is held a moment
later stops a process that is left behind, and another one goes on after it.
"""

from __future__ import annotations

import functools
import mmap
import os
import select
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kabpf.apply import left_behind
from kabpf.kernel import abi, dataplane, syscalls
from kabpf.kernel.dataplane import Holder

LOOK_S = 0.05  # between two looks at a process; one that sleeps through them is left behind
LEFT_MAX = 8  # processes left behind
ROUNDS = 3  # as a busy process has its socket's lock most of the time, but for a moment
WORK_S = 10.0

_NOT_BEGUN, _BEGUN, _DONE, _FAILED = b"\0\1\2\3"


def update(pins: Path, root: Path, namespaces: Collection[int]) -> list[Holder]:
    """Update the open sockets of cgroups that are owed it, in these network namespaces, as far as
    processes have descriptors of them; returns one for each socket that is not updated.

    `root` is the root of the cgroup2 tree. Raises RefusedError.
    """
    done: set[int] = set()
    deadline, left_behind_max = time.monotonic() + WORK_S, LEFT_MAX
    owed = _owed(pins, namespaces, done)
    if not owed:
        return []
    with dataplane.linked_for_one(pins, root):
        for number in range(ROUNDS):
            if number:
                time.sleep(LOOK_S)
                owed = _owed(pins, namespaces, done)
            free = _in_order(owed)
            if not owed or (number and not free):
                break
            updated, stuck = _update(free, left_behind_max, deadline)
            done |= updated
            left_behind_max -= stuck
    return [one for one in owed if one.inode not in done]


def _owed(pins: Path, namespaces: Collection[int], done: Collection[int]) -> list[Holder]:
    """One descriptor of each socket."""
    found: dict[int, Holder] = {}
    for one in dataplane.holders(pins, dataplane.OWED):
        if one.namespace in namespaces and one.inode not in done:
            found.setdefault(one.inode, one)
    return [*found.values()]


def _in_order(owed: Iterable[Holder]) -> list[Holder]:
    """Those that nobody holds; last those of cgroups that hold others, and of the biggest ones, so
    that nobody's sockets wait for those of somebody who has many."""
    sockets = Counter(one.cgroup_id for one in owed)
    holds = {one.cgroup_id for one in owed if one.flags & abi.HELD}
    return sorted(
        (one for one in owed if not one.flags & abi.HELD),
        key=lambda one: (
            one.cgroup_id in holds,
            sockets[one.cgroup_id],
            one.cgroup_id,
            one.process,
        ),
    )


def _update(sockets: list[Holder], left_max: int, deadline: float) -> tuple[set[int], int]:
    """The inodes of those that are updated, and how many processes were left behind."""
    begin = stuck = 0
    with _marks(len(sockets)) as marks:
        while begin < len(sockets) and stuck < left_max:
            process, pipe = left_behind.start(functools.partial(_work, sockets, marks, begin))
            try:
                at = _wait(process, pipe, marks, begin, deadline)
                left_behind.kill(process)
            finally:
                os.close(pipe)
            if at is None:
                break
            begin = at + 1
            stuck += 1
        said = marks[:]
    return {one.inode for one, mark in zip(sockets, said, strict=False) if mark == _DONE}, stuck


@contextmanager
def _marks(count: int) -> Iterator[mmap.mmap]:
    """A byte for each socket, shared with the processes that come of this one."""
    with mmap.mmap(-1, max(count, 1)) as marks:
        yield marks


def _wait(process: int, pipe: int, marks: mmap.mmap, begin: int, deadline: float) -> int | None:
    """Wait for the end of a process: None; or for one that sleeps: which socket is its. None as
    well when the time is over."""
    before: tuple[bytes, int] | None = None
    while time.monotonic() < deadline:
        if select.select([pipe], [], [], LOOK_S)[0]:
            return None
        at = marks.find(bytes([_BEGUN]), begin)
        sleep = left_behind.sleep_of(process, b"DS")
        now = (sleep, at) if sleep is not None and at >= 0 else None
        if now and now == before:
            return at
        before = now
    return None


def _work(sockets: list[Holder], marks: mmap.mmap, begin: int, _pipe: int) -> None:
    whose, process = 0, -1
    for at in range(begin, len(sockets)):
        one = sockets[at]
        marks[at] = _BEGUN
        try:
            if one.process != whose:
                if process >= 0:
                    os.close(process)
                whose, process = 0, -1
                process = os.pidfd_open(one.process)
                whose = one.process
            copy = syscalls.copy_descriptor(process, one.descriptor)
            try:
                is_done = os.fstat(copy).st_ino == one.inode and syscalls.has_option(
                    copy, abi.LEVEL
                )
            finally:
                os.close(
                    copy
                )  # where its process has closed it meanwhile, this may wait (SO_LINGER)
        except OSError:
            is_done = False
        marks[at] = _DONE if is_done else _FAILED
