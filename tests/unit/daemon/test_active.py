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
from kabpf.apply.births import Owed
from kabpf.apply.transient import Ending
from kabpf.daemon import new_containers
from kabpf.daemon.active import ActivePolicies
from kabpf.daemon.container_requests import ContainerRequests, _cgroup
from kabpf.daemon.late_containers import WAITS_S
from kabpf.daemon.new_containers import NewContainers
from kabpf.errors import NotUpdatedError, RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Born
from kabpf.policy.files import Snapshot
from kabpf.policy.model import Until
from kabpf.runtime import notes

LATE = Born(7, 1, "libpod-" + 64 * "a")


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


def test_held_socket_does_not_have_the_next_birth_look_at_all_cgroups(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of cgroups stays so: entries are written, though sockets are not updated."""

    def held(*_: object) -> None:
        raise NotUpdatedError("process 5 holds a socket")

    monkeypatch.setattr(births, "resolve", lambda *_: Owed({}))
    monkeypatch.setattr(births, "update", held)
    monkeypatch.setattr(active.dataplane, "hear_births", lambda: True)
    last: Any = SimpleNamespace(cgroups={})
    active._last = last
    with pytest.raises(NotUpdatedError):
        active.resolve_births(lambda: False)
    assert active._last is last


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
