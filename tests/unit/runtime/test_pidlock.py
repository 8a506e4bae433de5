"""The lock that says that kabpfd runs, and what becomes of it when its file is removed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kabpf.errors import RefusedError
from kabpf.runtime import pidlock
from kabpf.runtime.pidlock import Alone

# A process of its own, as a lock of fcntl(2) is not seen by who holds it.
HOLD = """
import sys; from pathlib import Path; from kabpf.runtime.pidlock import Alone
with Alone(Path(sys.argv[1])) as lock:
    print("held", flush=True)
    for _ in sys.stdin:
        print(lock.renew(), flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory of runtime files, which is not there yet."""
    return tmp_path / "run"


def test_removed_directory_is_made_anew(run: Path) -> None:
    """Who removes it hides the daemon until that has looked; it looks in vain where nothing is
    missing."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin and holder.stdout

        def renewed() -> str:
            print(file=holder.stdin, flush=True)
            return holder.stdout.readline().strip()

        assert holder.stdout.readline() == "held\n"
        assert pidlock.running(run) == holder.pid
        assert renewed() == "False"
        shutil.rmtree(run)
        assert pidlock.running(run) is None
        assert renewed() == "True"
        assert pidlock.running(run) == holder.pid
        assert renewed() == "False"
        with (
            pytest.raises(RefusedError, match=f"is already running as process {holder.pid}"),
            Alone(run),
        ):
            raise AssertionError("there were two")
        holder.stdin.close()
    assert pidlock.running(run) is None


def test_directory_that_can_not_be_made_is_refused(run: Path) -> None:
    """It says which file it is about."""
    with Alone(run) as lock:
        shutil.rmtree(run)
        run.touch()
        with pytest.raises(RefusedError, match=r"open .*/kabpfd\.lock: Not a directory"):
            lock.renew()
