"""The directory /run/kabpf, and the locks in it."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kabpf.errors import RefusedError

RUN = Path("/run/kabpf")

_FLOCK = struct.Struct("hhqqi")  # struct flock of fcntl(2) where off_t has 64 bits

# Held together by root's commands that wait for "lock" or have it, and by a user's request alone
# for the moment in which it takes "lock": so that no number of requests comes before root.
ROOTS = "roots.lock"


@contextmanager
def locked(
    run: Path = RUN, name: str = "lock", meanwhile: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold a lock: "lock" is that under which the kernel's state and the drop-ins of commands
    change, and which root's commands have before users' requests. `meanwhile` is called again and
    again while others have it."""
    with ExitStack() as stack:
        for each, kind in ((ROOTS, fcntl.LOCK_SH), (name, fcntl.LOCK_EX)):
            if each == ROOTS and name != "lock":
                continue
            descriptor = open_lock(run, each)
            stack.callback(os.close, descriptor)
            while meanwhile and not _takes(descriptor, kind):
                meanwhile()
                time.sleep(0.02)
            fcntl.flock(descriptor, kind)
        yield


@contextmanager
def locked_for_user(seconds: float, run: Path = RUN) -> Iterator[None]:
    """Hold "lock" for a user's request, when no command of root's has it or waits for it.

    Raises RefusedError where that does not come within so many seconds.
    """
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        lock, roots = open_lock(run, "lock"), open_lock(run, ROOTS)
        stack.callback(os.close, lock)
        try:
            while True:
                if _takes(roots, fcntl.LOCK_EX):
                    if _takes(lock, fcntl.LOCK_EX):
                        break
                    fcntl.flock(roots, fcntl.LOCK_UN)
                if time.monotonic() > deadline:
                    raise RefusedError("kabpf is busy", hint="try again later")
                time.sleep(0.02)
        finally:
            os.close(roots)
        yield


def _takes(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked_if_free(seconds: float, run: Path = RUN) -> Iterator[None]:
    """Keep commands from changing the state while the block reads it, where those that are at work
    are done within so many seconds; else let them."""
    descriptor = open_lock(run, "lock")
    deadline = time.monotonic() + seconds
    try:
        while not _takes(descriptor, fcntl.LOCK_SH) and time.monotonic() <= deadline:
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def open_lock(run: Path, name: str) -> int:
    """The descriptor of a file in `run` whose lock means something; it is closed to others than
    root, as a read lock of theirs would keep root out."""
    try:
        with suppress(FileExistsError):
            run.mkdir()
            run.chmod(0o755)  # whatever the umask says
        return os.open(run / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RefusedError(f"open {run / name}", error.errno or 0) from None


def holder(descriptor: int, start: int = 0, length: int = 0) -> int | None:
    """The process that has a lock of fcntl(2) on these bytes of a file, without a length to its
    end, or None. Raises OSError."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, *_, process = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else process


def monitor_lock(place: int) -> str:
    """The name of the file whose lock the monitor at a place holds; 0 is the log's."""
    return f"monitor-{place}.lock"
