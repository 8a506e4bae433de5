"""kabpfctl status: what is active, and what it did."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from kabpf import output, tables
from kabpf.apply.drift import compare
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, dataplane, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.crash_recovery import is_interrupted
from kabpf.kernel.dataplane import Counters, Dataplane
from kabpf.kernel.loading import Loader
from kabpf.plan.state import Needs, PolicyRecord
from kabpf.policy.model import options_json
from kabpf.runtime import notes, pidlock
from kabpf.runtime.last_good import time_text
from kabpf.runtime.locks import RUN

COLUMNS = tables.columns(
    *("POLICY~", "+CGROUPS", "OPTIONS~~", "+NEW", "+UPDATED", "+TIMED OUT", "+FAILED")
)
WATCHED = tables.columns(  # /S: a second, of the count before it
    *("POLICY~", "+NEW", "+/S", "+UPDATED", "+/S", "+TIMED OUT", "+/S", "+FAILED", "+/S")
)
WIDE = tables.columns(
    *("POLICY", "+CGROUPS", "MODE", *output.OPTION_HEADS, "OTHER"),
    *(*output.COUNTER_HEADS, "SOURCE"),
)


class Row(NamedTuple):
    """A policy that is active, or is to be by the files."""

    name: str
    cgroups: int  # that have it
    record: PolicyRecord
    counters: Counters
    source: str | None  # file and line


def status(arguments: argparse.Namespace) -> int:
    """Show what is active, and what it did; or of one policy all."""
    if arguments.watch:
        from kabpf import live  # here, as in _Watched, because most looks are one

        live.require_alone(arguments)
        live.show(_Watched(arguments.policy), "kabpfctl status")
        return 0
    result, rows = look()
    if arguments.policy is not None:
        rows = _named(rows, arguments.policy)
    if arguments.json:
        return output.answer(arguments, result | {"policies": list(map(_as_json, rows))}, "")
    if arguments.policy is not None:
        output.print_blocks(WIDE, list(map(_wide_cells, rows)))
        return 0
    output.print_lines(_status_lines(result))
    if rows:
        print()
    if rows and arguments.wide:
        output.print_table(WIDE, list(map(_wide_cells, rows)), is_wide=True)
    elif rows:
        output.print_table(COLUMNS, list(map(_cells, rows)))
    return 0


def _named(rows: list[Row], policy: str) -> list[Row]:
    found = [row for row in rows if row.name == policy]
    if not found:
        raise RefusedError(f"policy {policy} is not active", hint="try: kabpfctl status")
    return found


class _Watched:
    """What a live view shows: how often each policy counts."""

    def __init__(self, policy: str | None) -> None:
        from kabpf import live

        self._policy = policy
        self._rates: live.Rates[PolicyRecord] = live.Rates()
        self.rows = 0

    def look(self) -> None:
        """Look at what is active, and what it did since the last look."""
        self._result, found = look()
        self._found = found if self._policy is None else _named(found, self._policy)
        self._rates.note({row.record: _counts(row) for row in self._found})
        self.rows = len(self._found)

    def lines(self, first: int, room: int) -> list[str]:
        """As `status` without --watch has it, with rates."""
        head = output.folded_lines(_status_lines(self._result))
        rows = [self._cells(row) for row in self._found[first : first + room]]
        table = output.fitted(WATCHED, rows).splitlines() if rows else []
        return [*head, "", *table]

    def _cells(self, row: Row) -> tuple[str, ...]:
        pairs = zip(_counts(row), self._rates.of(row.record), strict=True)
        return (row.name, *(text for count, rate in pairs for text in (str(count), rate)))


def look() -> tuple[dict[str, Any], list[Row]]:
    """What is active, as JSON has it but for the policies, and these."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with loading.opened(dataplane.PINS, tree) as loaded:
        return look_at(tree, loaded)


def look_at(tree: CgroupTree, loaded: Dataplane | None) -> tuple[dict[str, Any], list[Row]]:
    """The same of a data plane that is open."""
    comparison = compare(tree, loaded)
    records, used, counters = loaded.between_changes(partial(_read, loaded)) if loaded else _NONE
    totals = loaded.totals() if loaded else dataplane.Totals(0, 0)
    needs = loaded.needs() if loaded else Needs()
    outlived = _outlived(loaded) if loaded else 0
    unrecorded, since = notes.not_recorded(totals.unrecorded, RUN)
    pid = pidlock.running()
    rows = [
        Row(record.name, used[id], record, counters[id], comparison.source(record.name))
        for id, record in sorted(records.items(), key=lambda item: (item[1].name, item[0]))
        if used[id] or record.name in comparison.sources
    ]
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
        "active": {
            "policies": len(rows),
            "covered": used.total() - used[0],
            "cgroups": used.total(),
        },
        "policy_files": {
            "policies": comparison.policies,
            "errors": comparison.errors,
            "wrong_since": comparison.wrong_since,
            "applied": comparison.applied,
        },
        "refused": comparison.refused,
        "not_recorded": {"cgroups": unrecorded, "since": since or None},
        "removed_with_sockets": outlived,
        "totals": {
            "events_dropped": totals.events_dropped,
            "unrecorded": totals.unrecorded,
        },
    }
    return result, rows


_Kernel = tuple[dict[int, PolicyRecord], Counter[int], dict[int, Counters]]
_NONE: _Kernel = ({}, Counter(), {})


def _read(loaded: Dataplane, records: dict[int, PolicyRecord]) -> _Kernel:
    """The policies that are in the kernel, how many cgroups have each, and what each did."""
    return records, loaded.usage(), loaded.counters(records)


def _outlived(loaded: Dataplane) -> int:
    """How many removed cgroups have open sockets still."""
    removed = loaded.removed() if loaded.lists_sockets else {}
    holders = dataplane.holders(loaded.pins) if removed else ()
    return len(removed.keys() & {each.cgroup_id for each in holders})


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "policy": row.name,
        **output.conditions_json(row.record),
        "options": options_json(row.record.options),
        "cgroups": row.cgroups,
        "counters": row.counters._asdict(),
        "source": row.source,
    }


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.cgroups),
        output.options_cell(row.record.options),
        *map(str, _counts(row)),
    )


def _counts(row: Row) -> tuple[int, ...]:
    """NEW, UPDATED, TIMED OUT and FAILED."""
    return (
        row.counters.established,
        row.counters.updated,
        row.counters.timed_out,
        sum(row.counters.failed.values()),
    )


def _wide_cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.cgroups),
        str(row.record.mode),
        *output.option_cells(row.record.options),
        output.other_cell(row.record),
        *output.counter_cells(row.counters),
        row.source or "file removed",
    )


def _status_lines(status: dict[str, Any]) -> Iterator[str]:
    if status["loaded"]:
        where = f"attached to {status['cgroup2']}"
        if status["loader"] == Loader.BCC:
            where = "compiled by bcc, attached to the cgroups that policies name"
        yield f"data plane: {where}, pinned at {status['pins']}"
    else:
        yield "data plane: not loaded; try: kabpfctl apply, or: systemctl start kabpf"
    kernel = status["kernel"]
    yield f"kernel: Linux {kernel['release']}, {'with' if kernel['btf'] else 'without'} BTF"
    if status["watched"]["setsockopt"]:
        yield (
            "  setsockopt(2) is watched, because a policy enforces options, gives a range or logs"
            " sockets"
        )
    if status["watched"]["syn_retries"]:
        yield "  connect(2) is watched, because a policy bounds it"
    if status["interrupted"]:
        yield "  leftover pins of an interrupted command; try: kabpfctl apply"
    if unrecorded := status["not_recorded"]["cgroups"]:
        since = status["not_recorded"]["since"]
        when = f" since {time_text(since)}" if since else ""
        yield (
            f"  {output.count(unrecorded, 'new cgroup')} not recorded{when}, because there were too"
            " many; try: kabpfctl apply"
        )
    if outlived := status["removed_with_sockets"]:
        have = "has" if outlived == 1 else "have"
        yield f"  {output.count(outlived, 'removed cgroup')} still {have} open sockets"
    if status["daemon"]:
        yield f"daemon: running as process {status['daemon']}"
    else:
        yield "daemon: not running"
    if status["new_cgroups_wait"]:
        yield "  some new cgroups wait: containers, or too many globs or rules; try: kabpfctl apply"
    policy_files = status["policy_files"]
    if policy_files["errors"]:
        since = policy_files["wrong_since"]
        wrong = f"wrong since {time_text(since)}" if since else "wrong"
        outcome = "the last good ones stay active" if status["loaded"] else "no policy is active"
        yield f"policy files: {wrong}; {outcome}"
        yield from (f"  {output.shown(finding)}" for finding in policy_files["errors"])
    elif status["refused"]:
        yield "policy files: active, except for what the kernel refused"
        yield f"  {output.shown(status['refused'])}"
    elif policy_files["applied"]:
        active = output.active_text(**status["active"])
        has_any = policy_files["policies"] or status["active"]["policies"]
        yield f"policy files: {active if has_any else 'none'}"
    else:
        yield "policy files: changed since the last apply; try: kabpfctl apply"
