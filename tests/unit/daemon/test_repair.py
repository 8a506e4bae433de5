"""What the daemon does without the lock, beside a kernel of our own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kabpf.apply import retrofit
from kabpf.daemon.active import ActivePolicies
from kabpf.errors import KabpfError, NotUpdatedError, PolicyError, RefusedError
from kabpf.kernel import loading
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import CgroupEntry, PolicyRecord
from kabpf.policy.model import Options
from kabpf.runtime import notes

HELD, FREE = 7, 8  # cgroups that are owed the update
OWED = CgroupEntry(1, 1, owed=True)


class Kernel:
    """A data plane in which two cgroups are owed the update of open sockets."""

    sees_births = True

    def __init__(self) -> None:
        self.held = {HELD}
        self.written: dict[int, CgroupEntry] = {}
        self.is_locked = False
        self.looks = 0  # at everything
        self.begun: list[set[int]] = []
        self.answers: list[tuple[int, str]] = []

    def owes(self) -> bool:
        return bool(self.owed())

    def owed(self) -> dict[int, CgroupEntry]:
        return {id: OWED for id in (HELD, FREE) if id not in self.written}

    def entries(self, ids: set[int]) -> dict[int, CgroupEntry]:
        return {id: entry for id, entry in self.owed().items() if id in ids}

    def records(self) -> dict[int, PolicyRecord]:
        return {1: PolicyRecord("web", Options())}

    def correct(self, entries: dict[int, CgroupEntry]) -> None:
        assert self.is_locked
        self.written |= entries

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        self.is_locked = True
        yield
        self.is_locked = False

    def begin(self, owed: dict[int, CgroupEntry], *_: object) -> int:
        """As retrofit.begin."""
        assert not self.is_locked
        self.begun.append({*owed})
        held = sorted(owed.keys() & self.held)
        left = ["process 5 holds a socket"] if held else []
        ours, theirs = os.pipe()
        self.answers.append((theirs, json.dumps({"refused": "", "cgroups": held, "left": left})))
        return ours

    def answer(self) -> None:
        """As the other process, when it has done what it can."""
        pipe, text = self.answers.pop(0)
        with open(pipe, "w") as stream:
            stream.write(text)

    def look(self, *_: object) -> None:
        assert self.is_locked
        self.looks += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One that kabpf.apply.owned sees."""
    kernel = Kernel()
    monkeypatch.setattr(retrofit, "begin", kernel.begin)
    monkeypatch.setattr(loading, "opened", lambda *_: contextlib.nullcontext(kernel))
    monkeypatch.setattr(notes, "read_applied", lambda _: None)
    return kernel


@pytest.fixture
def active(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[ActivePolicies]:
    """A daemon's policies after a reconcile that left a held socket."""
    with (
        select.epoll() as poll,
        ActivePolicies(CgroupTree(Path("/nowhere")), poll, lambda: None) as active,
    ):
        fake: Any = kernel
        with monkeypatch.context() as patched:
            patched.setattr(active, "_locked", kernel.lock)
            patched.setattr(active, "_prune", dict)
            patched.setattr(active, "_read_again", lambda: None)
            patched.setattr(active, "_activate", kernel.look)
            patched.setattr(active, "_is_open", lambda: True)
            patched.setattr(active.dataplane, "loaded", fake)
            active.problem = NotUpdatedError("process 4 holds a socket")
            yield active


def repair(active: ActivePolicies, kernel: Kernel) -> None:
    active.repair()
    assert not active.settle_updates()  # begins it
    kernel.answer()
    assert active.settle_updates()


def test_held_socket_is_waited_for_without_the_lock(active: ActivePolicies, kernel: Kernel) -> None:
    """What is done is written under it; nothing else is looked at before all is done."""
    repair(active, kernel)
    assert kernel.written.keys() == {FREE}
    assert (str(active.problem), kernel.looks) == ("process 5 holds a socket", 0)
    kernel.held.clear()
    repair(active, kernel)
    assert kernel.written.keys() == {HELD, FREE}
    assert kernel.looks == 1


def test_nobody_waits_for_an_update(active: ActivePolicies, kernel: Kernel) -> None:
    """While one is under way the daemon goes on; what comes meanwhile is one more after it."""
    poll = active._poll
    active.updates.add({HELD: OWED}, {1})
    assert not active.settle_updates()
    for cgroup in (FREE, HELD):
        active.updates.add({cgroup: OWED}, {2})
        assert not active.settle_updates()
        assert poll.poll(0) == []
    assert kernel.begun == [{HELD}]
    kernel.answer()
    assert poll.poll(0)
    assert active.settle_updates() and not active.settle_updates()
    assert kernel.begun == [{HELD}, {HELD, FREE}]
    kernel.answer()
    assert active.settle_updates()
    assert kernel.written.keys() == {FREE}
    assert poll.poll(0) == [] and active.updates.due is None


def test_wrong_file_keeps_no_open_socket_waiting(active: ActivePolicies, kernel: Kernel) -> None:
    """It stays the problem, which only another file mends."""
    wrong: KabpfError = PolicyError("a.yaml:1: no")
    active.problem = wrong
    assert active.needs_repair()
    repair(active, kernel)
    assert kernel.written.keys() == {FREE}
    assert active.problem is wrong and kernel.looks == 0


def test_update_that_is_never_answered_is_given_up(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one whose process was killed waited for."""
    monkeypatch.setattr(retrofit, "ANSWER_S", -1)
    active.repair()
    assert not active.settle_updates()
    assert active.settle_updates()
    assert "update open sockets" in str(active.problem)


def test_update_whose_process_ends_unasked_is_refused(
    active: ActivePolicies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did not read resets the connection, which is no error of the daemon's."""
    ours, theirs = socket.socketpair()
    ours.sendall(b"{}")
    theirs.close()
    monkeypatch.setattr(retrofit, "begin", lambda *_: ours.detach())
    active.repair()
    assert not active.settle_updates()
    assert active.settle_updates()
    assert "update open sockets" in str(active.problem)


def test_refused_update_is_tried_again(
    active: ActivePolicies, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays a problem of open sockets alone."""

    def refuse(*_: object) -> int:
        raise RefusedError("no way in")

    monkeypatch.setattr(retrofit, "begin", refuse)
    active.repair()
    assert active.settle_updates()
    assert isinstance(active.problem, NotUpdatedError) and str(active.problem) == "no way in"
    monkeypatch.setattr(retrofit, "begin", kernel.begin)
    repair(active, kernel)
    assert kernel.written.keys() == {FREE}


@pytest.mark.parametrize("what", ["births", "files"])
def test_what_else_waits_is_not_put_off(
    active: ActivePolicies, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A held socket keeps the daemon from no look at everything that is due for another reason."""
    if what == "births":  # no kernel tells of them
        monkeypatch.setattr(kernel, "sees_births", False)
    else:
        active._owes_reload = True
        monkeypatch.setattr(active, "_read", lambda: None)
    active.repair()
    assert kernel.looks == 1
