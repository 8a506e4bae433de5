"""kabpfctl plan: which cgroup gets what, and what apply would do."""

from __future__ import annotations

import argparse

from kabpf import output
from kabpf.apply import reconcile
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.dataplane import PINS
from kabpf.plan.state import record
from kabpf.policy import files
from kabpf.policy.model import options_json


def plan(arguments: argparse.Namespace) -> int:
    """Show which cgroup gets what, and what apply would do."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with loading.opened(PINS, tree) as loaded:
        resolution = reconcile.preview(files.load(files.SYSTEM), tree, loaded)
    covered = output.covered(resolution)
    result = {
        "cgroups": [
            {
                "cgroup": path,
                "policy": policy.name,
                "source": str(policy.source),
                "options": options_json(policy.rules.options),
                **output.conditions_json(record(policy)),
            }
            for path, policy in covered
        ],
        "changes": output.changes_json(resolution),
    }
    rows = [
        (
            output.shown(path),
            policy.name,
            str(policy.rules.mode),
            *output.option_cells(policy.rules.options),
            output.more_cell(record(policy)),
            str(policy.source),
        )
        for path, policy in covered
    ]
    heads = ("CGROUP", "POLICY", "MODE", *output.OPTION_HEADS, "MORE", "FROM")
    if rows and not arguments.json:
        output.print_table(heads, rows, _STACKS)
    return output.answer(
        arguments, result, f"apply would change: {output.changes_text(resolution)}"
    )


# In 80 columns.
_STACKS = (
    ("CGROUP", "FROM"),
    ("POLICY", "MODE", "MORE"),
    ("IDLE", "INTERVAL"),
    ("PROBES", "USER-TIMEOUT"),
)
