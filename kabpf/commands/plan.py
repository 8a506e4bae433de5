"""kabpfctl plan: which cgroup gets what, and what apply would do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kabpf import output, tables
from kabpf.apply import reconcile
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.dataplane import PINS
from kabpf.observe import containers, sockets
from kabpf.plan.resolve import left_text
from kabpf.plan.state import Cgroup, record
from kabpf.policy import files
from kabpf.policy.model import Policy, options_json


def plan(arguments: argparse.Namespace) -> int:
    """Show which cgroup gets what, and what apply would do."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    policies = files.load(files.SYSTEM)
    with loading.opened(PINS, tree) as loaded:
        resolution = reconcile.preview(policies, tree, loaded)
    left = list(map(left_text, reconcile.left_of(policies, resolution.automaton)))
    covered = output.covered(resolution)
    rows = (
        {
            "cgroup": cgroup.path,
            "container": containers.as_json(cgroup.path),
            "policy": policy.name,
            "source": str(policy.source),
            "options": options_json(policy.rules.options),
            **output.conditions_json(record(policy)),
        }
        for cgroup, policy in covered
    )
    result = {
        "cgroups": output.Streamed(rows, len(covered)),
        "resolved_by_kabpfd": left,
        "changes": output.changes_json(resolution),
    }
    if arguments.json:
        return output.answer(arguments, result, "")
    if covered:
        print_list(covered, is_wide=arguments.wide)
    for text in left:
        print(output.shown(text))
    print(f"apply would change: {output.changes_text(resolution)}")
    return 0


COLUMNS = tables.columns("UNIT~", "POLICY~", "OPTIONS~~")
WIDE = tables.columns("CGROUP", "POLICY", "MODE", *output.OPTION_HEADS, "OTHER", "SOURCE")


def print_list(covered: Sequence[tuple[Cgroup, Policy]], *, is_wide: bool = False) -> None:
    """Print a line for each cgroup."""
    cells, columns = (_wide_cells, WIDE) if is_wide else (_cells, COLUMNS)
    rows = output.Made(lambda: (cells(cgroup.path, policy) for cgroup, policy in covered))
    output.print_table(columns, rows, is_wide=is_wide)


def _cells(path: str, policy: Policy) -> tuple[str, ...]:
    name = tables.shortened(sockets.name(path))
    return name, policy.name, output.options_cell(policy.rules.options)


def _wide_cells(path: str, policy: Policy) -> tuple[str, ...]:
    return (
        tables.shortened(path),
        policy.name,
        str(policy.rules.mode),
        *output.option_cells(policy.rules.options),
        output.other_cell(record(policy)),
        str(policy.source),
    )
