"""What it takes to resolve births; tests/kernel/test_namespaces.py has what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from kabpf.apply import births
from kabpf.kernel.dataplane import Born
from kabpf.plan.automaton import Automaton
from kabpf.plan.desired import Plan
from kabpf.plan.resolve import resolve_one
from kabpf.plan.state import Cgroup, CgroupEntry

ROOT = Cgroup(1, 0, "/")


class Tree:
    """A chain of cgroups below the root, which counts those that it is asked for."""

    def __init__(self, ids: range) -> None:
        self.ids = ids
        self.looks = 0

    def below(self, cgroup: Cgroup) -> Iterator[Cgroup]:
        for id in self.ids:
            if id > cgroup.id:
                self.looks += 1
                cgroup = cgroup.child(id, "x")
                yield cgroup


class Kernel:
    """A data plane that has an entry for every cgroup."""

    def __init__(self, tree: Tree) -> None:
        self.tree: Any = tree

    def entries(self, ids: Iterable[int]) -> dict[int, CgroupEntry]:
        return {id: CgroupEntry(0, 0) for id in ids}

    def correct(self, entries: dict[int, CgroupEntry]) -> None:
        """Write nothing."""


def test_chain_of_births_takes_one_walk() -> None:
    """Whoever makes cgroups inside each other faster than they are resolved keeps the daemon, which
    has the lock, no longer than with others."""
    tree = Tree(range(2, 302))
    automaton = Automaton(())
    plan = Plan(cgroups={ROOT.id: resolve_one(automaton, ROOT, None)})
    last: Any = SimpleNamespace(
        automaton=automaton,
        cgroups={ROOT.id: ROOT},
        plan=plan,
        actual=SimpleNamespace(records={}),
        desired={},
        generation=0,
    )
    loaded: Any = Kernel(tree)
    found = births.resolve([Born(id, id - 1, "x") for id in tree.ids], last, loaded)
    assert found and not found.unplaced
    assert last.cgroups.keys() == {ROOT.id, *tree.ids} == plan.cgroups.keys()
    assert tree.looks == len(tree.ids) - 1
