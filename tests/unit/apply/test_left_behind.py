"""Processes that are left behind."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator

import pytest

from kabpf.apply import left_behind
from kabpf.errors import RefusedError


def _say(pipe: int) -> None:
    os.write(pipe, b"x")


@pytest.fixture
def without_children() -> Iterator[None]:
    """As a command is that somebody started who ignores SIGCHLD: the kernel waits for children."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("without_children")
def test_process_is_started_where_children_are_not_waited_for() -> None:
    """It says by its pipe that it is there, and when it has ended."""
    _, pipe = left_behind.start(_say)
    said = os.read(pipe, 1)
    os.close(pipe)
    assert said == b"x"


def test_process_that_can_not_be_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many already; no descriptor stays open."""

    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, "")

    monkeypatch.setattr(os, "fork", refused)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RefusedError, match="start a process"):
        left_behind.start(lambda _: None)
    assert os.listdir("/proc/self/fd") == before
