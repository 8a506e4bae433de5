"""kabpfctl apply: puts the policy files in force."""

from __future__ import annotations

import argparse

from kabpf import output
from kabpf.apply import dropins, reconcile, transient
from kabpf.kernel import cgroups, mountinfo
from kabpf.policy import files
from kabpf.runtime import pidlock
from kabpf.runtime.locks import locked


def apply(arguments: argparse.Namespace) -> int:
    """Put the policy files in force."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with locked():
        transient.prune(tree)
        snapshot = files.snapshot(files.SYSTEM)
        with reconcile.open_or_load(snapshot.policies, tree, arguments.loader) as loaded:
            resolution = dropins.put_in_force(snapshot, loaded)
    output.warn(resolution.left)
    result = {
        "policies": len(resolution.plan.policies),
        "cgroups": len(resolution.present),
        "covered": output.covered_count(resolution),
        "changes": output.changes_json(resolution),
    }
    if any(policy.log for policy in snapshot.policies):
        pidlock.wait_for_log()
    in_force = output.count(len(snapshot.policies), "policy", "policies")
    covered = f"{result['covered']} of {output.count(len(resolution.present), 'cgroup')} covered"
    text = f"{in_force} in force, {covered}; changed: {output.changes_text(resolution)}"
    return output.answer(arguments, result, text)
