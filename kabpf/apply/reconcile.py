"""Brings what is in the kernel in line with the policy files."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kabpf.apply import retrofit, transient
from kabpf.errors import NotUpdatedError, RefusedError
from kabpf.kernel import abi, loading
from kabpf.kernel.cgroups import CgroupTree, add_removed
from kabpf.kernel.crash_recovery import complete
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.kernel.loading import Loader
from kabpf.kernel.walk import Unread
from kabpf.plan import diff
from kabpf.plan.automaton import Automaton
from kabpf.plan.desired import Actual, Plan
from kabpf.plan.resolve import (
    NO_CONTAINERS,
    NONE_KNOWN,
    left_to_kabpfd,
    resolve,
    with_attachments,
)
from kabpf.plan.state import Cgroup, Changes, PolicyRecord, Resolved, record
from kabpf.policy import btf_required
from kabpf.policy.files import Snapshot
from kabpf.policy.model import Policy, Selector
from kabpf.runtime import last_good, notes
from kabpf.runtime.locks import RUN
from kabpf.runtime.notes import Applied

if TYPE_CHECKING:
    from kabpf.apply.containers import Containers, Knowing
    from kabpf.plan import resolve as plan_resolve

# Each pass but the last writes something. Files' changes need four at most: what is new, open
# sockets, and what is stale in two. More are for cgroups that were born while those were written.
PASSES_MAX = 10
SETTLED = 3  # the pass from which cgroups that come and go keep nothing else waiting


@dataclass(frozen=True)
class Resolution:
    """What policies, tree and kernel come to: the plan, and what there is to do for it."""

    automaton: Automaton
    cgroups: dict[int, Cgroup]  # those that are removed included
    removed: frozenset[int]  # of these; sockets of theirs may be there still
    plan: Plan
    actual: Actual
    desired: dict[int, PolicyRecord]  # what the policies make, by policy id
    changes: Changes  # what there was to do; empty where everything was in place
    generation: int  # the number of the plan's globs in the kernel
    left: tuple[str, ...] = ()  # why some open sockets, or some containers, wait still
    # By the ids of their cgroups; none where no selector is of containers.
    containers: plan_resolve.Containers = field(default_factory=dict)
    unknown: frozenset[int] = frozenset()  # cgroups that may be of containers no engine knows
    # Why options that containers ask for do not count, by the ids of their cgroups.
    refusals: dict[int, str] = field(default_factory=dict)
    unread: frozenset[int] = frozenset()  # of them those that there was no time for

    @property
    def present(self) -> dict[int, Cgroup]:
        """The cgroups that are there."""
        return {id: each for id, each in self.cgroups.items() if id not in self.removed}


def open_or_load(
    policies: tuple[Policy, ...],
    tree: CgroupTree,
    loader: Loader | None = None,
    run: Path = RUN,
) -> Dataplane:
    """The data plane, loaded where there is none, and replaced where another version left it, or
    another loader than is asked for: then it is filled before the first connection is measured by
    it.

    Raises PolicyError where the policies ask for more than the loader can do. The caller, who holds
    the lock, reconciles.
    """
    loader = loader or loading.loader(PINS)
    if loader == Loader.BCC:
        if not PINS.exists():
            loading.require_compiler()
        btf_required.require(policies)

    def fill(fresh: Dataplane, *, takes_over: bool) -> None:
        if not fresh.records():
            # Of one that is pinned and not attached, too: its sockets are those of an interval
            # without policy.
            _keep_former(tree, run)
            cgroups = {cgroup.id for cgroup in tree.cgroups()}
            fresh.apply(notes.former(cgroups, run, was_loaded=takes_over))
        notes.forget_applied(run)
        for resolution in _passes(policies, fresh, updates=False) if takes_over else ():
            fresh.apply(resolution.changes)

    loaded = loading.open_or_load(PINS, tree, loader, fill)
    notes.forget_former(run)
    return loaded


def unload(tree: CgroupTree, run: Path = RUN) -> None:
    """Take everything out of the kernel; sockets keep their options. The caller holds the lock."""
    complete(PINS)
    _keep_former(tree, run)
    loading.unload(PINS)


def _keep_former(tree: CgroupTree, run: Path) -> None:
    with suppress(RefusedError), Dataplane(PINS, tree, any_build=True) as loaded:
        notes.keep_former(loaded.actual(), run)


def reconcile(
    snapshot: Snapshot, loaded: Dataplane, run: Path = RUN, engines: Knowing | None = None
) -> Resolution:
    """Bring what is in the kernel in line with policies, open sockets included; under the lock.
    `engines` knows containers in place of this machine's engines.

    Doing it twice changes nothing. A process that dies in between leaves what the next reconcile
    completes. Raises PolicyError where the policies ask for more than this data plane can do,
    RefusedError where the kernel refused something, and NotUpdatedError where all but updates of
    open sockets is active.
    """
    policies = snapshot.policies
    loaded.require_supported(policies)
    sources = {policy.name: str(policy.source) for policy in policies}
    applied = Applied(snapshot.stamp, True, sources, lasting=snapshot.lasting)
    first: Changes | None = None
    left = retrofit.Left()
    # Before the tree is looked at: what is not recorded meanwhile counts as such.
    looked = applied._replace(unrecorded=loaded.totals().unrecorded, looked_at=time.time())
    began = time.monotonic()
    try:
        loaded.check()
        try:
            for resolution in _passes(policies, loaded, engines):
                first = first or resolution.changes
                left = apply(resolution.changes, loaded)
                if left:
                    break
            # What is left stays owed, and keeps nothing from what comes after it.
            for resolution in _passes(policies, loaded, engines, updates=False) if left else ():
                loaded.apply(resolution.changes)
        except RefusedError as error:
            # Open sockets that can't be updated must not keep what comes after them from new ones.
            for resolution in _passes(policies, loaded, engines, updates=False):
                loaded.apply(resolution.changes)
            last_good.keep(snapshot)
            raise NotUpdatedError(str(error)) from None
    except RefusedError as error:
        notes.keep_applied(applied._replace(refused=str(error)), run)
        raise
    refused = "; ".join(filter(None, (left.refused, *_unread(resolution.unread))))
    asks = resolution.plan.asks
    took_s = time.monotonic() - began
    notes.keep_applied(looked._replace(asks=asks, refused=refused, took_s=took_s), run)
    last_good.keep(snapshot)
    # What the daemon keeps of it are former records; the entries of 10,000 cgroups take 8 MiB.
    records = resolution.actual.records.items()
    return replace(
        resolution,
        actual=Actual({id: each for id, each in records if id not in resolution.desired}),
        changes=(first or resolution.changes)._replace(globs=None),
        left=(*left.reasons, *_unread(resolution.unread)),
        containers={},
    )


def _unread(cgroups: Collection[int]) -> tuple[str, ...]:
    if not cgroups:
        return ()
    count = len(cgroups)
    what = "1 container keeps its policy" if count == 1 else f"{count} containers keep theirs"
    return (f"{what}, because podman's database takes too long to read; try: kabpfctl apply",)


def preview(
    policies: tuple[Policy, ...],
    tree: CgroupTree,
    loaded: Dataplane | None,
    engines: Knowing | None = None,
) -> Resolution:
    """What `reconcile` would do first; changes nothing. Raises PolicyError as that does.

    Without the lock: where a command changes records meanwhile, whose ids it also uses again, the
    kernel is looked at again.
    """
    policies = transient.without_former_owners(policies, tree)
    automaton = automaton_of(policies)
    containers = _containers(automaton, tree, engines)
    if loaded is None:
        return _compared(_look(policies, automaton, containers, tree, None))
    loaded.require_supported(policies)
    looked = loaded.between_changes(lambda _: _look(policies, automaton, containers, tree, loaded))
    looked.actual.leave_out_unreadable()
    return _compared(looked, updates=loaded.updates_open_sockets)


def automaton_of(policies: tuple[Policy, ...]) -> Automaton:
    """The automaton of policies; services bring the sockets that systemd's files relate to them."""
    return Automaton(_followed(policies))


def left_of(policies: tuple[Policy, ...], automaton: Automaton | None = None) -> list[Selector]:
    """The selectors whose new cgroups wait for kabpfd once the policies are active, by their
    automaton, where that is there already."""
    followed = _followed(policies)
    return left_to_kabpfd(automaton or Automaton(followed), followed)


def _followed(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    from kabpf.systemd import relations  # here, because run does without

    return relations.followed(policies)


class Resolver(NamedTuple):
    """What finds the policy of a cgroup."""

    automaton: Automaton
    containers: Callable[[Iterable[Cgroup]], plan_resolve.Containers]  # of these cgroups


def resolver(policies: tuple[Policy, ...], tree: CgroupTree) -> Resolver:
    """What finds the policy of a cgroup by these policies, all of which count."""
    automaton = automaton_of(policies)
    containers = _containers(automaton, tree, None)
    return Resolver(automaton, containers.of if containers else lambda _: NO_CONTAINERS)


def apply(
    changes: Changes, loaded: Dataplane, processes: Collection[int] | None = None
) -> retrofit.Left:
    """Write changes, open sockets included; what of these is left."""
    left = retrofit.Left()

    def update() -> frozenset[int]:
        nonlocal left
        left = retrofit.update(changes.updates, loaded.pins, loaded.tree.mount, processes)
        return left.cgroups

    loaded.apply(changes, update)
    return left


def _refusals(automaton: Automaton, containers: plan_resolve.Containers) -> dict[int, str]:
    if not containers:
        return {}
    from kabpf.plan.containers import refusals  # here, because most machines do without

    return refusals(automaton.containers, containers)


def _containers(
    automaton: Automaton, tree: CgroupTree, engines: Knowing | None
) -> Containers | None:
    """What looks up containers, if a selector is of them."""
    if automaton.containers is None:
        return None
    from kabpf.apply import containers  # here, because most machines do without

    return containers.Containers(tree, engines)


def _passes(
    policies: tuple[Policy, ...],
    loaded: Dataplane,
    engines: Knowing | None = None,
    *,
    updates: bool = True,
) -> Iterator[Resolution]:
    """Looks at policies, tree and kernel, until there is nothing left to do but for cgroups that
    come and go, whose births the kernel resolves, or asks about; the caller applies each one's
    changes before it asks for the next."""
    policies = transient.without_former_owners(policies, loaded.tree)
    automaton = automaton_of(policies)
    containers = _containers(automaton, loaded.tree, engines)
    updates = updates and loaded.updates_open_sockets
    known, looked = NONE_KNOWN, None
    for number in range(PASSES_MAX):
        if looked is None:
            looked = _look(policies, automaton, containers, loaded.tree, loaded, known)
            if containers is None:  # which may be known a moment later
                known = looked.plan.cgroups
        settles = number >= SETTLED
        resolution = _compared(looked, updates=updates, settles=settles)
        yield resolution
        if not resolution.changes or (settles and _come_and_go(resolution)):
            return
        again = containers is None and loaded.sees_births
        looked = _looked_again(looked, resolution.changes, loaded) if again else None


def _come_and_go(resolution: Resolution) -> bool:
    """Whether all that was to do were cgroups that the kernel did not have, or has no more."""
    changes, known = resolution.changes, resolution.actual.cgroups
    return changes.is_of_cgroups and not changes.updates and not changes.cgroups.keys() & known


class _Looked(NamedTuple):
    """What is in the kernel and in the tree, and the plan for it."""

    automaton: Automaton
    actual: Actual
    cgroups: dict[int, Cgroup]
    removed: frozenset[int]
    plan: Plan
    containers: plan_resolve.Containers
    unknown: frozenset[int]
    unread: frozenset[int]


def _look(
    policies: tuple[Policy, ...],
    automaton: Automaton,
    containers: Containers | None,
    tree: CgroupTree,
    loaded: Dataplane | None,
    known: Mapping[int, Resolved] = NONE_KNOWN,
) -> _Looked:
    # First the map, then the tree: the other way round a cgroup born in between would look like one
    # that is gone.
    actual = loaded.actual() if loaded else Actual()
    unread = Unread()
    cgroups = {cgroup.id: cgroup for cgroup in tree.cgroups(unread)}
    # Last: what was removed until it was looked at is among them.
    removed = loaded.removed() if loaded else {}
    add_removed(cgroups, removed)
    found = containers.of(cgroups.values()) if containers else NO_CONTAINERS
    plan = resolve(policies, automaton, cgroups.values(), abi.BIRTHS, found, known)
    unread_containers = frozenset(containers.unread if containers else ())
    if loaded:
        _settle_differences(loaded, actual, cgroups, plan)
        missing = frozenset(actual.cgroups.keys() - cgroups.keys())
        # Which of them are gone is not known, or of those that are removed, where they were.
        unreached = missing if unread else missing & removed.keys()
        # Nor what containers are that nobody was asked about: they keep what they have.
        plan = replace(plan, unreached=unreached | _inside(unread_containers, cgroups))
        if loaded.needs_pins_per_cgroup:
            plan = with_attachments(plan, cgroups)
    outlived = frozenset(cgroups.keys() & removed.keys())
    unknown = frozenset(containers.unknown if containers else ())
    return _Looked(automaton, actual, cgroups, outlived, plan, found, unknown, unread_containers)


def _looked_again(before: _Looked, changes: Changes, loaded: Dataplane) -> _Looked | None:
    """The same look with what is in the kernel since the changes; None where the tree has to be
    walked again, which takes the longer the more cgroups strangers have made.

    That is where a cgroup was born that the look does not know, as it may have what the changes
    have put an end to; but not where they only removed what no rule for births refers to any more.
    """
    actual = loaded.actual()
    born = actual.cgroups.keys() - before.cgroups.keys()
    if born and not changes.is_of_stale:
        return None
    _settle_differences(loaded, actual, before.cgroups, before.plan)
    unreached = before.plan.unreached | (actual.cgroups.keys() - before.cgroups.keys())
    return before._replace(actual=actual, plan=replace(before.plan, unreached=unreached))


def _inside(tops: frozenset[int], cgroups: dict[int, Cgroup]) -> frozenset[int]:
    """Some cgroups and those below, of `cgroups`, which has parents first."""
    found = {*tops}
    for cgroup in cgroups.values() if tops else ():
        if cgroup.parent_id in found:
            found.add(cgroup.id)
    return frozenset(found)


def _compared(
    looked: _Looked,
    *,
    updates: bool = True,
    settles: bool = False,
) -> Resolution:
    automaton, actual, cgroups, removed, plan, containers, unknown, unread = looked
    desired: dict[int, PolicyRecord] = {}
    try:
        desired = diff.number(map(record, plan.made), actual.records, abi.POLICIES)
        changes = diff.diff(plan, actual, desired, updates=updates, settles=settles)
    except diff.TooManyError:
        changes = diff.forget_former(actual)
        if not changes.stale_records:
            raise RefusedError(
                "too many policies", hint=f"at most {abi.POLICIES - 1} can be active"
            ) from None
    generation = diff.generation(plan, actual)
    return Resolution(
        automaton,
        cgroups,
        removed,
        plan,
        actual,
        desired,
        changes,
        generation,
        containers=containers,
        unknown=unknown,
        refusals=_refusals(automaton, containers),
        unread=unread,
    )


def _settle_differences(
    loaded: Dataplane,
    actual: Actual,
    cgroups: dict[int, Cgroup],
    plan: Plan,
) -> None:
    """Take cgroups that were born or removed between the looks at map and tree for what they are
    now, so that a machine where they come and go all the time is reconciled all the same."""
    gone = actual.cgroups.keys() - cgroups.keys()
    born = cgroups.keys() - actual.cgroups.keys()
    now = loaded.entries(gone | born)
    for id in gone - now.keys():
        del actual.cgroups[id]
    for id in born:
        if id in now:
            actual.cgroups[id] = now[id]
        elif not loaded.tree.has(cgroups[id]):
            del cgroups[id], plan.cgroups[id]
