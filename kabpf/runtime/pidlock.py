"""Whether a kabpfd runs, and how it is told of changes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

from kabpf.errors import RefusedError
from kabpf.kernel.abi import LOGGER
from kabpf.runtime.locks import RUN, holder, monitor_lock, open_lock

PATIENCE_S = 2  # with a daemon that is to log

LOCK = "kabpfd.lock"


def running(run: Path = RUN, lock: str = LOCK) -> int | None:
    """The process id of the daemon, or None. Raises RefusedError where that can't be known."""
    try:
        with open(run / lock, "rb") as file:
            return holder(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:  # root of a user namespace
        raise RefusedError(f"open {run / lock}", error.errno or 0, "it needs root") from None


def tell_changed(run: Path = RUN) -> None:
    """Have a running daemon look again at what is pinned, when the caller has let go of the lock,
    or was killed."""
    if pid := running(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)


def wait_for_log(run: Path = RUN) -> None:
    """Wait until a running daemon hears of sockets that a policy wants logged; not for long, as
    it can't on every machine. The caller has activated the policy, and let go of the lock."""
    deadline = time.monotonic() + PATIENCE_S
    lock = monitor_lock(LOGGER)
    while running(run) and not running(run, lock) and time.monotonic() < deadline:
        time.sleep(0.01)


class Alone:
    """Inside, this process is the only daemon, and is found by `running`. A context manager."""

    def __init__(self, run: Path) -> None:
        self._run, self.path = run, run / LOCK
        self._descriptor = -1

    def __enter__(self) -> Alone:
        self._descriptor = self._taken()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def renew(self) -> bool:
        """Be found again where somebody has removed the lock's file; whether that was so. Raises
        RefusedError where it can't be made anew, or another daemon was faster."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                return False
        fresh = self._taken()
        os.close(self._descriptor)
        self._descriptor = fresh
        return True

    def _taken(self) -> int:
        descriptor = open_lock(self._run, LOCK)
        try:
            os.fchmod(descriptor, 0o600)  # also of one that was there
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RefusedError(
                f"kabpfd is already running as process {running(self._run)}"
            ) from None
        return descriptor
