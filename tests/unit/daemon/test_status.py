"""What kabpfd tells systemd and the log: whole texts."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from kabpf.daemon import status
from kabpf.errors import BpfError, KabpfError, NotUpdatedError, PolicyError, RefusedError
from kabpf.kernel import dataplane
from kabpf.kernel.dataplane import Dataplane
from kabpf.policy.files import Snapshot
from kabpf.policy.model import Options, Policy, Rules
from kabpf.policy.yaml import Source
from kabpf.runtime.last_good import time_text


class Loaded:
    """What status asks of a data plane: 2 policies in 3 of 10 cgroups."""

    def usage(self) -> Counter[int]:
        return Counter({0: 7, 1: 2, 2: 1})


LOADED = cast(Dataplane, Loaded())
ONE = Policy("a", (), Rules(Options(True)), Source("a.yaml", 1))
GOOD = Snapshot("stamp", (ONE, ONE, ONE))
WRONG = PolicyError("a.yaml:1: wrong", "b.yaml:2: wrong")
WRONG_SINCE = PolicyError("a.yaml:1: wrong", since=1796012345.6)
REFUSED = RefusedError("attach", 1)
UNTIL_RIGHT = "no policy is active until the policy files are right"
NOT_UPDATED = NotUpdatedError("update open sockets")


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of pins, which is there."""
    monkeypatch.setattr(dataplane, "PINS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("loaded", "good", "problem", "text"),
    [
        (LOADED, GOOD, None, "3 policies active, covering 3 of 10 cgroups"),
        (LOADED, None, None, "2 policies active, covering 3 of 10 cgroups"),
        (None, GOOD, None, "the active policies are of another version of kabpf"),
        (
            LOADED,
            GOOD,
            WRONG,
            "3 policies active, covering 3 of 10 cgroups; errors: 2, and the last good policy"
            " stays active: a.yaml:1: wrong; b.yaml:2: wrong",
        ),
        (
            LOADED,
            GOOD,
            WRONG_SINCE,
            "3 policies active, covering 3 of 10 cgroups; policy files wrong since"
            f" {time_text(1796012345.6)}; errors: 1, and the last good policy stays active:"
            " a.yaml:1: wrong",
        ),
        (
            LOADED,
            GOOD,
            NOT_UPDATED,
            "3 policies active, covering 3 of 10 cgroups; errors: 1: update open sockets",
        ),
    ],
)
def test_text_of_what_is_pinned(
    pins: Path,
    loaded: Dataplane | None,
    good: Snapshot | None,
    problem: KabpfError | None,
    text: str,
) -> None:
    """STATUS= has the counts, and the last problem on the same line."""
    assert status.text(loaded, good, problem) == text


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (None, "no policy is active"),
        (WRONG, "no policy is active; errors: 2: a.yaml:1: wrong; b.yaml:2: wrong"),
        (
            WRONG_SINCE,
            f"no policy is active; policy files wrong since {time_text(1796012345.6)}; errors: 1:"
            " a.yaml:1: wrong",
        ),
    ],
)
def test_text_of_nothing(pins: Path, problem: KabpfError | None, text: str) -> None:
    """Without pins no policy is active, and nothing stays."""
    pins.rmdir()
    assert status.text(None, GOOD, problem) == text


@pytest.mark.parametrize(
    ("problem", "stays", "without"),
    [
        (WRONG, "the last good policy stays active: ", f"{UNTIL_RIGHT}: "),
        (REFUSED, "the last good policy stays active: ", ""),
        (NOT_UPDATED, "", ""),
    ],
)
def test_log_says_what_a_problem_kept(
    pins: Path, problem: KabpfError, stays: str, without: str
) -> None:
    """The log says that the last good policy stays; a policy that only was not given to open
    sockets is active itself, and where nothing is pinned there is none."""
    assert status.of_problem(problem) == f"{stays}{problem}"
    pins.rmdir()
    assert status.of_problem(problem) == f"{without}{problem}"


def test_log_points_to_doctor_where_the_kernel_refused_a_step(pins: Path) -> None:
    """doctor knows which program, limit or right it is about."""
    refused = BpfError("attach kabpf_sockops", errno.E2BIG)
    said = "attach kabpf_sockops: Argument list too long; try: kabpfctl doctor"
    assert status.of_problem(refused) == f"the last good policy stays active: {said}"
    pins.rmdir()
    assert status.of_problem(refused) == said
