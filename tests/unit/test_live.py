"""Rates of a live view, and work that takes long; tests/kernel/test_watch.py has the view."""

from __future__ import annotations

import subprocess
import sys

import pytest
from terminal import Terminal

from kabpf.live import Rates


def test_rate_is_that_of_the_last_ten_seconds() -> None:
    """Unknown at the first look; a count that began anew counts from nothing."""
    clock = iter([0.0, 1.0, 2.0, 13.0, 14.0])
    rates: Rates[str] = Rates(lambda: next(clock))
    rates.note({"a": (100, 7)})
    assert rates.of("a") == ["?", "?"]
    rates.note({"a": (105, 7), "b": (3, 0)})
    assert (rates.of("a"), rates.of("b")) == (["5.0", "0"], ["3.0", "0"])
    rates.note({"a": (4, 7)})
    assert rates.of("a") == ["2.0", "0"]
    rates.note({"a": (1104, 18)})
    assert rates.of("a") == ["100", "1.0"]


WORK = """\
import time
from kabpf import live
with live.working("doing it"):
    time.sleep({})
print("done")
"""


@pytest.mark.parametrize(("seconds", "is_told"), [(0.9, True), (0, False)])
def test_work_that_takes_long_is_told_on_a_terminal(seconds: float, is_told: bool) -> None:
    """What is soon done says nothing; and nothing is left on the line that the result comes on."""
    with Terminal(sys.executable, "-P", "-c", WORK.format(seconds)) as terminal:
        assert terminal.end(30) == 0
        told, _, last = terminal.said.rpartition(b"\r\x1b[K")
        assert (b"doing it: " in told) == is_told
        assert last == b"done\r\n"


def test_pipe_is_not_told_what_takes_long() -> None:
    """A log has no lines that are drawn over."""
    command = [sys.executable, "-P", "-c", WORK.format(0.9)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
