"""What the daemon does where a step fails; tests/kernel/test_daemon.py has it in the kernel."""

from __future__ import annotations

import contextlib
import json
import select
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kabpf.apply import births, single, transient
from kabpf.apply.births import Handled
from kabpf.apply.transient import Ending
from kabpf.daemon import new_containers
from kabpf.daemon.active import ActivePolicies
from kabpf.daemon.container_requests import ContainerRequests, _cgroup
from kabpf.daemon.late_containers import WAITS_S
from kabpf.daemon.new_containers import NewContainers
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Born
from kabpf.policy.files import Snapshot
from kabpf.policy.model import Until
from kabpf.runtime import notes
from kabpf.runtime.pace import Pace

ORPHAN = Born(8, 99, "x")
LATE = Born(7, 1, "libpod-" + 64 * "a")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ActivePolicies]:
    """A daemon's policies, of which a selector is of containers, beside a data plane of nothing."""
    requests = ContainerRequests(tmp_path)
    monkeypatch.setattr(new_containers, "ContainerRequests", lambda: requests)
    tree, poll = CgroupTree(tmp_path), select.epoll()
    one = ActivePolicies(tree, poll, lambda: None)
    one._locked = lambda: contextlib.nullcontext()  # type: ignore[assignment]
    one.files.good = Snapshot("", ())
    one.containers = NewContainers(tree, poll)
    dataplane: Any = SimpleNamespace(
        loaded=object(),
        hear_births=lambda: False,
        take_births=list,
        has_lost_births=lambda: False,
    )
    one.dataplane = dataplane
    yield one
    one.containers.close()
    one.ends.close()
    poll.close()


def test_late_container_is_not_due_for_ever_where_nothing_can_be_written(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure is one of its few looks: the daemon does not go round without a rest."""

    def refused(*_: object) -> None:
        raise RefusedError("write kabpf_cgroups")

    monkeypatch.setattr(active, "_reconcile", refused)
    assert active.containers
    active.containers.looked([LATE], {LATE.id})
    looks = 0
    while active.containers.due is not None and looks <= len(WAITS_S):
        time.sleep(max(0.0, active.containers.due - time.monotonic()))
        with pytest.raises(RefusedError):
            active.resolve_births(lambda: False)
        looks += 1
    assert looks == len(WAITS_S)


def test_look_at_everything_for_births_has_a_pace(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the kernel drop births all the time keeps the daemon busy for a part of it; who
    waits for a birth that is to be resolved is not forgotten."""
    looks = 0

    def look(*_: object) -> None:
        nonlocal looks
        looks += 1
        active._last, active._unplaced, active._is_late = None, [], False

    clock = Clock()
    active._looks = Pace(clock)
    monkeypatch.setattr(active, "_reconcile", look)
    monkeypatch.setattr(active.dataplane, "hear_births", lambda: True)
    monkeypatch.setattr(active.dataplane, "take_births", lambda: [LATE])
    active._looks.due = clock.now + 1
    for _ in range(3):
        active.resolve_births(lambda: False)
    assert looks == 0
    assert active._looks.due in active.due  # and nothing sooner
    clock.now += 1
    monkeypatch.setattr(active.dataplane, "hear_births", lambda: False)
    active.resolve_births(lambda: False)
    assert looks == 1
    assert {*active.due} == {None}


def test_birth_without_a_parent_waits_for_a_look_at_the_tree(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps no other birth waiting; the look has its pace."""
    given: list[list[Born]] = []
    waiting = [ORPHAN]

    def resolve(born: list[Born], *rest: Any) -> Handled:
        given.append(born)
        return Handled({}, (), () if rest[-1]() else tuple(waiting))

    clock = Clock()
    active._looks = Pace(clock)
    active._looks.due = clock.now + 1
    last: Any = SimpleNamespace(cgroups={})
    active._last = last
    monkeypatch.setattr(births, "resolve", resolve)
    monkeypatch.setattr(active.dataplane, "hear_births", lambda: True)
    monkeypatch.setattr(active.dataplane, "take_births", lambda: [ORPHAN])
    active.resolve_births(lambda: False)
    monkeypatch.setattr(active.dataplane, "take_births", lambda: [LATE])
    active.resolve_births(lambda: False)
    assert given == [[ORPHAN], [ORPHAN, LATE]]
    monkeypatch.setattr(active.dataplane, "hear_births", lambda: False)
    active.resolve_births(lambda: False)
    assert len(given) == 2
    clock.now += 1
    monkeypatch.setattr(active.dataplane, "take_births", list)
    active.resolve_births(lambda: False)
    assert given[2:] == [[ORPHAN]]
    assert {*active.due} == {None} and active._last is last


def test_directory_that_is_none_does_not_end_the_daemon(
    active: ActivePolicies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with it is said where files are read."""
    (tmp_path / "policy.d").touch()
    monkeypatch.setattr(transient, "RUNTIME", tmp_path / "policy.d")
    assert not active.is_any_over()


def test_file_that_changes_after_files_were_read_does_not_count_as_applied(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is noted after policies were taken back is the stamp of the files that were read."""
    kept: list[Any] = []
    monkeypatch.setattr(single, "forget", lambda *_: True)
    monkeypatch.setattr(notes, "keep_pruned", lambda *given: kept.append(given[:2]))
    over = {"kabpf-run-1-00000000": Ending(Until("/kabpf-run-1-00000000", 7))}
    active._take_back(over, "before", Snapshot("read", ()))
    assert kept == [("before", "read")]


@pytest.mark.parametrize(
    ("path", "found"), [("/a\udcff", "/a\udcff"), ("/a\ud800", ""), ("/a\0", ""), ("a", "")]
)
def test_path_of_a_request_is_one_that_a_file_may_have(path: str, found: str) -> None:
    """JSON may have half a surrogate pair; of those the ones that stand for bytes are names."""
    assert _cgroup(json.dumps({"cgroup": path}).encode()) == found
