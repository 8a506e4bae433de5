"""kabpfctl status: what is in force, and what it did."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from kabpf import output
from kabpf.apply.drift import compare
from kabpf.kernel import cgroups, dataplane, loading, mountinfo
from kabpf.kernel.crash_recovery import is_interrupted
from kabpf.kernel.dataplane import Dataplane
from kabpf.kernel.loading import Loader
from kabpf.plan.state import Needs, PolicyRecord
from kabpf.policy.model import options_json
from kabpf.runtime import pidlock
from kabpf.runtime.last_good import time_text


def status(arguments: argparse.Namespace) -> int:
    """Show what is in force, and what it did."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with loading.opened(dataplane.PINS, tree) as loaded:
        comparison = compare(tree, loaded)
        records, used, counters = (
            loaded.between_changes(partial(_read, loaded)) if loaded else _NONE
        )
        totals = loaded.totals() if loaded else dataplane.Totals(0, 0)
        needs = loaded.needs() if loaded else Needs()
    in_force = sorted(
        (record.name, id, record)
        for id, record in records.items()
        if used[id] or record.name in comparison.sources
    )
    pid = pidlock.running()
    result: dict[str, Any] = {
        "loaded": loaded is not None,
        "interrupted": is_interrupted(dataplane.PINS),
        "cgroup2": str(tree.mount),
        "pins": str(dataplane.PINS),
        "loader": str(loading.loader(dataplane.PINS)),
        "kernel": {"release": os.uname().release, "btf": loading.BTF.exists()},
        # Named after the first of the options that are set before the SYN.
        "watched": {"setsockopt": bool(needs.setsockopt), "syn_retries": needs.before_syn},
        "daemon": pid,
        "new_cgroups_wait": comparison.asks and not pid,
        "policy_files": {
            "policies": len(comparison.sources),
            "errors": comparison.errors,
            "wrong_since": comparison.wrong_since,
            "applied": comparison.applied,
        },
        "refused": comparison.refused,
        "totals": {
            "asked_in_vain": totals.events_dropped,
            "unrecorded": totals.unrecorded,
        },
    }
    if arguments.json:
        policies = [
            {
                "policy": name,
                **output.conditions_json(record),
                "options": options_json(record.options),
                "cgroups": used[id],
                "counters": vars(counters[id]),
                "source": comparison.sources.get(name),
            }
            for name, id, record in in_force
        ]
        return output.answer(arguments, result | {"policies": policies}, "")
    print("\n".join(_status_lines(result)))
    if in_force:
        rows = [
            (
                output.shown(name),
                str(used[id]),
                str(record.mode),
                *output.option_cells(record.options),
                output.more_cell(record),
                *output.counter_cells(counters[id]),
                comparison.sources.get(name, "no file any more"),
            )
            for name, id, record in in_force
        ]
        heads = (
            *("POLICY", "CGROUPS", "MODE", *output.OPTION_HEADS, "MORE"),
            *(*output.COUNTER_HEADS, "FROM"),
        )
        print()
        output.print_table(heads, rows, _STACKS)
    return 0


# In 80 columns.
_STACKS = (
    ("POLICY", "FROM"),
    ("MODE", "CGROUPS", "MORE"),
    ("IDLE", "INTERVAL", "PROBES", "USER-TIMEOUT"),
    ("NEW", "LISTENERS", "RETROFITTED", "LEFT"),
    ("SWALLOWED", "LIMITED", "DIED", "FAILED"),
)


_Kernel = tuple[dict[int, PolicyRecord], Counter[int], dict[int, dataplane.Counters]]
_NONE: _Kernel = ({}, Counter(), {})


def _read(loaded: Dataplane) -> _Kernel:
    """The policies that are in the kernel, how many cgroups have each, and what each did."""
    records = loaded.records()
    return records, loaded.usage(), loaded.counters(records)


def _status_lines(status: dict[str, Any]) -> Iterator[str]:
    if status["loaded"]:
        where = f"attached to {status['cgroup2']}"
        if status["loader"] == Loader.BCC:
            where = "compiled by bcc, attached to the cgroups that policies name"
        yield f"data plane: {where}, pinned at {status['pins']}"
    else:
        yield "data plane: not loaded; kabpfctl apply or systemctl start kabpf loads it"
    kernel = status["kernel"]
    yield f"kernel: Linux {kernel['release']}, {'with' if kernel['btf'] else 'without'} BTF"
    if status["watched"]["setsockopt"]:
        yield "  setsockopt(2) is watched, because a policy enforces its options or gives a range"
    if status["watched"]["syn_retries"]:
        yield "  connections are looked at before the SYN, because a policy bounds connect(2)"
    if status["interrupted"]:
        yield "  an interrupted command left pins in force beside it; kabpfctl apply clears up"
    if unrecorded := status["totals"]["unrecorded"]:
        yield f"  {output.count(unrecorded, 'new cgroup')} not recorded, because there are too many"
    if status["daemon"]:
        yield f"daemon: running as process {status['daemon']}"
    else:
        yield "daemon: not running"
    if status["new_cgroups_wait"]:
        yield "  some new cgroups wait for kabpfctl apply: globs within names, or too many rules"
    policy_files = status["policy_files"]
    if policy_files["errors"]:
        since = policy_files["wrong_since"]
        wrong = f"wrong since {time_text(since)}" if since else "wrong"
        outcome = "the last good ones stay in force" if status["loaded"] else "no policy is active"
        yield f"policy files: {wrong}; {outcome}"
        yield from (f"  {output.shown(finding)}" for finding in policy_files["errors"])
    elif status["refused"]:
        yield "policy files: in force, except for what the kernel refused"
        yield f"  {output.shown(status['refused'])}"
    elif policy_files["applied"]:
        yield f"policy files: {'in force' if policy_files['policies'] else 'none'}"
    else:
        yield "policy files: not in force as they are now; kabpfctl apply does it"
