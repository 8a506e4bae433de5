"""Gives cgroups that were just born what only user space can find out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from kabpf.apply.reconcile import Resolution
from kabpf.kernel import dataplane
from kabpf.kernel.dataplane import Born, Dataplane
from kabpf.plan import diff
from kabpf.plan.resolve import NO_CONTAINERS, resolve_one
from kabpf.plan.state import NONE, Cgroup, CgroupEntry, Changes, Resolved, record
from kabpf.policy.model import is_asked

if TYPE_CHECKING:
    from kabpf.apply.containers import Containers
    from kabpf.containers.facts import Container
    from kabpf.kernel.cgroups import CgroupTree
    from kabpf.plan.containers import Naming


class Handled(NamedTuple):
    """What is left to do for cgroups that were born."""

    # Of those whose open sockets wait for what these say; and their paths.
    owed: dict[int, CgroupEntry]
    paths: tuple[str, ...] = ()
    unplaced: tuple[Born, ...] = ()  # whose parents are not known yet
    refusals: Mapping[int, str] = NONE  # why options that containers ask for do not count


def resolve(
    born: Iterable[Born],
    last: Resolution,
    loaded: Dataplane,
    containers: Containers | None = None,
    may_learn: Callable[[], AbstractContextManager[object] | None] = nullcontext,
) -> Handled | None:
    """Resolve cgroups that the kernel asked about, and what was born below them since; those of
    containers that `containers` knows. New sockets are covered when it returns.

    Updates `last`, which the last reconcile returned. Where that does not know the parent of one,
    the tree is walked, once and inside `may_learn()`, or not if that is None. Returns None where
    there is no room for what containers ask for, or room again, so that a reconcile has to look at
    the whole tree. The caller holds the lock.
    """
    tree, naming = loaded.tree, last.automaton.containers
    refusals: dict[int, str] = {}
    fresh: dict[int, Cgroup] = {}
    unplaced: list[Born] = []
    has_learnt: bool | None = None
    for event in born:
        if event.id in fresh:  # inside one before, as all of a chain but its first
            continue
        if event.parent_id not in last.cgroups and has_learnt is None:
            has_learnt = _learn(last, tree, may_learn())
        parent = last.cgroups.get(event.parent_id)
        if parent is None:
            if not has_learnt:
                unplaced.append(event)
            continue  # it is gone, and what was inside before it
        cgroup = parent.child(event.id, event.name)
        inside = (cgroup, *tree.below(cgroup))
        known = containers.of(inside) if containers else NO_CONTAINERS
        for each in inside:
            fresh[each.id] = last.cgroups[each.id] = each
            above = last.plan.cgroups[each.parent_id]
            last.plan.cgroups[each.id] = resolve_one(
                last.automaton, each, above, known.get(each.id)
            )
        if known:
            refusals |= _refusals(naming, known)
        if naming and any(map(naming.has_no_room, known.values())) and forget_unused(last, loaded):
            return None  # older containers may wait for the room
    now = loaded.entries(fresh)
    resolved = {id: last.plan.cgroups[id] for id in now}
    if not _write_asked(resolved, last, loaded):
        return None
    records = last.actual.records | last.desired
    ids = diff.policy_ids(last.desired)
    changed = diff.changed_entries(
        last.plan, resolved, now, records, ids, last.generation, new=True
    )
    loaded.correct(changed)
    owed = {id: entry for id, entry in changed.items() if entry.owed}
    done = diff.settled(owed, records)
    # A cgroup that has no process even now had no socket before its entry was written. Of others
    # the sockets are open, or there are none: it is too young for any that processes passed on.
    busy = {id: entry for id, entry in done.items() if tree.is_populated(fresh[id])}
    if busy:
        have_sockets = {one.cgroup_id for one in dataplane.holders(loaded.pins)}
        busy = {id: entry for id, entry in busy.items() if id in have_sockets}
    loaded.correct({id: entry for id, entry in done.items() if id not in busy})
    paths = tuple(fresh[id].path for id in busy)
    return Handled({id: owed[id] for id in busy}, paths, tuple(unplaced), refusals)


def forget_unused(last: Resolution, loaded: Dataplane) -> bool:
    """Remove the policies that containers have asked for and none has any more, or has had: it
    ended before its entry was looked at. Whether there were any. The caller holds the lock."""
    naming = last.automaton.containers
    if naming is None or not naming.asked:
        return False
    asked = {id for id, each in last.desired.items() if is_asked(each.name)}
    _, used = loaded.entries_with(())
    records = loaded.records()  # another command may have given an id away
    unused = {id for id in asked - used if records.get(id) == last.desired[id]}
    for id in unused:
        del last.desired[id]
    over = naming.asked.keys() - {each.name for each in last.desired.values()}
    naming.forget(over)
    loaded.apply(Changes(stale_records=tuple(unused)))
    return bool(over)


def _write_asked(resolved: Mapping[int, Resolved], last: Resolution, loaded: Dataplane) -> bool:
    """Write the policies that containers have asked for, which nobody had before; whether there is
    room for them."""
    known = diff.policy_ids(last.desired)
    asked = {
        each.policy.name: record(each.policy)
        for each in resolved.values()
        if each.policy and each.policy.name not in known
    }
    if not asked:
        return True
    records = dict(zip(loaded.free_records(), asked.values(), strict=False))
    if len(records) < len(asked):
        return False
    loaded.apply(Changes(records))
    last.desired.update(records)
    return True


def _refusals(naming: Naming | None, known: Mapping[int, Container]) -> dict[int, str]:
    from kabpf.plan.containers import refusals  # here, because most machines do without

    return refusals(naming, known)


def _learn(
    last: Resolution, tree: CgroupTree, permit: AbstractContextManager[object] | None
) -> bool:
    """Add cgroups that were born since and had nobody asked, as the slice of a pod: a reconcile
    would take far longer. The kernel has given them their entries."""
    if permit is None:
        return False
    with permit:
        for cgroup in tree.cgroups():
            above = last.plan.cgroups.get(cgroup.parent_id)
            if above is not None and cgroup.id not in last.cgroups:
                last.cgroups[cgroup.id] = cgroup
                last.plan.cgroups[cgroup.id] = resolve_one(last.automaton, cgroup, above)
    return True
