"""The directory /run/kabpf, and the locks in it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kabpf.errors import RefusedError

RUN = Path("/run/kabpf")


@contextmanager
def locked(run: Path = RUN, name: str = "lock") -> Iterator[None]:
    """Hold a lock: "lock" is that under which the kernel's state and the drop-ins of commands
    change."""
    descriptor = open_lock(run, name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_if_free(seconds: float, run: Path = RUN) -> Iterator[None]:
    """Keep commands from changing the state while the block reads it, where those that are at work
    are done within so many seconds; else let them."""
    descriptor = open_lock(run, "lock")
    deadline = time.monotonic() + seconds
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                break
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


def monitor_lock(place: int) -> str:
    """The name of the file whose lock the monitor at a place holds; 0 is the log's."""
    return f"monitor-{place}.lock"
