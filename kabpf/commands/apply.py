"""kabpfctl apply: activates the policy files."""

from __future__ import annotations

import argparse

from kabpf import live, output
from kabpf.apply import dropins, reconcile, transient
from kabpf.kernel import cgroups, mountinfo
from kabpf.policy import files
from kabpf.runtime import pidlock
from kabpf.runtime.locks import locked


def apply(arguments: argparse.Namespace) -> int:
    """Activate the policy files."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with live.working("applying the policy files"), locked():
        transient.prune(tree)
        snapshot = files.snapshot(files.SYSTEM)
        with reconcile.open_or_load(snapshot.policies, tree, arguments.loader) as loaded:
            resolution = dropins.activate(snapshot, loaded)
    output.warn(resolution.left)
    active = {
        "policies": len(resolution.plan.made),
        "covered": output.covered_count(resolution),
        "cgroups": len(resolution.present),
    }
    result = {**active, "changes": output.changes_json(resolution)}
    if any(policy.log for policy in snapshot.policies):
        pidlock.wait_for_log()
    return output.answer(arguments, result, output.active_text(**active))
