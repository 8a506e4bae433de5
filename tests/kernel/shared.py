"""What test sessions share, and the workers of one: directories of the machine, and set-ups.

Any of it may be missing at first, and several may want it, or be done with it, at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def directory(path: Path) -> Iterator[None]:
    """A directory of the machine that is there meanwhile, to mount something on it.

    Everybody holds it by a shared lock. One that is made here has the sticky bit as a mark, and the
    last one to let go of it removes it, unless something was put there. Removing it earlier would
    undo the others' mounts. scripts/directories does the same in bash."""
    held = _hold(path)
    try:
        yield
    finally:
        # Others have it (BlockingIOError), or it is not empty.
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(held).st_mode & stat.S_ISVTX:
                path.rmdir()
        os.close(held)


def _hold(path: Path) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o1755)
        with contextlib.suppress(FileNotFoundError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(held, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held), os.stat(path)):
                    return held
            os.close(held)


def of_this_run(factory: pytest.TempPathFactory) -> Path:
    """A temporary directory that the workers of a run of pytest have in common."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(place: Path, make: Callable[[], str]) -> str:
    """What the first of several workers makes, or why it could not; `place` is a file's name.

    Fails the test with the reason, the others' with its first line, which tests/conftest.py then
    takes for a failure that was reported."""
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failure = place.with_suffix(".failure")
        if failure.exists():
            again = pytest.fail.Exception(failure.read_text(), pytrace=False)
            vars(again)["failed_in"] = "another worker's"
            raise again
        if not place.exists():
            try:
                place.write_text(make())
            except Exception as error:
                failure.write_text(str(error).partition("\n")[0])
                raise pytest.fail.Exception(str(error), pytrace=False) from None
        return place.read_text()
