"""kabpfctl sockets: the TCP sockets of the machine with their options."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kabpf import live, output, tables
from kabpf.apply.drift import compare
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.observe import containers
from kabpf.observe import sockets as tcp
from kabpf.policy.model import ON_SOCKETS
from kabpf.systemd import names
from kabpf.tables import Column


def sockets(arguments: argparse.Namespace) -> int:
    """List the TCP sockets of the machine with their options; without root, what inet_diag says."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    cgroup = None
    if arguments.cgroup is not None:
        cgroup = names.find(tree, arguments.cgroup).path
    units = None if arguments.unit is None else names.covered_by(arguments.unit)
    selection = tcp.Filter(
        cgroup, units, arguments.policy, arguments.without_keepalive, arguments.container
    )
    if arguments.watch:
        live.require_alone(arguments)
        if arguments.unit is not None:
            names.require_unit(arguments.unit, tree)
        live.show(_Watched(tree, selection), "kabpfctl sockets")
        return 0
    notes: list[str] = []
    with _opened(tree) as loaded:
        listed = look(tree, loaded, selection, notes.append)[:]
        sources = {}
        if loaded and (arguments.json or arguments.wide):
            comparison = compare(tree, loaded)
            policies = {one.policy for one in listed if one.policy}
            found = ((each, comparison.source(each)) for each in policies)
            sources = {name: source for name, source in found if source}
    if arguments.unit is not None and not listed:
        names.require_unit(arguments.unit, tree)
    output.warn(notes)
    if arguments.json:
        result = [_socket_json(one, sources) for one in listed]
        return output.answer(arguments, {"sockets": result}, "")
    print_list(listed, sources, is_wide=arguments.wide)
    return 0


def _opened(tree: CgroupTree) -> AbstractContextManager[Dataplane | None]:
    return loading.opened(PINS, tree) if os.geteuid() == 0 else contextlib.nullcontext()


def look(
    tree: CgroupTree,
    loaded: Dataplane | None,
    selection: tcp.Filter,
    say: Callable[[str], None],
) -> Sequence[tcp.Socket]:
    """The sockets that are asked for; `say` is told what the list lacks."""
    is_root = os.geteuid() == 0
    lists = loaded is not None and loaded.lists_sockets
    policies = tcp.policy_names(loaded) if loaded and lists else {}
    if selection.policy is not None and selection.policy not in policies.values():
        raise RefusedError(
            f"policy {selection.policy} is not active" if is_root else "--policy needs root",
            hint="try: kabpfctl status" if is_root else "",
        )
    if loaded and lists:
        return tcp.Look(loaded, selection, tcp.of_machine(loaded, say))
    reason = "the data plane is not loaded; try: kabpfctl apply" if is_root else "needs root"
    if loaded:
        reason = "it needs BTF, which the bcc loader does without"
    say(f"options are not shown: {reason}")
    return sorted(
        filter(selection, tcp.from_inet_diag(tree)),
        key=lambda one: (one.cgroup or "", one.local, one.peer),
    )


class _Watched:
    """What a live view shows: the sockets, and how many are opened and closed."""

    def __init__(self, tree: CgroupTree, selection: tcp.Filter) -> None:
        self._tree = tree
        self._selection = selection
        self._identities: set[Hashable] | None = None
        self._counts = (0, 0)  # opened and closed since the first look
        self._rates: live.Rates[None] = live.Rates()
        self.rows = 0

    def look(self) -> None:
        """Look at the sockets that there are, and what became of the former ones."""
        self._notes: list[str] = []
        with _opened(self._tree) as loaded:
            self._found = look(self._tree, loaded, self._selection, self._notes.append)
        now = tcp.identities(self._found)
        if self._identities is not None:
            opened, closed = self._counts
            gone = self._identities - now
            self._counts = (opened + len(now - self._identities), closed + len(gone))
        self._identities = now
        self._rates.note({None: self._counts})
        self.rows = len(self._found)

    def lines(self, first: int, room: int) -> list[str]:
        """A line of counts, and the list from a row on."""
        opened, closed = self._rates.of(None)
        without = tcp.without_keepalive(self._found)
        counts = (
            f"{output.count(self.rows, 'socket')}, {without} without keepalive;"
            f" {opened} opened and {closed} closed a second"
        )
        several = tcp.namespaces(self._found) > 1
        page = self._found[first : first + room]
        table = output.fitted(*_table(page, several=several)).splitlines() if page else []
        return [*output.folded_lines([counts, *self._notes]), "", *table]


COLUMNS = tables.columns("UNIT~", "LOCAL~~", "PEER~~", "KEEPALIVE", "+NEXT", "SET BY|")
SEVERAL = tables.columns("UNIT~", "NETNS", "LOCAL~~", "PEER~~", "KEEPALIVE", "+NEXT", "SET BY|")
WIDE = tables.columns(
    *("CGROUP", "NETNS", "LOCAL", "PEER", "STATE", "KEEPALIVE"),
    *(*output.OPTION_HEADS, "+NEXT", "SET BY"),
)


def print_list(listed: Sequence[tcp.Socket], sources: dict[str, str], *, is_wide: bool) -> None:
    """Print a line for each socket."""
    if is_wide:
        rows = [_wide_cells(one, sources) for one in listed]
        output.print_table(WIDE, rows, is_wide=True)
        return
    output.print_table(*_table(listed, several=tcp.namespaces(listed) > 1))


def _table(
    listed: Sequence[tcp.Socket], *, several: bool
) -> tuple[tuple[Column, ...], list[tuple[str, ...]]]:
    """With the network namespaces where there are several: then addresses may be the same in two of
    them."""
    rows = [
        (
            where(one, one.cgroup and tcp.name(one.cgroup)),
            *((str(one.namespace),) if several else ()),
            *_cells(one),
        )
        for one in listed
    ]
    return SEVERAL if several else COLUMNS, rows


def where(one: tcp.Socket, name: str | None) -> str:
    """The cell for a socket's cgroup, by the name to call it, or None where that is not known."""
    if name is None:
        return "(removed)" if one.is_removed else output.UNKNOWN
    return f"{name} (removed)" if one.is_removed else name


def _socket_json(one: tcp.Socket, sources: dict[str, str]) -> dict[str, Any]:
    return {
        "cgroup": one.cgroup,
        "cgroup_id": one.cgroup_id,
        "removed": one.is_removed,
        "unit": one.unit,
        "container": containers.as_json(one.cgroup),
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
