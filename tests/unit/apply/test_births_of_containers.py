"""Policies that containers ask for, as their cgroups are born."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from plans import container

from kabpf.apply import births
from kabpf.apply.reconcile import Resolution
from kabpf.kernel.dataplane import Born
from kabpf.plan.automaton import Automaton
from kabpf.plan.containers import ASKED_MAX
from kabpf.plan.desired import Actual
from kabpf.plan.resolve import resolve
from kabpf.plan.state import Cgroup, CgroupEntry, Changes, PolicyRecord
from kabpf.policy import parser

ROOT = Cgroup(1, 0, "/")


class Fake:
    """A data plane that has entries of the cgroups in `alive`, and keeps what is written."""

    def __init__(self, alive: set[int]) -> None:
        self.alive = alive
        self.kept: dict[int, CgroupEntry] = {}
        self.policies: dict[int, PolicyRecord] = {}
        self.looks = 0  # at all entries
        self.records_max = 1000
        self.tree = SimpleNamespace(below=lambda _: [], is_populated=lambda _: False)

    def entries(self, ids: Any) -> dict[int, CgroupEntry]:
        return {id: self.kept.get(id, CgroupEntry(0, 0)) for id in ids if id in self.alive}

    def entries_with(self, _: Any) -> tuple[dict[int, CgroupEntry], set[int]]:
        self.looks += 1
        return {}, {each.policy_id for id, each in self.kept.items() if id in self.alive}

    def records(self) -> dict[int, PolicyRecord]:
        return self.policies

    def free_records(self) -> Iterator[int]:
        return (id for id in range(1, self.records_max) if id not in self.policies)

    def apply(self, changes: Changes) -> None:
        self.policies |= changes.records
        for id in changes.stale_records:
            del self.policies[id]

    def correct(self, entries: dict[int, CgroupEntry]) -> None:
        self.kept |= entries


class Machine:
    """Cgroups that are born, and kabpfd's last look at everything."""

    def __init__(self) -> None:
        policies = parser.combine([parser.parse(b"containers: on\n", "/p.yaml")])
        automaton = Automaton(policies)
        plan = resolve(policies, automaton, [ROOT], 1 << 16)
        self.last = Resolution(
            automaton, {1: ROOT}, frozenset(), plan, Actual(), {}, Changes(), plan.globs_digest
        )
        self.loaded: Any = Fake(set())
        assert automaton.containers
        self.naming = automaton.containers

    def born(
        self, ids: range, *, are_gone: bool = False, ask: bool = True
    ) -> births.Handled | None:
        if not are_gone:
            self.loaded.alive.update(ids)
        found = {id: container({"labels": {"io.kabpf.keepalive": f"idle={id}"}}) for id in ids}
        known: Any = SimpleNamespace(of=lambda some: {each.id: found[each.id] for each in some})
        events = [Born(id, 1, f"docker-{id:064x}.scope") for id in ids]
        return births.resolve(events, self.last, self.loaded, known if ask else None)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_containers_that_are_gone_take_no_room(machine: Machine) -> None:
    """However many end before kabpfd looks at their entries, as those that can't start."""
    assert machine.born(range(1000, 1000 + ASKED_MAX), are_gone=True)
    assert not machine.loaded.policies
    assert machine.born(range(2000, 2001)) is None  # a look at the whole tree decides
    assert machine.naming.asked == {}
    assert machine.born(range(2000, 2001))
    assert [each.name for each in machine.loaded.policies.values()] == ["container:idle=2000s"]


def test_births_that_ask_for_nothing_new_cost_no_look_at_all_entries(machine: Machine) -> None:
    """Where there is no room: any user can make cgroups that kabpfd is asked about."""
    assert machine.born(range(1000, 1000 + ASKED_MAX))
    assert machine.naming.is_full and not machine.loaded.looks
    assert machine.born(range(3000, 3001), ask=False)
    assert machine.born(range(1000, 1001))
    assert not machine.loaded.looks
    assert machine.born(range(3000, 3001)).refusals  # type: ignore[union-attr]
    machine.loaded.alive.discard(1000)
    assert machine.born(range(3001, 3002)) is None
    assert len(machine.loaded.policies) == ASKED_MAX - 1


def test_all_have_their_policies_or_none_is_written(machine: Machine) -> None:
    """As where other commands have taken the ids meanwhile: then a look at everything decides."""
    machine.loaded.records_max = 4
    assert machine.born(range(1000, 1004)) is None
    assert not machine.loaded.policies
    assert machine.born(range(1000, 1003))
    assert [each.name for each in machine.loaded.policies.values()] == [
        f"container:idle={idle}s" for idle in range(1000, 1003)
    ]
