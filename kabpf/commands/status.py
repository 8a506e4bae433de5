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

from kabpf import (
    cgroups,
    dataplane,
    files,
    language,
    loading,
    output,
    presence,
    reconcile,
    unsupported,
)
from kabpf import sockets as tcp
from kabpf.cgroups import CgroupTree
from kabpf.comparison import compare
from kabpf.dataplane import Dataplane
from kabpf.errors import PolicyError, RefusedError
from kabpf.loading import Loader
from kabpf.plan import Needs, Record, record
from kabpf.policy import Policy, options_json, warnings
from kabpf.presets import presets as preset_table


def check(arguments: argparse.Namespace) -> int:
    """Check policy files; needs no root."""
    results: list[dict[str, Any]] = []
    loader = arguments.loader or loading.loader(dataplane.PINS)
    if arguments.files:
        for name in arguments.files:
            results.append(_checked(name, partial(_read_alone, Path(name)), loader))
    else:
        results.append(_checked("policy files", partial(files.load, files.SYSTEM), loader))
    if arguments.json:
        print(json.dumps(results, indent=2))
    for result in results:
        for warning in result["warnings"]:
            print(f"warning: {output.shown(warning)}", file=sys.stderr)
        if result["errors"]:
            print("\n".join(map(output.shown, result["errors"])), file=sys.stderr)
        elif not arguments.json:
            count = output.count(len(result["policies"]), "policy", "policies")
            warned = output.count(len(result["warnings"]), "warning")
            print(f"{result['file']}: ok, {count}{f', {warned}' if result['warnings'] else ''}")
    return 1 if any(result["errors"] for result in results) else 0


def _checked(name: str, read: Callable[[], tuple[Policy, ...]], loader: Loader) -> dict[str, Any]:
    result: dict[str, Any] = {"file": name, "policies": [], "errors": [], "warnings": []}
    try:
        found = read()
        if loader == Loader.BCC:
            unsupported.require(found)
    except PolicyError as error:
        return result | {"errors": list(error.findings)}
    return result | {"policies": [each.name for each in found], "warnings": warnings(found)}


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
                "options": options_json(found.rules.options),
                **_conditions_json(record(found)),
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


def _conditions_json(found: Record) -> dict[str, Any]:
    return {
        "mode": str(found.mode),
        "direction": str(found.direction),
        "loopback": found.loopback,
        "existing": found.existing,
        "log": "sockets" if found.log else "off",
        "destinations": found.digest != 0,
    }


def presets(arguments: argparse.Namespace) -> int:
    """List the presets, with the options that they give."""
    known = preset_table().values()
    result = [
        {
            "preset": each.name,
            "timeout_s": each.timeout_s,
            "idle_s": each.idle_s,
            "interval_s": each.interval_s,
            "probes": each.probes,
            "after": each.after,
            "source": each.source,
        }
        for each in known
    ]
    rows = [
        (
            each.name,
            f"{each.timeout_s}s",
            f"{each.idle_s}s",
            f"{each.interval_s}s",
            str(each.probes),
            each.after,
            each.source,
        )
        for each in known
    ]
    heads = ("PRESET", "TIME-OUT", "IDLE", "INTERVAL", "PROBES", "AFTER-IT", "SOURCE")
    if arguments.json:
        return output.answer(arguments, {"presets": result}, "")
    output.print_table(heads, rows)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Show what is in force, and what it did."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    with _opened(tree) as loaded:
        found = compare(tree, loaded)
        records = loaded.records() if loaded else {}
        used: Counter[int] = loaded.usage() if loaded else Counter()
        counters = loaded.counters(records) if loaded else {}
        totals = loaded.totals() if loaded else dataplane.Totals(0, 0)
        needs = loaded.needs() if loaded else Needs()
    in_force = sorted(
        (record.name, id, record)
        for id, record in records.items()
        if used[id] or record.name in found.sources
    )
    pid = presence.running()
    result: dict[str, Any] = {
        "loaded": loaded is not None,
        "interrupted": loading.is_interrupted(dataplane.PINS),
        "cgroup2": str(tree.mount),
        "pins": str(dataplane.PINS),
        "loader": str(loading.loader(dataplane.PINS)),
        "kernel": {"release": os.uname().release, "btf": loading.BTF.exists()},
        "watched": needs._asdict(),
        "daemon": pid,
        "new_cgroups_wait": found.asks and not pid,
        "policy_files": {
            "policies": len(found.sources),
            "errors": found.errors,
            "applied": found.applied,
        },
        "refused": found.refused,
        "totals": vars(totals),
    }
    if arguments.json:
        policies = [
            {
                "policy": name,
                **_conditions_json(record),
                "options": options_json(record.options),
                "cgroups": used[id],
                "counters": vars(counters[id]),
                "source": found.sources.get(name),
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
                found.sources.get(name, "no file any more"),
            )
            for name, id, record in in_force
        ]
        heads = (
            *("POLICY", "CGROUPS", "MODE", *output.OPTION_HEADS, "MORE"),
            *(*output.COUNTER_HEADS, "FROM"),
        )
        print()
        output.print_table(heads, rows)
    return 0


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
        yield "  connections are looked at before the SYN, because a policy gives SYN retries"
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
        yield "policy files: wrong; the last good ones stay in force"
        yield from (f"  {output.shown(finding)}" for finding in policy_files["errors"])
    elif status["refused"]:
        yield "policy files: in force, except for what the kernel refused"
        yield f"  {output.shown(status['refused'])}"
    elif policy_files["applied"]:
        yield f"policy files: {'in force' if policy_files['policies'] else 'none'}"
    else:
        yield "policy files: not in force as they are now; kabpfctl apply does it"


def sockets(arguments: argparse.Namespace) -> int:
    """List the TCP sockets of the machine with their options; without root, what inet_diag says."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    is_root = os.geteuid() == 0
    cgroup = None if arguments.cgroup is None else tree.find(arguments.cgroup).path
    wanted = tcp.Filter(cgroup, arguments.unit, arguments.policy, arguments.without_keepalive)
    with _opened(tree) if is_root else contextlib.nullcontext() as opened:
        loaded = opened if opened and opened.reaches_open_sockets else None
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
        sources = compare(tree, loaded).sources if loaded else {}
    if not loaded:
        reason = "the data plane is not loaded; kabpfctl apply does it" if is_root else "not root"
        if opened:
            reason = "it takes BTF, which the bcc loader does without"
        print(f"kabpfctl: options are not shown: {reason}", file=sys.stderr)
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
    words = []
    for setter in ("policy", "former policy", "application"):
        options = [option for option, found in one.set_by.items() if found == setter]
        names = ", ".join(option.removesuffix("_ms").removesuffix("_s") for option in options)
        if options and setter == "policy":
            words.append(f"{one.policy} ({sources.get(one.policy or '', 'no file any more')})")
        elif options:
            words.append(f"{setter} ({names})")
    return ", ".join(words) or "system"


@contextlib.contextmanager
def _opened(tree: CgroupTree) -> Iterator[Dataplane | None]:
    loaded = loading.open_if_loaded(dataplane.PINS, tree)
    with loaded or contextlib.nullcontext():
        yield loaded
