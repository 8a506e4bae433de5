"""Users' policies in the kernel.

Each is bound to a cgroup by its id, and what is below inherits it; no selector has a part in that.
So what users attach and detach takes a look at entries, and at the tree below one cgroup: however
many cgroups others have made, a request takes no longer, and root's commands do not wait for it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kabpf.apply import retrofit
from kabpf.apply.reconcile import Resolver
from kabpf.apply.retrofit import Left
from kabpf.errors import RefusedError
from kabpf.kernel import abi, loading
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.plan import diff
from kabpf.plan.resolve import resolve_at, resolve_one
from kabpf.plan.state import Cgroup, CgroupEntry, Changes, PolicyRecord, record
from kabpf.policy.model import Policy
from kabpf.runtime import notes
from kabpf.runtime.locks import RUN
from kabpf.runtime.pidlock import tell_changed

# Below a cgroup that is attached for the first time. What is made there later inherits the policy
# without a look at it, and what is attached already is found by its entries.
BELOW_MAX = 4096

PASSES_MAX = 10  # of which each but the last finds cgroups that were born during the one before

_NAME = re.compile(r"user-[0-9]+-([0-9]+)")


class Attached(NamedTuple):
    """A cgroup, and the policy that is attached to it."""

    cgroup: Cgroup
    policy: Policy  # as the resolver has it
    resolver: Resolver


def activate(
    policies: Iterable[Policy],
    loaded: Dataplane,
    tree: CgroupTree,
    paths: Mapping[int, str],
    attached: Attached | None = None,
    *,
    again: bool = False,
) -> dict[int, CgroupEntry] | None:
    """Bring the entries of cgroups in line with users' policies, under the lock; those that are
    owed the update of open sockets, for `update`; None where it takes a reconcile, as what comes
    in the place of a policy is not known.

    `policies` are all that count, and `paths` those of the cgroups, by id, whose policies go; with
    `again` a process may have been killed half-way. Raises RefusedError, before anything is
    written, where a cgroup that is attached has no entry, or too many are below.
    """
    records = loaded.records()
    wanted = {record(policy).kept: policy for policy in policies}
    over = {
        id: int(match[1])
        for id, each in records.items()
        if (match := _NAME.fullmatch(each.name)) and each not in wanted
    }
    tops = {**over}  # ids of cgroups by their policies'
    successors: dict[int, int] = {}  # and the other way round
    for id, each in records.items():
        if (policy := wanted.get(each)) and policy.until and policy.owner is not None:
            successors[policy.until.id] = id
            tops[id] = policy.until.id
    below: list[Cgroup] | None = None
    if attached and (not _is_covered(attached.cgroup, tops, loaded) or again):
        below = _below(attached.cgroup, tree, is_bounded=not again)
    if attached and attached.cgroup.id not in successors:
        successors[attached.cgroup.id] = _written(record(attached.policy), records, loaded)
    owed: dict[int, CgroupEntry] = {}
    found: dict[int, CgroupEntry] = {}
    used: set[int] = set()
    for _ in range(PASSES_MAX):
        if over:
            found, used = loaded.entries_with(over)
        else:
            loaded.attached()  # every mkdir that began before has ended
        heirs = _heirs(over, successors, loaded, tree, paths) if found else {}
        moved = {
            id: diff.with_policy(entry, heirs[entry.policy_id], records)
            for id, entry in found.items()
            if entry.policy_id in heirs
        }
        if attached and below is not None:
            moved |= _taken(attached, below, successors[attached.cgroup.id], records, loaded)
            below = _below(attached.cgroup, tree, is_bounded=False)
        if not moved:
            if found:
                return None
            break
        loaded.correct(moved)
        owed |= {id: entry for id, entry in moved.items() if entry.owed}
    loaded.apply(Changes(stale_records=tuple(over.keys() - used)))
    if again:  # what that process had written already
        owed = loaded.owed()
    return owed


def update(
    owed: Mapping[int, CgroupEntry],
    tree: CgroupTree,
    lock: contextlib.AbstractContextManager[None],
    processes: Iterable[int] | None = (),
) -> tuple[str, ...]:
    """Update the open sockets of cgroups that are owed it, without the lock, so that root's
    commands need not wait for a socket that somebody holds; what is done is written under `lock`,
    if that comes. What is not done stays owed, and kabpfd finds it; why it is not done.
    `processes` are as those of `retrofit.update`.

    Raises RefusedError where no socket could be updated.
    """
    if not owed:
        return ()
    left = retrofit.update(owed, PINS, tree.mount, processes)
    settle(owed, left, tree, lock)
    return left.reasons


def settle(
    owed: Mapping[int, CgroupEntry],
    left: Left,
    tree: CgroupTree,
    lock: contextlib.AbstractContextManager[None],
) -> None:
    """Write, under `lock`, if that comes, that open sockets were updated but for those that are
    left."""
    with contextlib.suppress(RefusedError), lock, loading.opened(PINS, tree) as loaded:
        if loaded is None:
            return
        now = loaded.entries(owed.keys() - left.cgroups)
        done = {id: entry for id, entry in now.items() if entry == owed[id]}
        loaded.correct(diff.settled(done, loaded.records()))
        applied = notes.read_applied(RUN)
        if applied and left.refused and not applied.refused:
            notes.keep_applied(applied._replace(refused=left.refused), RUN)
            tell_changed()


def _is_covered(cgroup: Cgroup, tops: Mapping[int, int], loaded: Dataplane) -> bool:
    """Whether a user's policy for this very cgroup is active on it."""
    entry = loaded.entries([cgroup.id]).get(cgroup.id)
    if entry is None:
        raise RefusedError(
            f"{cgroup.path} was made when kabpf had no room for more cgroups",
            hint="ask an administrator to run: kabpfctl apply",
        )
    return tops.get(entry.policy_id) == cgroup.id


def _below(cgroup: Cgroup, tree: CgroupTree, *, is_bounded: bool = True) -> list[Cgroup]:
    most = BELOW_MAX if is_bounded else abi.CGROUPS
    found = list(itertools.islice(tree.each_below(cgroup), most + 1))
    if is_bounded and len(found) > BELOW_MAX:
        raise RefusedError(
            f"{cgroup.path} has more than {BELOW_MAX} cgroups inside",
            hint="attach it before they are made, or ask an administrator",
        )
    return found


def _written(fresh: PolicyRecord, records: dict[int, PolicyRecord], loaded: Dataplane) -> int:
    id = loaded.free_record()
    if id is None:
        raise RefusedError(
            "too many policies are remembered", hint="ask an administrator to run: kabpfctl apply"
        )
    loaded.apply(Changes({id: fresh}))
    records[id] = fresh
    return id


def _taken(
    attached: Attached,
    below: list[Cgroup],
    policy_id: int,
    records: Mapping[int, PolicyRecord],
    loaded: Dataplane,
) -> dict[int, CgroupEntry]:
    """The entries of the cgroup, and of those below that inherit its policy, which have another."""
    automaton, containers = attached.resolver
    resolved = {attached.cgroup.id: resolve_at(automaton, attached.cgroup, containers)}
    known = containers(below)
    for inside in below:
        above = resolved[inside.parent_id]
        resolved[inside.id] = resolve_one(automaton, inside, above, known.get(inside.id))
    inheriting = [id for id, each in resolved.items() if each.policy is attached.policy]
    return {
        id: diff.with_policy(entry, policy_id, records)
        for id, entry in loaded.entries(inheriting).items()
        if entry.policy_id != policy_id
    }


def _heirs(
    over: Mapping[int, int],
    successors: Mapping[int, int],
    loaded: Dataplane,
    tree: CgroupTree,
    paths: Mapping[int, str],
) -> dict[int, int]:
    """The ids of the policies that come in the place of those that are over: another one of the
    same cgroup, or what is above has, which may be over itself."""
    removed = loaded.removed()
    heirs = {}
    for id, top in over.items():
        if top in successors:
            heirs[id] = successors[top]
        elif top in removed:
            heirs[id] = _policy_of(removed[top].parent_id, loaded)
        elif top in paths and (above := tree.id_above(paths[top])):
            heirs[id] = _policy_of(above, loaded)
    return heirs


def _policy_of(cgroup_id: int, loaded: Dataplane) -> int:
    entry = loaded.entries([cgroup_id]).get(cgroup_id)
    return entry.policy_id if entry else 0
