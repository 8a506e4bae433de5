"""kabpfctl sockets: the TCP sockets of the machine with their options."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from kabpf import output, tables
from kabpf.apply.drift import compare
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.dataplane import PINS
from kabpf.observe import sockets as tcp
from kabpf.policy.model import ON_SOCKETS
from kabpf.systemd import names


def sockets(arguments: argparse.Namespace) -> int:
    """List the TCP sockets of the machine with their options; without root, what inet_diag says."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    is_root = os.geteuid() == 0
    cgroup = None
    if arguments.cgroup is not None:
        cgroup = names.find(tree, arguments.cgroup).path
    units = None if arguments.unit is None else names.covered_by(arguments.unit)
    selection = tcp.Filter(cgroup, units, arguments.policy, arguments.without_keepalive)
    with loading.opened(PINS, tree) if is_root else contextlib.nullcontext() as opened:
        loaded = opened if opened and opened.lists_sockets else None
        policies = {id: each.name for id, each in loaded.records().items()} if loaded else {}
        if selection.policy is not None and selection.policy not in policies.values():
            raise RefusedError(
                f"policy {selection.policy} is not active" if is_root else "--policy needs root",
                hint="try: kabpfctl status" if is_root else "",
            )
        left: list[str] = []
        all_sockets = (
            tcp.from_dataplane(loaded, policies, left.append)
            if loaded
            else tcp.from_inet_diag(tree)
        )
        listed = sorted(
            filter(selection, all_sockets),
            key=lambda one: (one.cgroup or "", one.local, one.peer),
        )
        sources = compare(tree, loaded).sources if loaded else {}
    output.warn(left)
    if not loaded:
        reason = "the data plane is not loaded; try: kabpfctl apply" if is_root else "needs root"
        if opened:
            reason = "it needs BTF, which the bcc loader does without"
        print(f"kabpfctl: options are not shown: {reason}", file=sys.stderr)
    if arguments.json:
        result = [_socket_json(one, sources) for one in listed]
        return output.answer(arguments, {"sockets": result}, "")
    print_list(listed, sources, is_wide=arguments.wide)
    return 0


COLUMNS = tables.columns("UNIT~", "LOCAL~", "PEER~", "KEEPALIVE", "+NEXT", "SET BY|")
SEVERAL = tables.columns("UNIT~", "NETNS", "LOCAL~", "PEER~", "KEEPALIVE", "+NEXT", "SET BY|")
WIDE = tables.columns(
    *("CGROUP", "NETNS", "LOCAL", "PEER", "STATE", "KEEPALIVE"),
    *(*output.OPTION_HEADS, "+NEXT", "SET BY"),
)


def print_list(listed: list[tcp.Socket], sources: dict[str, str], *, is_wide: bool) -> None:
    """Print a line for each socket."""
    if is_wide:
        rows = [_wide_cells(one, sources) for one in listed]
        output.print_table(WIDE, rows, is_wide=True)
        return
    # Where there are several, addresses may be the same in two of them.
    several = len({one.namespace for one in listed}) > 1
    rows = [
        (
            where(one, one.cgroup and tcp.name(one.cgroup)),
            *((str(one.namespace),) if several else ()),
            *_cells(one),
        )
        for one in listed
    ]
    output.print_table(SEVERAL if several else COLUMNS, rows)


def where(one: tcp.Socket, name: str | None) -> str:
    """The cell for a socket's cgroup, by the name to call it, or None where that is not known."""
    if name is None:
        return "(removed)"
    return f"{name} (removed)" if one.is_removed else name


def _socket_json(one: tcp.Socket, sources: dict[str, str]) -> dict[str, Any]:
    return {
        "cgroup": one.cgroup,
        "cgroup_id": one.cgroup_id,
        "removed": one.is_removed,
        "unit": one.unit,
        "network_namespace": one.namespace,
        "family": one.family,
        "local": one.local._asdict(),
        "peer": one.peer._asdict(),
        "state": one.state,
        "keepalive": one.keepalive,
        **{row.field: getattr(one, row.field) for row in ON_SOCKETS},
        "next_probe_ms": one.next_probe_ms,
        "set_by": one.set_by,
        "policy": one.policy,
        "source": sources.get(one.policy or ""),
    }


def _cells(one: tcp.Socket) -> tuple[str, ...]:
    return (
        str(one.local),
        str(one.peer),
        _keepalive(one),
        _next_probe(one, 0),
        output.UNKNOWN if one.idle_s is None else _setters(one),
    )


def _wide_cells(one: tcp.Socket, sources: dict[str, str]) -> tuple[str, ...]:
    values = [(row, getattr(one, row.field)) for row in ON_SOCKETS]
    return (
        where(one, one.cgroup),
        str(one.namespace),
        str(one.local),
        str(one.peer),
        one.state,
        {None: output.UNKNOWN, True: "on", False: "off"}[one.keepalive],
        *(output.UNKNOWN if value is None else _option(value, row.unit) for row, value in values),
        _next_probe(one, 1),
        output.UNKNOWN if one.idle_s is None else _setters_in_full(one, sources),
    )


def _keepalive(one: tcp.Socket) -> str:
    """What the kernel does for a connection, as one word: 60s/10s/6, or off."""
    if not one.keepalive:
        return output.UNKNOWN if one.keepalive is None else "off"
    if one.idle_s is None:
        return "on"
    return f"{one.idle_s}s/{one.interval_s}s/{one.probes}"


def _option(value: int, unit: str) -> str:
    return output.cell(value or None, unit)  # 0 is no user timeout


def _next_probe(one: tcp.Socket, digits: int) -> str:
    return "-" if one.next_probe_ms is None else f"{one.next_probe_ms / 1000:.{digits}f}s"


# Of tcp.SETTERS, in the order in which they are shown; the system is what nobody else set.
SETTERS = ("policy", "former policy", "application", "unknown")


def _setters(one: tcp.Socket) -> str:
    """Whoever set an option, the policy by its name."""
    words = [setter for setter in SETTERS if setter in one.set_by.values()]
    if words[:1] == ["policy"] and one.policy:
        words[0] = one.policy
    return ", ".join(words) or "system"


def _setters_in_full(one: tcp.Socket, sources: dict[str, str]) -> str:
    words = []
    for setter in SETTERS:
        options = [option for option, by in one.set_by.items() if by == setter]
        names = ", ".join(option.removesuffix("_ms").removesuffix("_s") for option in options)
        if options and setter == "policy":
            words.append(f"{one.policy} ({sources.get(one.policy or '', 'file removed')})")
        elif options:
            words.append(f"{setter} ({names})")
    return ", ".join(words) or "system"
