"""Adds one policy to those that are active, or takes some away, without a look at the others."""

from __future__ import annotations

from collections.abc import Collection

from kabpf.kernel.dataplane import Dataplane
from kabpf.plan.state import Cgroup, CgroupEntry, Changes, Needs, needs_of, record
from kabpf.policy.model import Policy
from kabpf.runtime import notes
from kabpf.runtime.locks import RUN


def add(policy: Policy, cgroup: Cgroup, loaded: Dataplane, stamps: tuple[str, str]) -> bool:
    """Activate one more policy, which is bound to `cgroup`, as `reconcile` would, but look at
    nothing else: no socket of the cgroup is open yet. Under the lock.

    `stamps` are those of the policy files without it and with it. False where it takes `reconcile`.
    """
    entry = loaded.entries([cgroup.id]).get(cgroup.id)
    id = loaded.free_record()
    if entry is None or id is None or loaded.needs_pins_per_cgroup:
        return False
    present = loaded.needs()
    needs = Needs(*map(any, zip(present, needs_of((policy,)), strict=True)))
    loaded.apply(
        Changes(
            {id: record(policy)},
            needs if needs != present else None,
            cgroups={cgroup.id: CgroupEntry(entry.state, id, contained=entry.contained)},
        )
    )
    notes.keep_added(*stamps, policy, RUN)
    return True


def forget(names: Collection[str], loaded: Dataplane, stamps: tuple[str, str]) -> bool:
    """Take back what `add` has activated for cgroups that are gone, and look at nothing else.
    Under the lock. `stamps` are those of the policy files with them and without them. False where
    it takes `reconcile`: a cgroup has one still, or something is on that one may have needed."""
    ids = [id for id, record in loaded.records().items() if record.name in names]
    usage = loaded.usage()
    if any(usage[id] for id in ids) or any(loaded.needs()):
        return False
    _inherit(set(ids), loaded)
    loaded.apply(Changes(stale_records=tuple(ids)))
    notes.keep_pruned(*stamps, names, RUN)
    return True


def _inherit(ids: set[int], loaded: Dataplane) -> None:
    """Give removed cgroups that have policies of these ids what they were in has, until the next
    reconcile finds out what their paths have."""
    removed = loaded.removed()
    entries = loaded.entries(removed)
    corrected = {}
    for id, entry in entries.items():
        if ids.isdisjoint((entry.policy_id, *entry.was)):
            continue
        above, policy_id = id, entry.policy_id
        while policy_id in ids:
            above = removed[above].parent_id if above in removed else 0
            parent = loaded.entries([above]).get(above)
            policy_id = parent.policy_id if parent else 0
        was = tuple(each for each in entry.was if each not in ids)
        owed = entry.owed and policy_id != 0  # without a policy there is nothing to update
        corrected[id] = entry._replace(policy_id=policy_id, owed=owed, was=was, forgot=True)
    loaded.correct(corrected)
