"""What sessions and workers share: made, used and removed by several at once."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import harness
import pytest
import shared

ROOT = Path(__file__).parents[2]

# Takes a directory and lets go of it again and again; it has to be there each time, meanwhile.
HOLDER = """
import os, sys
from pathlib import Path
import shared
path = Path(sys.argv[1])
for _ in range(300):
    with shared.directory(path):
        before = os.stat(path).st_ino
        os.sched_yield()
        assert os.stat(path).st_ino == before
"""

HOLDER_IN_BASH = """
set -e
. "$0/scripts/directories"
for n in {1..100}; do
    hold_directory "$1"
    [ -d "$1" ]
    let_go "$1"
done
"""


def test_directory_is_there_for_all_and_goes_with_the_last(tmp_path: Path) -> None:
    """Python's and bash's take turns with each other at any moment."""
    path = tmp_path / "kabpf"
    python = [sys.executable, "-c", HOLDER, path]
    bash = ["bash", "-c", HOLDER_IN_BASH, ROOT, path]
    environment = {**os.environ, "PYTHONPATH": str(Path(shared.__file__).parent)}
    running = [subprocess.Popen(one, env=environment) for one in (python, python, bash, bash)]
    assert [one.wait() for one in running] == [0] * 4
    assert not path.exists()


def test_first_to_go_leaves_it_to_the_others(tmp_path: Path) -> None:
    """Whoever made it; the last one removes it."""
    path = tmp_path / "kabpf"
    first, second = shared.directory(path), shared.directory(path)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert path.is_dir()
    second.__exit__(None, None, None)
    assert not path.exists()


def test_directory_that_goes_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    """What another has just removed does not count as the directory."""
    path = tmp_path / "kabpf"
    path.mkdir()
    leaving = os.open(path, os.O_RDONLY)
    fcntl.flock(leaving, fcntl.LOCK_EX)
    command = [sys.executable, "-c", HOLDER, path]
    environment = {**os.environ, "PYTHONPATH": str(Path(shared.__file__).parent)}
    with subprocess.Popen(command, env=environment) as waiting:
        while not re.search(f"-> FLOCK +ADVISORY +READ +{waiting.pid} ", _locks()):
            assert waiting.poll() is None
            time.sleep(0.01)
        path.rmdir()
        os.close(leaving)
    assert waiting.returncode == 0


def _locks() -> str:
    return Path("/proc/locks").read_text()


@pytest.mark.parametrize("what", ["older", "filled"])
def test_directory_of_others_stays(tmp_path: Path, what: str) -> None:
    """One that was there before, and one that was filled meanwhile, as by the package."""
    path = tmp_path / "kabpf"
    if what == "older":
        path.mkdir()
    with shared.directory(path):
        if what == "filled":
            (path / "policy.d").mkdir()
    assert path.is_dir()
    assert bool(path.stat().st_mode & stat.S_ISVTX) == (what == "filled")


def test_set_up_is_made_once(tmp_path: Path) -> None:
    """The others have what the first one made."""
    made = [shared.once(tmp_path / "package", lambda n=n: f"made {n}") for n in range(3)]
    assert made == ["made 0"] * 3


def test_set_up_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    """The first one fails with the whole reason, the others with its first line."""
    tries = []

    def make() -> str:
        tries.append(1)
        raise RuntimeError("apt: no foo\nand much more")

    failures = []
    for _ in range(3):
        with pytest.raises(pytest.fail.Exception) as failed:
            shared.once(tmp_path / "package", make)
        failures.append(failed.value)
    reasons = ["apt: no foo\nand much more", "apt: no foo", "apt: no foo"]
    assert list(map(str, failures)) == reasons
    assert [hasattr(one, "failed_in") for one in failures] == [False, True, True]
    assert len(tries) == 1


@pytest.fixture
def apt(tmp_path: Path) -> list[str]:
    """`scripts/apt update` of lists of its own, which are empty."""
    (tmp_path / "lists/partial").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    (tmp_path / "sources.list").touch()
    places = {
        "State::Lists": "lists",
        "Etc::SourceList": "sources.list",
        "Etc::SourceParts": "none",
    }
    options = [f"-oDir::{name}={tmp_path / place}" for name, place in places.items()]
    return [str(ROOT / "scripts/apt"), *options, "update"]


@pytest.mark.skipif(os.geteuid() != 0, reason="it needs root")
def test_apt_waits_for_another(tmp_path: Path, apt: list[str]) -> None:
    """While another apt has the lists locked nothing is said, and afterwards it is done."""
    with open(tmp_path / "lists/lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(apt, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(1.5)  # apt itself gives up at once
        assert waiting.poll() is None
    said, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, said) == (0, b"")


@pytest.mark.skipif(os.geteuid() != 0, reason="it needs root")
def test_apt_says_last_why_it_failed() -> None:
    """What apt says is shown where it fails, and its error again in the last line."""
    command = [ROOT / "scripts/apt", "install", "--simulate", "kabpf-there-is-no-such-package"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 100
    problem = "Unable to locate package kabpf-there-is-no-such-package"
    assert f"E: {problem}\n" in done.stderr
    assert done.stderr.endswith(f": {problem}\n")


def test_turn_within_a_turn_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that several tests share has one, and somebody may wait for its end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order: list[str] = []

    def be_alone() -> None:
        with harness.alone():
            order.append("alone")

    def be_beside_again() -> None:
        with harness.beside_others():
            order.append("beside")

    with harness.beside_others():
        waiting = threading.Thread(target=be_alone, daemon=True)
        waiting.start()
        harness.wait_until(lambda: _is_locked(tmp_path / "kabpf-tests.queue"), "who waits")
        within = threading.Thread(target=be_beside_again, daemon=True)
        within.start()
        within.join(5)
        assert order == ["beside"]
    waiting.join(5)
    assert order == ["beside", "alone"]


def test_tests_that_are_alone_keep_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the first one that is not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        harness.stay_alone()
        assert _is_locked(tmp_path / "kabpf-tests.lock")
    with harness.beside_others(), harness.alone():  # no other turn to wait for
        assert _is_locked(tmp_path / "kabpf-tests.lock")
    harness.let_others_in()
    assert not _is_locked(tmp_path / "kabpf-tests.lock")
    harness.let_others_in()


def _is_locked(path: Path) -> bool:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
