"""What a run of the tests says and does as a whole, whatever runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadgroup")])

SIGNALS = """
import subprocess

def test_child():
    status = subprocess.check_output(["cat", "/proc/self/status"], text=True)
    masks = [line for line in status.splitlines() if line.startswith(("SigIgn", "SigBlk"))]
    assert [int(line.split()[1], 16) for line in masks] == [0, 0]
"""

SKIPS = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_lacking(n):
    pytest.skip("there is no foo" if n else "bar is not installed")
"""

BROKEN = """
import pytest

@pytest.fixture(scope="session")
def broken():
    raise RuntimeError("no foo\\nand much more")

@pytest.mark.parametrize("n", range(4))
def test_depends(broken, n):
    pass
"""

GROUP = """
import os

def test_one():
    print("worker", os.environ["PYTEST_XDIST_WORKER"])

test_two = test_three = test_four = test_five = test_six = test_one
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs pytest with this tree's conftest.py on one file, given its path and text."""

    def start(
        path: str, text: str, *options: str, required: str = "", **how: object
    ) -> subprocess.CompletedProcess[str]:
        tests = tmp_path / "tests"
        (tests / path).parent.mkdir(parents=True)
        (tests / path).write_text(text)
        shutil.copy(CONFTEST, tests)
        # In CI, by either of the two, pytest's summary has whole messages.
        environment = {
            name: value
            for name, value in os.environ.items()
            if "PYTEST" not in name and name not in ("CI", "BUILD_NUMBER")
        }
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull]
        return subprocess.run(
            [*command, f"--rootdir={tmp_path}", "-ra", *options, tests],
            cwd=tmp_path,
            env={**environment, "KABPF_REQUIRE": required, "COLUMNS": "80"},
            capture_output=True,
            text=True,
            **how,
        )

    return start


@WORKERS
def test_children_have_default_signals(run, workers):
    """Also where the run was started with signals ignored and blocked, as nohup and runners do."""

    def ignore():
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    done = run("test_a.py", SIGNALS, *workers, preexec_fn=ignore)
    assert done.returncode == 0, done.stdout


@WORKERS
def test_summary_says_what_was_not_run_and_why(run, workers):
    """One line a tier, the most frequent reason first."""
    done = run("unit/test_a.py", SKIPS, *workers)
    assert done.returncode == 0
    missing = "bar is not installed; try: scripts/apt install bar"
    assert f"\nunit: 3 tests: there is no foo (2) / {missing} (1)\n" in done.stdout


@WORKERS
def test_summary_says_what_would_run_a_tier(run, workers):
    """A tier that was left out has one line, and one says how to have it fail."""
    done = run("matrix/test_a.py", "def test_a(): pass\ndef test_b(): pass\n", *workers)
    assert done.returncode == 0
    assert "\nmatrix: 2 tests: it needs Linux 5.10; try: tests/matrix/run 5.10\n" in done.stdout
    assert "\nKABPF_REQUIRE=matrix makes these failures\n" in done.stdout


def test_set_up_that_failed_is_one_failure(run):
    """Its reason is there once; what depends on it is skipped with the reason's first line."""
    done = run("test_a.py", BROKEN)
    assert done.returncode == 1
    assert done.stdout.count("and much more\n") == 1
    assert "3 skipped, 1 error" in done.stdout
    said = "a set-up failed, see tests/test_a.py::test_depends[0]: no foo"
    assert f"\nunit: 3 tests: {said}\n" in done.stdout


def test_what_depends_on_a_set_up_fails_where_it_is_required(run):
    """Each is a failure, still with one line."""
    text = BROKEN.replace("@pytest.mark.param", "@pytest.mark.system\n@pytest.mark.param")
    text += "\nimport conftest\nconftest.TIERS['system'] = str\n"
    done = run("system/test_a.py", text, required="system")
    assert done.returncode == 1
    assert "4 errors" in done.stdout
    assert done.stdout.count("\na set-up failed, see tests/system/test_a.py") == 3
    assert done.stdout.count("and much more\n") == 1


def test_file_of_a_tier_stays_on_one_worker(run):
    """pytest-xdist heeds the groups that conftest.py makes."""
    text = f"import conftest\nconftest.TIERS['kernel'] = str\n{GROUP}"
    done = run("kernel/test_a.py", text, "-rP", "-n", "3", "--dist", "loadgroup")
    assert done.returncode == 0, done.stdout
    workers = [line for line in done.stdout.splitlines() if line.startswith("worker ")]
    assert len(workers) == 6
    assert len(set(workers)) == 1


def test_groups_begin_in_the_order_of_their_tests(run):
    """Whichever has the most."""
    text = "import pytest\n@pytest.mark.xdist_group('small')\ndef test_first(): print('ran 0')\n"
    text += "@pytest.mark.xdist_group('large')\n@pytest.mark.parametrize('i', [1, 2, 3])\n"
    text += "def test_then(i): print('ran', i)\n"
    done = run("unit/test_a.py", text, "-rP", "-n", "1", "--dist", "loadgroup")
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran == ["ran 0", "ran 1", "ran 2", "ran 3"]
