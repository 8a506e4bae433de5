"""Open sockets one at a time; tests/kernel/test_held_sockets.py has them in the kernel."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from kabpf.apply import one_by_one
from kabpf.kernel import abi, syscalls
from kabpf.kernel.dataplane import Holder


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Of this process."""
    made = [socket.socket() for _ in range(6)]
    yield made
    for each in made:
        each.close()


def holder(one: socket.socket, *, cgroup: int = 1, flags: int = abi.OWED) -> Holder:
    return Holder(cgroup, os.fstat(one.fileno()).st_ino, 1, os.getpid(), one.fileno(), flags)


def test_what_waits_without_end_stops_no_other(
    sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a sleep that a signal ends, as close(2) of a socket with SO_LINGER: its process is
    left, and another one goes on after it."""
    held = holder(sockets[2])

    def has_option(descriptor: int, level: int) -> bool:
        assert level == abi.LEVEL
        if os.fstat(descriptor).st_ino == held.inode:
            signal.pause()
        return True

    monkeypatch.setattr(syscalls, "has_option", has_option)
    owed = [holder(each) for each in sockets]
    done, stuck = one_by_one._update(owed, 8, time.monotonic() + 60)
    assert (done, stuck) == ({one.inode for one in owed} - {held.inode}, 1)


def test_descriptor_that_is_another_by_now_is_not_done(
    sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that is closed, or of a process that has ended."""
    monkeypatch.setattr(syscalls, "has_option", lambda *_: True)
    owed = [holder(each) for each in sockets]
    os.dup2(sockets[1].fileno(), sockets[0].fileno())
    sockets[2].close()
    owed[3] = owed[3]._replace(process=(1 << 22) + 1)  # PID_MAX_LIMIT
    done, stuck = one_by_one._update(owed, 8, time.monotonic() + 60)
    assert (done, stuck) == ({owed[number].inode for number in (1, 4, 5)}, 0)


def test_sockets_of_who_holds_some_or_has_many_come_last(sockets: list[socket.socket]) -> None:
    """What is held itself does not come at all."""
    cgroups = (3, 3, 2, 1, 1, 1)
    owed = [holder(one, cgroup=number) for one, number in zip(sockets, cgroups, strict=True)]
    owed[0] = owed[0]._replace(flags=abi.OWED | abi.HELD)
    assert [one.cgroup_id for one in one_by_one._in_order(owed)] == [2, 1, 1, 1, 3]
