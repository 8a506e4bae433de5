"""Measures kabpf against its budgets, prints the table and writes it as JSON; bench/run starts it.

A benchmark is not a test: a missed budget is a line in the table, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import births
import connections
import containers
import daemon
import monitor
import retrofit
import scale
from machine import Machine, cgroup

import kabpf


class Row(NamedTuple):
    """A figure and, where there is one, its budget; both in `unit`."""

    what: str
    figure: float
    unit: str
    budget: float | None = None
    at_least: bool = False
    doubt: str = ""  # why the figure can't be held against the budget

    @property
    def met(self) -> bool | None:
        if self.budget is None or self.doubt:
            return None
        return self.figure >= self.budget if self.at_least else self.figure <= self.budget


LATE_MS = 20  # that a container without a hook may be without its policy

Section = tuple[dict[str, Any], list[Row]]  # all that was measured, and what is shown of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path, help="a directory with the program sockets")
    parser.add_argument("cgroup", type=Path, help="the cgroup to make and to work in")
    parser.add_argument("results", type=Path, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="measure less")
    arguments = parser.parse_args()
    machine = Machine(arguments.scratch, arguments.cgroup, arguments.quick)
    rows: list[Row] = []
    measured: dict[str, Any] = {}
    foreign = machine.foreign_programs()
    with cgroup(machine.cgroup):
        for name, measure in (
            ("connections", _connections),
            ("retrofit", _retrofit),
            ("daemon", _daemon),
            ("births", _births),
            ("mkdirs", _mkdirs),
            ("containers", _containers),
            ("scale", _scale),
            ("monitor", _monitor),
        ):
            print(f"   {name}", flush=True)
            measured[name], found = measure(machine)
            rows += found
            foreign = max(foreign, machine.foreign_programs())
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "kernel": os.uname().release,
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "kabpf": kabpf.__version__,
        "libdontdie": _version("libdontdie0"),
        "quick": machine.quick,
        "foreign_programs": foreign,
    }
    print(_text(about, rows))
    table_json = [row._asdict() | {"met": row.met} for row in rows]
    result = {**about, "table": table_json, "measured": measured}
    arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.results}")


def _connections(machine: Machine) -> Section:
    costs = connections.measure(machine)
    added_us = {name: added_ns / 1000 for name, added_ns in costs.added_ns.items()}
    doubt = "" if costs.alone else "not alone"
    none, three = added_us[connections.NO_POLICY.name], added_us[connections.PLAIN.name]
    rounds = {"rounds": [one._asdict() for one in costs.rounds]}
    return costs._asdict() | rounds, [
        Row("connect, accept, close: a cycle of two sockets", costs.bare_ns / 1000, "us"),
        *(
            Row(f"added to it by {each.name}", added_us[each.name], "us")
            for each in connections.VARIANTS
        ),
        Row(
            "kabpf to libdontdie, three options each",
            three / added_us[connections.PRELOADED.name],
            "",
            0.5,
            doubt=doubt,
        ),
        Row("added by kabpf without policy, a socket", none / 2, "us", 0.15, doubt=doubt),
        *(
            Row(
                f"added to {each.name} ({costs.call_ns[each.name]:.0f} ns)",
                costs.added_ns[each.name],
                "ns",
            )
            for each in connections.CALLED
        ),
    ]


def _retrofit(machine: Machine) -> Section:
    costs = retrofit.measure(machine)
    count = f"{costs.sockets:,} open sockets"
    many = f"{connections.DESTINATIONS:,} destinations"

    def rate(what: str, seconds: list[float]) -> Row:
        return Row(what, costs.sockets / statistics.median(seconds), "sockets/s", 1e6, True)

    return costs._asdict(), [
        rate(f"update of {count}", costs.first_s),
        rate("update, another policy", costs.changed_s),
        rate(f"update, to {many}", costs.to_destinations_s),
        rate("update, after four former policies", costs.from_destinations_s),
        Row(f"kabpfctl attach, {count}", costs.attach_s, "s"),
        Row("kabpfctl attach, another policy", costs.attach_changed_s, "s"),
        Row(
            f"kabpfctl audit, {costs.sockets // 2:,} connections",
            statistics.median(costs.audit_s),
            "s",
            1,
        ),
    ]


def _daemon(machine: Machine) -> Section:
    costs = daemon.measure(machine)
    median = statistics.median
    scale = f"{daemon.POLICIES} policies, {daemon.CGROUPS:,} cgroups"
    many = f"{daemon.RELOADS_OF:,} drop-ins"
    doubt = "" if costs.quiet else "cgroups were born meanwhile"
    return costs._asdict(), [
        Row(f"kabpfd start to READY, {scale}", median(costs.start_s), "s", 0.5),
        Row("kabpfd start to READY, policies active already", median(costs.adopt_s), "s", 0.5),
        Row("kabpfd resident", costs.resident_kib / 1024, "MiB", 40),
        Row(f"kabpfd resident, {many}, reloaded", costs.resident_many_kib / 1024, "MiB"),
        Row(f"kabpfd wake-ups in {daemon.IDLE_WINDOW_S} s", costs.wake_ups, "", 0, doubt=doubt),
        Row("kabpfctl status", median(costs.status_s), "s", 0.08),
        Row("kabpfctl verify", median(costs.verify_s), "s", 0.08),
        Row("kabpfctl metrics, 100 policies, 1,000 cgroups", median(costs.metrics_s), "s", 0.1),
        Row("kabpfctl run, added to a command", median(costs.run_s), "s", 0.08),
        Row(f"kabpfd reload, {many}, one changed", median(costs.reload_s), "s", 0.3),
        Row(f"kabpfctl status, {many}", median(costs.status_many_s), "s"),
        Row(f"kabpfctl apply, {many}, nothing loaded", median(costs.apply_cold_s), "s"),
        Row(f"kabpfctl apply, {many}, nothing changed", median(costs.apply_again_s), "s"),
    ]


def _births(machine: Machine) -> Section:
    costs = daemon.measure_births(machine)
    count = len(costs.glob_new_s)
    new_ms = [seconds * 1000 for seconds in costs.glob_new_s]
    first_ms = [seconds * 1000 for seconds in costs.glob_first_s]
    late_by_name = count - costs.literal_first_covered
    late_by_glob = count - costs.glob_first_covered
    return costs._asdict(), [
        Row(f"mkdir to policy, by name: too late, of {count}", late_by_name, "", 0),
        Row(f"mkdir to policy, by glob: too late, of {count}", late_by_glob, "", 0),
        Row("mkdir to policy, by glob", statistics.median(new_ms), "ms", 5),
        Row(f"the same, worst of {count}", max(new_ms), "ms"),
        Row("mkdir to policy, by glob, open connection", statistics.median(first_ms), "ms", 5),
    ]


def _mkdirs(machine: Machine) -> Section:
    costs = births.measure(machine)
    literal_us = (costs.literal_ns - costs.mkdir_ns) / 1000
    globs_us = (costs.globs_ns - costs.mkdir_ns) / 1000
    median = statistics.median
    many = f"{births.MANY:,} templates"
    return costs._asdict(), [
        Row("mkdir of a cgroup, without kabpf", costs.mkdir_ns / 1000, "us"),
        Row("added to a mkdir, one unit's policy", literal_us, "us", 1),
        Row(f"added to a mkdir, {births.TEMPLATES} templates", globs_us, "us", 1.3),
        Row(f"globs of {many}: built", median(costs.built_s), "s", 0.2),
        Row(f"globs of {many}: memory in the kernel", costs.built_bytes / 2**20, "MiB", 8),
        Row(f"kabpfd reload, {many}, one policy changed", median(costs.reload_s), "s", 0.3),
        Row(f"kabpfd reload, {many}, one template changed", median(costs.reload_glob_s), "s", 0.3),
        Row(f"kabpfd resident, {many}, reloaded", costs.resident_kib / 1024, "MiB", 40),
    ]


def _containers(machine: Machine) -> Section:
    costs = containers.measure(machine)
    covered_ms = [seconds * 1000 for seconds in costs.covered_s]
    count = len(covered_ms)
    late = sum(each > LATE_MS for each in covered_ms)
    nobody = "no policy names containers"
    return costs._asdict(), [
        Row(f"{nobody}: modules of engines in kabpfd", costs.imported, "", 0),
        Row(f"{nobody}: sockets for hooks", costs.watched, "", 0),
        Row(f"{nobody}: kabpfd wake-ups for {count}", costs.wake_ups, "", 0),
        Row(f"containers in a row: not covered in {LATE_MS} ms, of {count}", late, "", 0),
        Row("the same, mkdir to policy", statistics.median(covered_ms), "ms"),
        Row("the same, worst", max(covered_ms), "ms"),
        Row(
            f"kabpfctl apply, {containers.MANY:,} containers",
            statistics.median(costs.apply_s),
            "s",
            1,
        ),
    ]


def _scale(machine: Machine) -> Section:
    costs = scale.measure(machine)
    median = statistics.median
    births_ms = [seconds * 1000 for seconds in costs.glob_new_s]
    connected = f"{costs.connections:,} connections"
    large = f"{costs.cgroups:,} cgroups"
    return costs._asdict(), [
        Row(
            f"kabpfd start to READY, {costs.policies:,} policies, {costs.cgroups:,} cgroups",
            median(costs.start_s),
            "s",
        ),
        Row(f"kabpfd start, {large}, policies active already", median(costs.adopt_s), "s"),
        Row(f"kabpfd reload, {large}, one changed", median(costs.reload_s), "s"),
        Row(f"kabpfd resident, {large}", costs.resident_kib / 1024, "MiB"),
        Row(f"kabpfd resident, {large}, reloaded", costs.resident_reloaded_kib / 1024, "MiB"),
        Row(f"kabpfctl status, {large}", median(costs.status_s), "s", 0.15),
        Row(f"kabpfctl apply, {large}, nothing changed", median(costs.apply_again_s), "s"),
        Row(f"kabpfctl sockets, {large}, {connected}", median(costs.sockets_s), "s"),
        Row(f"mkdir to policy, by glob, {large}", median(births_ms), "ms", 5),
        Row(f"the same, worst of {len(births_ms)}", max(births_ms), "ms"),
    ]


def _monitor(machine: Machine) -> Section:
    costs = monitor.measure(machine)
    rows = []
    for form in ("text", "json"):
        of = f"{costs.told[form] + costs.lost[form]:,}"
        rate = costs.connections[form] / len(costs.cycle_ns[form]) / monitor.SECONDS
        rows += [
            Row(f"kabpfctl monitor, {form}: connections watched", rate, "/s"),
            Row(f"kabpfctl monitor, {form}: events lost, of {of}", costs.lost[form], ""),
            Row(f"kabpfctl monitor, {form}: of a processor", costs.busy[form] * 100, "%"),
            Row(
                f"kabpfctl monitor, {form}: added to a connection",
                monitor.added_ns(costs, form),
                "ns",
            ),
        ]
    return costs._asdict(), rows


def _text(about: dict[str, Any], rows: list[Row]) -> str:
    cells = [("what", "figure", "budget", ""), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = [
        "  ".join(
            (what.ljust(widths[0]), figure.rjust(widths[1]), budget.rjust(widths[2]), verdict)
        )
        for what, figure, budget, verdict in cells
    ]
    where = "{date}, Linux {kernel}, {cpus} x {processor}".format(**about)
    notes = []
    if about["foreign_programs"]:
        notes = [f"{about['foreign_programs']} other sock_ops programs ran at the root of the tree"]
    return "\n".join(["", where, *notes, "", *map(str.rstrip, lines), ""])


def _cells(row: Row) -> tuple[str, str, str, str]:
    if row.budget is None:
        return row.what, _number(row.figure, row.unit), "", ""
    budget = f"{'>=' if row.at_least else '<='} {_number(row.budget, row.unit)}"
    return (
        row.what,
        _number(row.figure, row.unit),
        budget,
        row.doubt or ("met" if row.met else "MISSED"),
    )


def _number(value: float, unit: str) -> str:
    whole = isinstance(value, int) or value >= 1000
    return f"{value:,.0f} {unit}".rstrip() if whole else f"{value:.3g} {unit}".rstrip()


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else os.uname().machine


def _commit() -> str:
    """Of the checkout that is measured."""
    root = Path(__file__).parent
    command = ["git", "-c", f"safe.directory={root.parent}", "-C", root, "describe", "--always"]
    done = subprocess.run([*command, "--dirty"], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    command = ["dpkg-query", "-W", "-f", "${Version}", package]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
