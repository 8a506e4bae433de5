"""kabpfctl explain: the selector that gives a cgroup its policy, and the line of each option."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from kabpf import output, tables
from kabpf.apply import transient
from kabpf.commands.sockets import where
from kabpf.containers.facts import Container
from kabpf.containers.names import of_user
from kabpf.doctor import elsewhere
from kabpf.doctor.elsewhere import Elsewhere
from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS
from kabpf.observe import containers, held, sockets
from kabpf.plan.automaton import Automaton
from kabpf.plan.containers import CHOICE, wish
from kabpf.plan.patterns import Naming
from kabpf.plan.resolve import left_text, left_to_kabpfd, named
from kabpf.plan.state import Cgroup, record
from kabpf.policy import files, spelling, wishes
from kabpf.policy.model import OPTIONS, Policy, Selector, is_asked, options_json
from kabpf.systemd import names, relations

HELD_MAX = 20  # sockets of other cgroups that are shown


@dataclass(frozen=True)
class Reason:
    """What decides about one cgroup; without a policy there is no selector."""

    cgroup: Cgroup
    decided_at: str  # the path of the cgroup that the selector names: its own, or an ancestor's
    policy: Policy | None
    selector: Selector | None
    beaten: tuple[tuple[Policy, Selector], ...]  # that name the same cgroup
    waits: bool = False  # a new cgroup that the selector names waits for kabpfd
    container: str = ""  # the cgroup of the systemd in a container that it belongs to
    refusal: str = ""  # why options that its container asks for do not count


def explain(arguments: argparse.Namespace) -> int:
    """Explain the policy of a cgroup, of a unit's cgroups, or of a process's."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    counting = transient.without_former_owners(files.load(files.SYSTEM), tree)
    policies = relations.followed(tuple(each for each in counting if not _is_over(each, tree)))
    reasons = [
        replace(each, container=elsewhere.container(each.cgroup.path, tree))
        for each in decided(policies, _cgroups(arguments.what, tree), _asked(policies, tree))
    ]
    active = _active(tree, reasons) if os.geteuid() == 0 else {}
    result: dict[str, Any] = {
        "cgroups": [as_json(each, active.get(each.cgroup.id)) for each in reasons]
    }
    text = [line for each in reasons for line in lines(each, active.get(each.cgroup.id))]
    found = _elsewhere(arguments.what, policies, reasons, tree)
    found += elsewhere.of_users(_beyond_containers(reasons))
    result["elsewhere"] = [
        {"unit": each.unit, "found": each.text, "fix": each.advice} for each in found
    ]
    for each in found:
        text += [output.shown(each.text), f"  fix: {output.shown(each.advice)}"]
    if arguments.what.isdecimal():
        others = _held_of_others(arguments.what, reasons[0].cgroup.path, tree)
        result["holds"] = [_held_json(one) for one in others]
        text += _held_lines(others)
    if arguments.json:
        return output.answer(arguments, result, "")
    output.print_lines(text)
    return 0


def _elsewhere(
    what: str, policies: tuple[Policy, ...], reasons: list[Reason], tree: CgroupTree
) -> list[Elsewhere]:
    """Why a policy does not reach sockets of what is asked for, though it looks so."""
    if what.isdecimal():
        found = elsewhere.started(int(what), elsewhere.of_policies(policies, tree))
        return [found] if found else []
    names = [each.cgroup.name.removeprefix("_") for each in reasons]
    found_units = elsewhere.of_units([name for name in names if name.endswith(".service")], tree)
    managers = [
        f"{above}/init.scope"
        for each in reasons
        for above in islice(elsewhere.managers_above(each.cgroup.path, tree), 1)
    ]
    if not managers:
        return found_units
    ports = elsewhere.managers(_sockets(tree))
    paths = dict.fromkeys(path for path in managers if path in ports)
    return [*found_units, *(elsewhere.of_manager(path, ports[path]) for path in paths)]


def _beyond_containers(reasons: Iterable[Reason]) -> Iterator[str]:
    """The cgroups that no policy reaches which selects what is below a user's manager."""
    for each in reasons:
        container = of_user(each.cgroup.path)
        manager = f"{container.manager}/" if container else ""
        if each.policy is None or not f"{each.decided_at}/".startswith(manager):
            yield each.cgroup.path


def _sockets(tree: CgroupTree) -> list[sockets.Socket]:
    """The TCP sockets of the machine, as far as this process may see them."""
    is_root = os.geteuid() == 0
    with (
        contextlib.suppress(UnsupportedError),
        loading.opened(PINS, tree) if is_root else contextlib.nullcontext() as loaded,
    ):
        return list(sockets.all_of_machine(tree, loaded))
    return []


def _held_of_others(process: str, path: str, tree: CgroupTree) -> list[sockets.Socket]:
    """The sockets of other cgroups that a process in the cgroup at `path` holds."""
    found = held.of_process(process, _sockets(tree))
    within = f"{path.rstrip('/')}/"
    own = [one for one in found if not one.is_removed and f"{one.cgroup}/".startswith(within)]
    ends = {(one.local, one.peer) for one in own}  # one of several that listen there
    return [one for one in found if one not in own and (one.local, one.peer) not in ends]


def _held_json(one: sockets.Socket) -> dict[str, Any]:
    return {
        "cgroup": one.cgroup,
        "removed": one.is_removed,
        "local": one.local._asdict(),
        "peer": one.peer._asdict(),
        "state": one.state,
        "policy": one.policy,
    }


def _held_lines(others: list[sockets.Socket]) -> list[str]:
    if not others:
        return []
    rows = [
        (
            f"  {where(one, one.cgroup and sockets.name(one.cgroup))}",
            str(one.local),
            str(one.peer),
            one.state,
            one.policy or "-",
        )
        for one in others[:HELD_MAX]
    ]
    columns = tables.columns("  UNIT~", "LOCAL~", "PEER~", "STATE", "POLICY~")
    more = len(others) - len(rows)
    return [
        f"  holds {output.count(len(others), 'socket')} of other cgroups, with their policies",
        *output.fitted(columns, rows).splitlines(),
        *([f"  and {more} more; --json has all"] if more else []),
    ]


def _asked(policies: tuple[Policy, ...], tree: CgroupTree) -> list[str]:
    """The names of the policies that containers have asked for and have."""
    if os.geteuid() != 0 or all(each.wishes is None for each in policies):
        return []
    with loading.opened(PINS, tree) as loaded:
        records = loaded.records().values() if loaded else ()
        return [each.name for each in records if is_asked(each.name)]


def decided(
    policies: tuple[Policy, ...], wanted: Iterable[Cgroup], asked: Iterable[str] = ()
) -> Iterator[Reason]:
    """What decides about each of these cgroups. The policies `asked` are those that containers have
    already, and are the first to have room."""
    automaton, naming = Automaton(policies), Naming(policies)
    if automaton.containers:
        automaton.containers.admit(asked)
    for cgroup in wanted:
        decided_at, winner, container = _decided(automaton, policies, cgroup.path)
        refusal = _refusal(automaton, cgroup.path, winner)
        if winner is None:
            yield Reason(cgroup, cgroup.path, None, None, (), refusal=refusal)
            continue
        by_path = naming(decided_at)
        by_facts = automaton.containers(container) if container and automaton.containers else []
        names = [*by_facts, *by_path]
        own = next((each for policy, each in names if policy is winner), None)
        own = own or _chosen(winner, containers.own(decided_at))
        beaten = tuple(each for each in names if each[0] is not winner)
        waits = own in left_to_kabpfd(automaton, (winner,))
        yield Reason(cgroup, decided_at, winner, own, beaten, waits, refusal=refusal)


def _is_over(policy: Policy, tree: CgroupTree) -> bool:
    """Whether the cgroup is gone that a policy is about."""
    until = policy.until
    return until is not None and not tree.has(Cgroup(until.id, 0, until.path))


def _chosen(policy: Policy, container: Container | None) -> Selector:
    """How a container has chosen an offered policy, or asked for one, as a selector would say
    it."""
    key = wishes.KEY if is_asked(policy.name) else CHOICE
    kind, text = (container and wish(container, key)) or ("label", policy.name)
    text = spelling.mapping({kind: spelling.mapping({key: spelling.word(text)})})
    return Selector("container", text, policy.source)


def _refusal(automaton: Automaton, path: str, winner: Policy | None) -> str:
    """Why the options do not count that the container asks for which a cgroup is of or in."""
    container = containers.of(path)
    if container is None or wish(container, wishes.KEY) is None:
        return ""
    if automaton.containers is None or not automaton.containers.has_wishes:
        return "no policy file lets containers ask, expected containers: on, or bounds"
    refusal = automaton.containers.refusal(container)
    if not refusal and winner and not is_asked(winner.name):
        return f"policy {winner.name} is stronger"
    return refusal


class _Decision(NamedTuple):
    path: str  # of the cgroup that the selector names
    policy: Policy | None
    container: Container | None = None  # that the selector names


def _decided(automaton: Automaton, policies: tuple[Policy, ...], path: str) -> _Decision:
    ending = [(each.until.path, each) for each in policies if each.until]
    bound = {where: each for where, each in ending if each.owner is None}
    owned = {where: each for where, each in ending if each.owner is not None}
    birth = automaton.root
    decision, here, contained = _Decision("/", birth.policy), "", False
    for name in filter(None, path.split("/")):
        here = f"{here}/{name}"
        birth = automaton.step(birth.state, name)
        was_contained = contained
        container = containers.own(here) if automaton.containers else None
        policy, contained = named(automaton, birth, container, is_inside=contained)
        if own := bound.get(here) or policy or owned.get(here):
            by_container = contained and not was_contained and own is policy
            decision = _Decision(here, own, container if by_container else None)
    return decision


def _cgroups(what: str, tree: CgroupTree) -> list[Cgroup]:
    """The cgroups that are meant by a process id, a path, the name or glob of a unit, or by what
    `containers.is_meant` takes for a container or pod."""
    if what.isdecimal() and os.path.exists(f"/proc/{what}"):
        return [tree.find(cgroups.path_of_process(what))]
    if "/" in what:
        with contextlib.suppress(RefusedError):
            return [names.find(tree, what)]
    present = tree.cgroups()
    if "/" not in what and (found := list(names.cgroups_of(what, present))):
        return found
    found = [
        each
        for each in present
        if containers.own(each.path) and containers.is_meant(each.path, what)
    ]
    if found:
        return found
    if what.isdecimal():
        return [tree.find(cgroups.path_of_process(what))]
    if "/" in what:
        return [names.find(tree, what)]
    hint = "expected a running unit or container, a cgroup path or a PID"
    if not sockets.UNIT.fullmatch(what) and any(of_user(each.path) for each in present):
        hint += "; kabpf does not know the names of users' containers"
    else:
        names.require_unit(what, tree)
    raise RefusedError(f"no cgroup is named {what}", hint=hint)


def _active(tree: CgroupTree, reasons: list[Reason]) -> dict[int, bool]:
    """Whether the kernel has for these cgroups what the files say now."""
    with loading.opened(PINS, tree) as loaded:
        if loaded is None:
            return dict.fromkeys((each.cgroup.id for each in reasons), False)
        ids = [each.cgroup.id for each in reasons]
        records, entries = loaded.between_changes(lambda now: (now, loaded.entries(ids)))
    has = {id: records.get(entry.policy_id) for id, entry in entries.items()}
    return {
        each.cgroup.id: has.get(each.cgroup.id) == (record(each.policy) if each.policy else None)
        for each in reasons
    }


def _values(policy: Policy) -> dict[str, Any]:
    """What the policy gives, by key; what it leaves alone is left out."""
    rules = policy.rules
    options = options_json(rules.options)
    given = {row.key: options[row.field] for row in OPTIONS if options[row.field]}
    return {
        "mode": str(rules.mode),
        "direction": str(rules.direction),
        "loopback": rules.loopback,
        "existing": policy.existing,
        **({"log": "sockets"} if policy.log else {}),
        "keepalive": rules.options.keepalive,
        **(given if rules.options.keepalive else {}),
    }


def as_json(why: Reason, is_active: bool | None) -> dict[str, Any]:
    """A reason as JSON; `is_active` None is unknown."""
    policy, selector = why.policy, why.selector
    result: dict[str, Any] = {
        "cgroup": why.cgroup.path,
        "container": why.container or None,
        "facts": containers.as_json(why.cgroup.path),
        "refusal": why.refusal or None,
        "policy": None,
        "active": is_active,
    }
    if policy is None or selector is None:
        return result
    origins = {key: policy.origins.get(key) for key in _values(policy)}
    return result | {
        "policy": policy.name,
        "source": str(policy.source),
        "decided_at": why.decided_at,
        "selector": {selector.kind: selector.text, "source": str(selector.source)},
        "resolved_by_kabpfd": why.waits,
        "weaker": [
            {"policy": other.name, each.kind: each.text, "source": str(each.source)}
            for other, each in why.beaten
        ],
        "values": {
            key: {
                "value": value,
                "source": str(origin.source) if (origin := origins[key]) else None,
                "note": origin.note if origin else "default",
            }
            for key, value in _values(policy).items()
        },
        "destinations": [
            {
                "to": each.to,
                "ports": list(each.ports),
                "options": options_json(each.options),
            }
            for each in policy.rules.destinations
        ],
    }


def lines(why: Reason, is_active: bool | None) -> list[str]:
    """A reason as lines for a person; `is_active` None is unknown."""
    return list(_lines(why, is_active))


def _lines(why: Reason, is_active: bool | None) -> Iterator[str]:
    policy, selector = why.policy, why.selector
    path = why.cgroup.path
    yield output.shown(sockets.name(path))
    if path != sockets.name(path):
        yield f"  cgroup {output.shown(path)}"
    if why.container:
        unit = sockets.units(path)[-1:]
        yield f"  of the systemd in container {output.shown(why.container)}"
        if unit and path.endswith(f"/{unit[0]}"):
            yield f"  unit: {output.shown(unit[0])} selects it, and others of that name"
        yield f"  cgroup: {output.shown(path)} selects it alone"
    if container := containers.of(path):
        image = f", image {output.shown(container.image)}" if container.image else ""
        yield f"  container {container.id[: containers.SHORT_ID]} of {container.engine}{image}"
    if why.refusal:
        yield f"  {wishes.KEY} does not count: {output.shown(why.refusal)}"
    if policy is None or selector is None:
        yield "  no policy: nothing names it, nor a cgroup above it"
        called = sockets.name(path)
        if called.endswith(".service") and "/" not in called:  # of the machine's own manager
            yield f"    try: kabpfctl edit {output.shown(shlex.quote(called))}"
        return
    yield f"  policy {output.shown(policy.name)}, {policy.source}"
    yield f"  because {_named(selector)} names {_where(why)}"
    if why.waits:
        yield f"  {left_text(selector)}"
    for other, each in why.beaten:
        yield f"    stronger than {_named(each)} of policy {output.shown(other.name)}"
    if is_active is False:
        yield "  changed since the last apply; try: kabpfctl apply"
    rows = []
    for key, text in _texts(policy).items():
        origin = policy.origins.get(key)
        rows.append(
            (f"  {key.replace('_', ' ')}", text, str(origin.source if origin else "default"))
        )
        if origin and origin.note:
            rows.append(("", "", origin.note))
    columns = tables.columns("  OPTION", "VALUE", "SOURCE|")
    yield from output.fitted(columns, rows).rstrip("\n").split("\n")
    for destination in policy.rules.destinations:
        ports = f" port {', '.join(map(str, destination.ports))}" if destination.ports else ""
        yield f"  to {destination.to}{ports}: {output.options_text(destination.options)}"


def _texts(policy: Policy) -> dict[str, str]:
    rules = policy.rules
    texts = {key: str(value).lower() for key, value in _values(policy).items()}
    for row in OPTIONS:
        if row.key in texts:
            texts[row.key] = output.cell(getattr(rules.options, row.field), row.unit)
    texts["keepalive"] = "on" if rules.options.keepalive else "off"
    return texts


def _named(selector: Selector) -> str:
    return f"{selector.kind.replace('_', ' ')} {output.shown(selector.text)} ({selector.source})"


def _where(why: Reason) -> str:
    where = "it"
    if why.decided_at != why.cgroup.path:
        where = f"{output.shown(why.decided_at)}, which it is in"
    is_service = why.selector is not None and why.selector.text.endswith(".service")
    if is_service and why.decided_at.endswith(".socket"):
        where += ", as one of its sockets"
    return where
