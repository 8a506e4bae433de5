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
                "policy": found.name,
                "source": str(found.source),
                "options": options_json(found.rules.options),
                **output.conditions_json(record(found)),
            }
            for path, found in covered
        ],
        "changes": output.changes_json(resolution),
    }
    rows = [
        (
            output.shown(path),
            found.name,
            str(found.rules.mode),
            *output.option_cells(found.rules.options),
            output.more_cell(record(found)),
            str(found.source),
        )
        for path, found in covered
    ]
    heads = ("CGROUP", "POLICY", "MODE", *output.OPTION_HEADS, "MORE", "FROM")
    table = output.table(heads, rows) if rows else ""
    return output.answer(
        arguments, result, f"{table}apply would change: {output.changes_text(resolution)}"
    )
