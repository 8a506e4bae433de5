"""One policy that is added to those that are active, or taken away."""

from __future__ import annotations

from typing import Any

import pytest

from kabpf.apply import single
from kabpf.kernel.cgroups import Removed
from kabpf.plan.state import Cgroup, CgroupEntry, Changes, Needs, PolicyRecord
from kabpf.policy.model import Options, Policy, Rules, Until
from kabpf.policy.yaml import Source
from kabpf.runtime import notes

RUN = Cgroup(7, 1, "/kabpf-run-1-00000000")


class Fake:
    """A data plane with these entries, which keeps what is written."""

    needs_pins_per_cgroup = False

    def __init__(self, entries: dict[int, CgroupEntry]) -> None:
        self.kept = entries

    def entries(self, ids: Any) -> dict[int, CgroupEntry]:
        return {id: self.kept[id] for id in ids if id in self.kept}

    def free_record(self) -> int:
        return 5

    def needs(self) -> Needs:
        return Needs()

    def apply(self, changes: Changes) -> None:
        self.kept |= changes.cgroups

    def correct(self, entries: dict[int, CgroupEntry]) -> None:
        self.kept |= entries

    def records(self) -> dict[int, PolicyRecord]:
        return {5: PolicyRecord(RUN.name, Options()), 6: PolicyRecord("former", Options())}

    def usage(self) -> dict[int, int]:
        return dict.fromkeys(range(9), 0)

    def removed(self) -> dict[int, Removed]:
        return {RUN.id: Removed(1, RUN.name)}


@pytest.fixture(autouse=True)
def no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted beside is no matter here."""
    monkeypatch.setattr(notes, "keep_added", lambda *_: None)
    monkeypatch.setattr(notes, "keep_pruned", lambda *_: None)


def test_cgroup_in_a_container_stays_known_as_such() -> None:
    """Selectors of names go on to say nothing of what is born inside."""
    loaded: Any = Fake({RUN.id: CgroupEntry(32, 4, contained=True)})
    source = Source("/run/kabpf/transient.d/x.yaml", 1)
    until = Until(RUN.path, RUN.id)
    policy = Policy(RUN.name, (), Rules(Options()), source, until=until)
    assert single.add(policy, RUN, loaded, ("", ""))
    assert loaded.kept == {RUN.id: CgroupEntry(32, 5, contained=True)}


def test_removed_cgroup_that_has_no_policy_any_more_is_owed_nothing() -> None:
    """There is no record by which its open sockets could be updated."""
    loaded: Any = Fake({1: CgroupEntry(0, 0), RUN.id: CgroupEntry(0, 5, owed=True, was=(6,))})
    assert single.forget({RUN.name}, loaded, ("", ""))
    assert loaded.kept[RUN.id] == CgroupEntry(0, 0, was=(6,), forgot=True)
