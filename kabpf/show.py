"""kabpfctl's nouns: check, plan, status and sockets read, and change nothing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kabpf import cgroups, daemon, dataplane, files, language, loading, output, reconcile
from kabpf import sockets as tcp
from kabpf.cgroups import CgroupTree
from kabpf.dataplane import Dataplane
from kabpf.errors import PolicyError, RefusedError
from kabpf.policy import Policy


def check(arguments: argparse.Namespace) -> int:
    """Check policy files; needs no root."""
    results: list[dict[str, Any]] = []
    if arguments.files:
        for name in arguments.files:
            results.append(_checked(name, partial(_read_alone, Path(name))))
    else:
        results.append(_checked("policy files", partial(files.load, files.SYSTEM)))
    if arguments.json:
        print(json.dumps(results, indent=2))
    for result in results:
        if result["errors"]:
            print("\n".join(map(output.shown, result["errors"])), file=sys.stderr)
        elif not arguments.json:
            count = output.count(len(result["policies"]), "policy", "policies")
            print(f"{result['file']}: ok, {count}")
    return 1 if any(result["errors"] for result in results) else 0


def _checked(name: str, read: Callable[[], tuple[Policy, ...]]) -> dict[str, Any]:
    try:
        return {"file": name, "policies": [found.name for found in read()], "errors": []}
    except PolicyError as error:
        return {"file": name, "policies": [], "errors": list(error.findings)}


def _read_alone(path: Path) -> tuple[Policy, ...]:
    """One file's policies, with the defaults of the installed files if they can be read."""
    defaults: list[language.PolicyFile] = []
    with contextlib.suppress(PolicyError):
        for installed in files.paths(files.SYSTEM):
            with contextlib.suppress(PolicyError):
                defaults.append(dataclasses.replace(files.read(installed), policies=()))
    return language.combine([*defaults, files.read(path)])


def plan(arguments: argparse.Namespace) -> int:
    """Show which cgroup gets what, and what apply would do."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    with _opened(tree) as loaded:
        resolution = reconcile.preview(files.load(files.SYSTEM), tree, loaded)
    covered = output.covered(resolution)
    result = {
        "cgroups": [
            {
                "cgroup": path,
                "policy": found.name,
                "source": str(found.source),
                "options": output.options_json(found.rules.options),
            }
            for path, found in covered
        ],
        "changes": output.changes_json(resolution),
    }
    rows = [
        (
            output.shown(path),
            found.name,
            *output.option_cells(found.rules.options),
            str(found.source),
        )
        for path, found in covered
    ]
    table = output.table(("CGROUP", "POLICY", *output.OPTION_HEADS, "FROM"), rows) if rows else ""
    return output.answer(
        arguments, result, f"{table}apply would change: {output.changes_text(resolution)}"
    )


def status(arguments: argparse.Namespace) -> int:
    """Show what is in force, and what it did."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    policies, findings = _load_or_findings()
    with _opened(tree) as loaded:
        resolution = reconcile.preview(policies, tree, loaded)
        records = resolution.actual.records
        counters = loaded.counters(records) if loaded else {}
        totals = loaded.totals() if loaded else dataplane.Totals(0, 0)
    used = Counter(entry.policy_id for entry in resolution.actual.cgroups.values())
    sources = {found.name: str(found.source) for found in policies}
    in_force = sorted(
        (record.name, id, record.options)
        for id, record in records.items()
        if used[id] or record.name in sources
    )
    applied = not findings and not (resolution.changes if loaded else policies)
    pid = daemon.running()
    result = {
        "loaded": loaded is not None,
        "interrupted": loading.is_interrupted(dataplane.PINS),
        "cgroup2": str(tree.mount),
        "pins": str(dataplane.PINS),
        "daemon": pid,
        "new_cgroups_wait": resolution.plan.asks and not pid,
        "policy_files": {"policies": len(policies), "errors": findings, "applied": applied},
        "policies": [
            {
                "policy": name,
                "options": output.options_json(options),
                "cgroups": used[id],
                "counters": dataclasses.asdict(counters[id]),
                "source": sources.get(name),
            }
            for name, id, options in in_force
        ],
        "totals": dataclasses.asdict(totals),
    }
    rows = [
        (
            name,
            str(used[id]),
            *output.option_cells(options),
            *output.counter_cells(counters[id]),
            sources.get(name, "no file any more"),
        )
        for name, id, options in in_force
    ]
    heads = ("POLICY", "CGROUPS", *output.OPTION_HEADS, *output.COUNTER_HEADS, "FROM")
    table = f"\n{output.table(heads, rows)}".rstrip() if rows else ""
    return output.answer(arguments, result, "\n".join(_status_lines(result)) + table)


def _status_lines(status: dict[str, Any]) -> Iterator[str]:
    if status["loaded"]:
        yield f"data plane: attached to {status['cgroup2']}, pinned at {status['pins']}"
    else:
        yield "data plane: not loaded; kabpfctl apply or systemctl start kabpf loads it"
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
    files = status["policy_files"]
    if files["errors"]:
        yield "policy files: wrong; the last good ones stay in force"
        yield from (f"  {output.shown(finding)}" for finding in files["errors"])
    elif files["applied"]:
        yield f"policy files: {'in force' if files['policies'] else 'none'}"
    else:
        yield "policy files: not in force as they are now; kabpfctl apply does it"
    yield ""


def sockets(arguments: argparse.Namespace) -> int:
    """List the TCP sockets of the machine with their options; without root, what inet_diag says."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    is_root = os.geteuid() == 0
    cgroup = None if arguments.cgroup is None else tree.find(arguments.cgroup).path
    wanted = tcp.Filter(cgroup, arguments.unit, arguments.policy, arguments.without_keepalive)
    with _opened(tree) if is_root else contextlib.nullcontext() as loaded:
        names = {id: record.name for id, record in loaded.records().items()} if loaded else {}
        if wanted.policy is not None and wanted.policy not in names.values():
            raise RefusedError(
                f"policy {wanted.policy} is not in force" if is_root else "--policy: not root",
                hint="expected one that kabpfctl status shows" if is_root else "expected root",
            )
        found = tcp.from_dataplane(loaded, names, tree) if loaded else tcp.from_inet_diag(tree)
        listed = sorted(
            filter(wanted, found), key=lambda one: (one.cgroup or "", one.local, one.remote)
        )
    if not loaded:
        reason = "the data plane is not loaded; kabpfctl apply does it" if is_root else "not root"
        print(f"kabpfctl: options are not shown: {reason}", file=sys.stderr)
    sources = {each.name: str(each.source) for each in _load_or_findings()[0]} if names else {}
    if arguments.json:
        result = [_socket_json(one, sources) for one in listed]
        return output.answer(arguments, {"sockets": result}, "")
    output.print_table(_SOCKET_HEADS, [_socket_cells(one, sources) for one in listed])
    return 0


_SOCKET_HEADS = (
    *("CGROUP", "LOCAL", "REMOTE", "STATE", "KEEPALIVE", *output.OPTION_HEADS),
    *("NEXT-PROBE", "SET-BY"),
)


def _socket_json(one: tcp.Socket, sources: dict[str, str]) -> dict[str, Any]:
    return {
        "cgroup": one.cgroup,
        "cgroup_id": one.cgroup_id,
        "unit": one.unit,
        "network_namespace": one.namespace,
        "family": one.family,
        "local": one.local._asdict(),
        "remote": one.remote._asdict(),
        "state": one.state,
        "keepalive": one.keepalive,
        "idle_s": one.idle_s,
        "interval_s": one.interval_s,
        "probes": one.probes,
        "user_timeout_ms": one.user_timeout_ms,
        "next_probe_ms": one.next_probe_ms,
        "set_by": one.set_by,
        "policy": one.policy,
        "source": sources.get(one.policy or ""),
    }


def _socket_cells(one: tcp.Socket, sources: dict[str, str]) -> tuple[str, ...]:
    unknown = one.idle_s is None
    return (
        output.shown(one.unit or one.cgroup or "(removed)"),
        str(one.local),
        str(one.remote),
        one.state,
        {None: "-", True: "on", False: "off"}[one.keepalive],
        output.cell(one.idle_s, "s"),
        output.cell(one.interval_s, "s"),
        output.cell(one.probes, ""),
        output.cell(one.user_timeout_ms, "ms") if unknown or one.user_timeout_ms else "off",
        "-" if one.next_probe_ms is None else f"{one.next_probe_ms / 1000:.1f}s",
        "-" if unknown else output.shown(_setters(one, sources)),
    )


def _setters(one: tcp.Socket, sources: dict[str, str]) -> str:
    chosen = [option for option, setter in one.set_by.items() if setter == "application"]
    words = []
    if "policy" in one.set_by.values():
        words.append(f"{one.policy} ({sources.get(one.policy or '', 'no file any more')})")
    if chosen:
        names = [option.removesuffix("_ms").removesuffix("_s") for option in chosen]
        words.append(f"application ({', '.join(names)})")
    return ", ".join(words) or "system"


def _load_or_findings() -> tuple[tuple[Policy, ...], list[str]]:
    try:
        return files.load(files.SYSTEM), []
    except PolicyError as error:
        return (), list(error.findings)


@contextlib.contextmanager
def _opened(tree: CgroupTree) -> Iterator[Dataplane | None]:
    loaded = loading.open_if_loaded(dataplane.PINS, tree)
    with loaded or contextlib.nullcontext():
        yield loaded
