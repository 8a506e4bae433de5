"""Desired state: which policy each cgroup has. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kabpf.plan.automaton import Automaton
from kabpf.plan.births import Birth
from kabpf.plan.desired import Plan
from kabpf.plan.patterns import PATHS, patterns_of
from kabpf.plan.state import Cgroup, Resolved
from kabpf.policy.model import Policy, Selector, is_asked

if TYPE_CHECKING:
    from kabpf.containers.facts import Container
    from kabpf.plan.containers import Naming

Containers = Mapping[int, "Container"]  # by the ids of their own cgroups
NO_CONTAINERS: Containers = {}
NONE_KNOWN: Mapping[int, Resolved] = {}


def resolve(
    policies: tuple[Policy, ...],
    automaton: Automaton,
    cgroups: Iterable[Cgroup],
    births_max: int,
    containers: Containers = NO_CONTAINERS,
    known: Mapping[int, Resolved] = NONE_KNOWN,
) -> Plan:
    """The plan for these cgroups, parents before their children, and for all that may be born.
    `known` are some that the same automaton has resolved: a cgroup has one path as long as it is
    there."""
    asked: Mapping[str, Policy] = {}
    if automaton.containers is None:
        resolved = _resolved(automaton, cgroups, containers, known)
    else:
        resolved, asked = _with_wishes(automaton, automaton.containers, [*cgroups], containers)
    return Plan(
        policies,
        automaton.table(births_max),
        resolved,
        births_max,
        globs=automaton.globs,
        globs_digest=automaton.globs_digest,
        asked=tuple(asked.values()),
    )


def _resolved(
    automaton: Automaton,
    cgroups: Iterable[Cgroup],
    containers: Containers,
    known: Mapping[int, Resolved] = NONE_KNOWN,
) -> dict[int, Resolved]:
    resolved: dict[int, Resolved] = {}
    for cgroup in cgroups:
        resolved[cgroup.id] = known.get(cgroup.id) or resolve_one(
            automaton, cgroup, resolved.get(cgroup.parent_id), containers.get(cgroup.id)
        )
    return resolved


def _with_wishes(
    automaton: Automaton, naming: Naming, cgroups: list[Cgroup], containers: Containers
) -> tuple[dict[int, Resolved], Mapping[str, Policy]]:
    """As `_resolved`, with the policies that containers have asked for, by name."""
    naming.admit_all()
    resolved = _resolved(automaton, cgroups, containers)
    asked = _asked(resolved)
    naming.keep(asked)
    if naming.asked.keys() == asked.keys():
        return resolved, asked
    return _resolved(automaton, cgroups, containers), naming.asked


def _asked(resolved: Mapping[int, Resolved]) -> dict[str, Policy]:
    """The policies that containers have asked for and have, by name, those of the oldest cgroups
    first: of too many a younger container has none, and takes none away."""
    found = ((id, each.policy) for id, each in resolved.items() if each.policy)
    asked = [(id, policy) for id, policy in found if is_asked(policy.name)]
    return {policy.name: policy for _, policy in sorted(asked, key=lambda each: each[0])}


def with_attachments(plan: Plan, cgroups: Mapping[int, Cgroup]) -> Plan:
    """The plan for a data plane that sees no birth, and is attached to each cgroup that has another
    policy than its parent: what is below inherits the attachment."""
    own = {id for id, resolved in plan.cgroups.items() if _has_its_own(plan, cgroups[id], resolved)}
    nested: set[int] = set()
    for id in own:
        if above := own.intersection(_above(cgroups, id)):
            nested |= {id, *above}
    attachments = {id: id in nested for id in own}
    return replace(plan, births={}, globs_digest=0, attachments=attachments)


def left_to_kabpfd(automaton: Automaton, policies: Iterable[Policy]) -> list[Selector]:
    """The selectors with a glob that the kernel has no room for, so that new cgroups which they
    name wait for kabpfd."""
    left = set(automaton.globs.left_out)
    return [
        selector
        for policy in policies
        for selector in policy.selectors
        if left and any(not left.isdisjoint(names) for _, _, names in patterns_of(selector))
    ]


def left_text(selector: Selector) -> str:
    """Says of one of `left_to_kabpfd` what becomes of it."""
    named = f"{selector.kind} {selector.text}"
    return f"{selector.source}: resolved by kabpfd: {named}, expected globs with fewer *"


def _has_its_own(plan: Plan, cgroup: Cgroup, resolved: Resolved) -> bool:
    above = plan.cgroups.get(cgroup.parent_id)
    return resolved.policy is not None and (above is None or resolved.policy is not above.policy)


def _above(cgroups: Mapping[int, Cgroup], id: int) -> Iterator[int]:
    while (id := cgroups[id].parent_id) in cgroups:
        yield id


def resolve_one(
    automaton: Automaton,
    cgroup: Cgroup,
    parent: Resolved | None,
    container: Container | None = None,
) -> Resolved:
    """One cgroup from its parent, None for the root's, and from the container whose own it is."""
    birth = automaton.step(parent.state, cgroup.name) if parent else automaton.root
    is_inside = parent is not None and parent.contained
    policy, contained = named(automaton, birth, container, is_inside=is_inside)
    own = automaton.bound.get(cgroup.id) or policy or automaton.owned.get(cgroup.id)
    return Resolved(birth.state, own or (parent.policy if parent else None), contained)


def named(
    automaton: Automaton, birth: Birth, container: Container | None, *, is_inside: bool
) -> tuple[Policy | None, bool]:
    """The policy of the strongest selector that names a cgroup, or else the one that its container
    has chosen; and whether this is a container that a selector names, or `is_inside` one."""
    if is_inside:
        return (birth.policy if birth.strength >= PATHS else None), True
    if container and automaton.containers:
        strength, policy = automaton.containers.strongest(container)
        if strength > birth.strength:
            return policy, True
        return birth.policy or automaton.containers.chosen(container), False
    return birth.policy, False


def resolve_at(
    automaton: Automaton, cgroup: Cgroup, containers: Callable[[Iterable[Cgroup]], Containers]
) -> Resolved:
    """One cgroup by its path alone, without what it may inherit; `containers` looks them up."""
    names = [name for name in cgroup.path.split("/") if name]
    at = Cgroup(0 if names else cgroup.id, 0, "/")
    resolved = resolve_one(automaton, at, None)
    for number, name in enumerate(names, 1):
        at = at.child(cgroup.id if number == len(names) else -number, name)
        known = containers([at]).get(at.id)
        resolved = resolve_one(automaton, at, resolved._replace(policy=None), known)
    return resolved
