"""Who comes first where several want the lock."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kabpf.errors import RefusedError
from kabpf.runtime.locks import ROOTS, locked, locked_for_user, open_lock


def is_free(run: Path, name: str) -> bool:
    descriptor = open_lock(run, name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_roots_command_comes_before_requests_that_wait(tmp_path: Path) -> None:
    """Requests that wait for longer do not take the lock while a command of root's wants it."""
    came: list[str] = []

    def request(name: str) -> None:
        with locked_for_user(20, tmp_path):
            came.append(name)
            time.sleep(0.1)

    def command() -> None:
        with locked(tmp_path):
            came.append("root")

    users = [threading.Thread(target=request, args=(str(number),)) for number in range(4)]
    root = threading.Thread(target=command)
    with locked(tmp_path):
        for user in users:
            user.start()
        root.start()
        deadline = time.monotonic() + 10
        while is_free(tmp_path, ROOTS):
            assert time.monotonic() < deadline
        time.sleep(0.2)  # for all to wait
    for thread in (root, *users):
        thread.join()
    assert came[0] == "root"
    assert sorted(came[1:]) == ["0", "1", "2", "3"]


def test_request_gives_up_after_its_time(tmp_path: Path) -> None:
    """A request that does not get the lock in its time is refused."""
    with (
        locked(tmp_path),
        pytest.raises(RefusedError, match="kabpf is busy"),
        locked_for_user(0.1, tmp_path),
    ):
        pass
    with locked_for_user(0.1, tmp_path):
        assert not is_free(tmp_path, "lock")
        assert is_free(tmp_path, ROOTS)  # for root to stand in line
    assert is_free(tmp_path, "lock")


def test_wait_is_filled(tmp_path: Path) -> None:
    """While another command has the lock, the daemon does what it has to."""
    calls: list[int] = []
    with locked(tmp_path):
        waiting = threading.Event()

        def meanwhile() -> None:
            calls.append(1)
            waiting.set()

        thread = threading.Thread(target=lambda: _hold(tmp_path, meanwhile))
        thread.start()
        assert waiting.wait(10)
    thread.join()
    assert calls


def _hold(run: Path, meanwhile: Callable[[], None]) -> None:
    with locked(run, meanwhile=meanwhile):
        pass
