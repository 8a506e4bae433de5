"""kabpfctl audit: which connections a middlebox with an idle timeout would forget."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kabpf import live, output, tables
from kabpf.apply import reconcile
from kabpf.audit import effect, units
from kabpf.audit.connections import Connection
from kabpf.audit.units import AtRisk, Changed, Looks, Named, Unit
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree, add_removed
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.observe import connections, containers, sockets
from kabpf.policy import files, parser, presets
from kabpf.policy.model import Policy
from kabpf.systemd import names

LOOKS_S = 1.0  # between two looks of --watch, at least
SHARE = 0.1  # of a processor, at most, that --watch takes
SHOWN_MAX = 20  # connections of --unit; --json has all


class Asked(NamedTuple):
    """An idle timeout, and the preset that it was asked for by."""

    timeout_s: int
    preset: str | None

    def __str__(self) -> str:
        return f"{self.timeout_s} s" + (f" ({self.preset})" if self.preset else "")

    @property
    def flag(self) -> str:
        """The option that asks for it."""
        return f"--preset {self.preset}" if self.preset else f"--timeout {self.timeout_s}s"


class Audited(NamedTuple):
    """What an audit found."""

    units: list[Unit]  # in the order of their names
    is_loaded: bool  # so that options are known
    looks: int
    notes: list[str]


def audit(arguments: argparse.Namespace) -> int:
    """Show what is at risk of each unit; 1 where anything is."""
    asked = timeouts(arguments.timeout or (), arguments.preset or ())
    found = look(
        asked,
        arguments.unit,
        watch_s=arguments.watch or 0,
        policies=_with(Path(arguments.with_file)) if arguments.with_file else None,
    )
    output.warn(found.notes)
    if arguments.json:
        output.print_json(_as_json(found, asked, has_file=bool(arguments.with_file)))
    else:
        print_list(found, asked, has_file=bool(arguments.with_file), is_one=bool(arguments.unit))
    return 1 if any(counts.at_risk for unit in found.units for counts in unit.counts) else 0


def timeouts(timeouts_s: Sequence[int], named: Sequence[str]) -> list[Asked]:
    """The idle timeouts that are asked for, as such and by presets; without any the shortest of all
    presets, so that what is safe is safe with each of them."""
    known = presets.presets()
    shortest = min(known.values(), key=lambda each: each.timeout_s).name
    if not timeouts_s:
        named = named or [shortest]
    asked = [
        *(Asked(each, None) for each in timeouts_s),
        *(Asked(known[each].timeout_s, each) for each in named),
    ]
    return list(dict.fromkeys(asked))


def look(
    asked: list[Asked],
    unit: str | None,
    *,
    watch_s: float = 0,
    policies: tuple[Policy, ...] | None = None,
) -> Audited:
    """Look at the machine's connections, for `watch_s` again and again; with `policies` also at
    what they would have under these."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    if unit is not None:
        names.require_unit(unit, tree)
    wanted = None if unit is None else names.covered_by(unit)
    looks, notes = Looks(), dict[str, None]()
    end, is_loaded = time.monotonic() + watch_s, False
    doing = "watching connections" if watch_s else "looking at connections"
    with live.working(doing), _until_interrupted(looks):
        while not looks.count or time.monotonic() < end:
            began = time.process_time()
            found, is_loaded = _look(tree, asked, wanted, policies, notes)
            looks.add(found)
            wait_s = max(LOOKS_S, (time.process_time() - began) / SHARE)
            time.sleep(max(0, min(wait_s, end - time.monotonic())))
    if looks.left_out:
        notes["more units came and went than are remembered"] = None
    ordered = sorted(looks.units.values(), key=lambda each: (each.name, each.cgroup or ""))
    return Audited(ordered, is_loaded, looks.count, list(notes))


@contextlib.contextmanager
def _until_interrupted(looks: Looks) -> Iterator[None]:
    """Let Ctrl-C end a watch: what was seen until then is worth the same."""
    try:
        yield
    except KeyboardInterrupt:
        if not looks.count:
            raise


def _look(
    tree: CgroupTree,
    asked: list[Asked],
    wanted: tuple[str, ...] | None,
    policies: tuple[Policy, ...] | None,
    notes: dict[str, None],
) -> tuple[dict[Named, Unit], bool]:
    with loading.opened(PINS, tree) as loaded:
        lists = loaded if loaded and loaded.lists_sockets else None
        found = connections.of_machine(lists, lambda note: notes.update({note: None}))
        paths = _paths(tree, loaded, {each.cgroup_id for each in found})
        changed = None if policies is None else _changed(tree, loaded, policies)
    if wanted is not None:
        inside = {
            id: sockets.is_inside(paths.get(id), None, wanted, None)
            for id in {each.cgroup_id for each in found}
        }
        found = [each for each in found if inside[each.cgroup_id]]
    timeouts_s = tuple(each.timeout_s for each in asked)
    unknown = "(removed)" if tree.is_whole else output.UNKNOWN  # where others are outside
    return units.found(
        found, lambda id: named(paths.get(id), unknown), timeouts_s, changed
    ), lists is not None


def _paths(tree: CgroupTree, loaded: Dataplane | None, ids: set[int]) -> dict[int, str]:
    present = {each.id: each for each in tree.cgroups()}
    if loaded and ids - present.keys():
        add_removed(present, loaded.removed())
    return {id: present[id].path for id in ids if id in present}


def named(path: str | None, unknown: str = "(removed)") -> Named:
    """The unit that a cgroup is in, with its own cgroup; or the cgroup itself. `unknown` is what to
    call one without a path."""
    if path is None:
        return Named(unknown, None)
    inner = next(reversed(sockets.units(path)), None)
    if inner is not None and containers.of(path) is None:
        start = f"{path}/".rindex(f"/{inner}/")
        path = path[: start + 1 + len(inner)]
    return Named(sockets.name(path), path)


def _changed(
    tree: CgroupTree, loaded: Dataplane | None, policies: tuple[Policy, ...]
) -> Callable[[int], Changed]:
    planned = reconcile.preview(policies, tree, loaded).plan.cgroups
    made: dict[int, Changed] = {}  # by policy

    def changed(cgroup_id: int) -> Changed:
        resolved = planned.get(cgroup_id)
        policy = resolved.policy if resolved else None
        if id(policy) not in made:
            made[id(policy)] = effect.under(policy)
        return made[id(policy)]

    return changed


def _with(file: Path) -> tuple[Policy, ...]:
    """The installed policies, with a file as if it were in /etc/kabpf/policy.d."""
    installed = files.read_all(files.SYSTEM, counts=lambda path: path.name != file.name)
    return parser.combine([*(each for _, each in installed.values()), files.read(file)])


def print_list(
    found: Audited, asked: list[Asked], *, has_file: bool = False, is_one: bool = False
) -> None:
    """Print a line for each unit, with `is_one` one for each connection at risk, and a sum."""
    heads = ["AT RISK"] if len(asked) == 1 else [f"AT {each.timeout_s}s" for each in asked]
    shows_unknown = any(unit.unknown for unit in found.units)
    columns = tables.columns(
        "UNIT~",
        "+OPEN",
        *(f"+{head}" for head in heads),
        *(["+UNKNOWN"] if shows_unknown else []),
        "+SILENT",
        "+LONGEST",
        *(["+WITHOUT"] if found.is_loaded else []),
        *(["+WITH FILE"] if has_file else []),
        "+LOOPBACK",
        "+SAME NET",
    )
    shortest = _shortest(asked)
    rows = [
        (
            unit.name,
            str(unit.connections),
            *(str(counts.at_risk) for counts in unit.counts),
            *([str(unit.unknown)] if shows_unknown else []),
            str(unit.counts[shortest].silent),
            time_text(unit.longest_silence_ms),
            *([str(unit.counts[shortest].without_policies)] if found.is_loaded else []),
            *([str(unit.counts[shortest].with_file)] if has_file else []),
            str(unit.loopback),
            str(unit.same_network),
        )
        for unit in found.units
    ]
    if rows:
        output.print_table(columns, rows)
    if is_one:
        _print_connections(found)
    if rows:
        print()
    output.print_lines(_summary(found, asked))


def _print_connections(found: Audited) -> None:
    at_risk = [each for unit in found.units for each in unit.at_risk]
    rows = [
        (
            *ends(each.connection),
            time_text(each.connection.silence_ms),
            time_text(each.silence.longest_ms),
            str(each.silence.why),
        )
        for each in at_risk[:SHOWN_MAX]
    ]
    if rows:
        print()
        output.print_table(tables.columns("LOCAL~~", "PEER~~", "+SILENT", "+MAY BE", "WHY|"), rows)
    if len(at_risk) > SHOWN_MAX:
        print(f"and {len(at_risk) - SHOWN_MAX} more; --json has all")


def _summary(found: Audited, asked: list[Asked]) -> Iterator[str]:
    total = sum(unit.connections for unit in found.units)
    for place, each in enumerate(asked):
        at_risk = sum(unit.counts[place].at_risk for unit in found.units)
        of_all = f"{at_risk} of {output.count(total, 'connection')}"
        yield f"{of_all} at risk of an idle timeout of {each}"
    if unknown := sum(unit.unknown for unit in found.units):
        unless = "" if found.is_loaded else " unless kabpf is loaded; try: kabpfctl apply"
        yield f"{unknown} may be at risk: their keepalive options are unknown{unless}"
    if any(unit.at_risk for unit in found.units):
        yield f"try: kabpfctl suggest {asked[_shortest(asked)].flag}"


def ends(connection: Connection) -> tuple[str, str]:
    """Both ends of a connection, as people write them."""
    return (
        str(sockets.Address(sockets.text(connection.local), connection.local_port)),
        str(sockets.Address(sockets.text(connection.peer), connection.peer_port)),
    )


def _shortest(asked: list[Asked]) -> int:
    return min(range(len(asked)), key=lambda place: asked[place].timeout_s)


def time_text(milliseconds: float | None) -> str:
    """A time as a person would say it, at least its first two digits."""
    if milliseconds is None:
        return output.UNKNOWN
    if math.isinf(milliseconds):
        return "for ever"
    seconds = int(milliseconds // 1000)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 10 * unit:
            return f"{seconds // unit}{name}"
    return f"{seconds}s"


def _as_json(found: Audited, asked: list[Asked], *, has_file: bool) -> dict[str, Any]:
    return {
        "loaded": found.is_loaded,
        "looks": found.looks,
        "timeouts": [each._asdict() for each in asked],
        "units": output.Streamed(
            (_unit_json(unit, asked, found, has_file=has_file) for unit in found.units),
            len(found.units),
        ),
    }


def _unit_json(unit: Unit, asked: list[Asked], found: Audited, *, has_file: bool) -> dict[str, Any]:
    return {
        "name": unit.name,
        "cgroup": unit.cgroup,
        "unit": next(reversed(sockets.units(unit.cgroup)), None),
        "container": containers.as_json(unit.cgroup),
        "connections": unit.connections,
        "loopback": unit.loopback,
        "same_network": unit.same_network,
        "unknown": unit.unknown,
        "longest_silence_ms": unit.longest_silence_ms,
        "at_risk": [
            {
                "timeout_s": each.timeout_s,
                "connections": counts.at_risk,
                "silent": counts.silent,
                "without_policies": counts.without_policies if found.is_loaded else None,
                "with_file": counts.with_file if has_file else None,
            }
            for each, counts in zip(asked, unit.counts, strict=True)
        ],
        "connections_at_risk": output.Streamed(
            map(_connection_json, unit.at_risk), len(unit.at_risk)
        ),
    }


def _connection_json(each: AtRisk) -> dict[str, Any]:
    connection, silence = each
    return {
        "network_namespace": connection.namespace,
        "local": sockets.Address(sockets.text(connection.local), connection.local_port)._asdict(),
        "peer": sockets.Address(sockets.text(connection.peer), connection.peer_port)._asdict(),
        "direction": "in" if connection.is_incoming else "out",
        "state": connection.state,
        "silence_ms": connection.silence_ms,
        "may_be_silent_ms": None if math.isinf(silence.longest_ms) else int(silence.longest_ms),
        "reason": str(silence.why),
    }
