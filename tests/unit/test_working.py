"""What scripts show while they take long: scripts/working, and who makes people wait."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import pytest
from terminal import Terminal

ROOT = Path(__file__).parents[2]
WORKING = f". {ROOT}/scripts/working; working 'building it' "
WAITS = "sh -c 'read answer; exit 3'"


def test_terminal_is_told_what_takes_long() -> None:
    """Each second, in place; then the line is empty again, and the status is the command's."""
    with Terminal("bash", "-c", f"{WORKING} {WAITS}; echo ended with $?") as terminal:
        while b"building it: 1 s" not in terminal.said:
            assert terminal.read(20)
        terminal.type(b"\n")
        assert terminal.end(20) == 0
        assert terminal.said.rpartition(b"\r\x1b[K")[2] == b"ended with 3\r\n"


def test_pipe_is_told_nothing() -> None:
    """A log has no lines that are drawn over; output and status are the command's."""
    command = ["bash", "-c", f"{WORKING} sh -c 'echo out; exit 3'"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "", 3)


@pytest.mark.parametrize("script", ["scripts/apt", "scripts/package", "scripts/prepare"])
def test_script_that_takes_long_says_so(script: str) -> None:
    """What installs, builds and judges is started by it."""
    assert "working " in (ROOT / script).read_text().replace("/working", "")


def test_trees_are_told_on_the_terminal_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of pytest's has no terminal, and its output is kept."""
    trees = runpy.run_path(str(ROOT / "tests/system/trees.py"))
    ours, theirs = os.openpty()
    monkeypatch.setenv("KABPF_TERMINAL", os.ttyname(theirs))
    with trees["told"]("making trees"):
        assert os.read(ours, 100) == b"\r\r\n== making trees ...\r\r\n"
    assert b"== making trees: done after 0 s" in os.read(ours, 100)
    monkeypatch.setenv("KABPF_TERMINAL", "")
    with trees["told"]("making trees"):
        pass
    os.close(theirs)
    os.close(ours)
