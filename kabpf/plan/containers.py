"""Which selectors name a container or a pod, by what its engine knows of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kabpf.containers.facts import Container
from kabpf.plan.patterns import Kind, Rank, compiled, strength
from kabpf.policy.model import GLOB, Condition, Policy, Selector

# Names of cgroups that are containers', and of some others: `containers.names.identify` tells. The
# last is that of the cgroupfs driver, an id alone.
CGROUPS = (
    "libpod-*", "docker-*.scope", "cri-containerd-*.scope", "nerdctl-*.scope", "crio-*",
    "[0-9a-f]" * 64,
)  # fmt: skip

WISH = "io.kabpf.policy"  # of a label or an annotation, whose value is a policy's name


class Naming:
    """The selectors of containers and pods that `policies` have, which come in the order they were
    read."""

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        self._selectors = [
            (Rank(Kind.CONTAINER, _literal(selector), order), policy, selector)
            for order, policy in enumerate(policies)
            if policy.until is None
            for selector in policy.selectors
            if selector.is_of_containers
        ]
        self._offered = {policy.name: policy for policy in policies if policy.offered}

    def __call__(self, container: Container) -> list[tuple[Policy, Selector]]:
        """The selectors that name a container, the beaten ones included, in the order they were
        read."""
        return [
            (policy, selector)
            for _, policy, selector in self._selectors
            if _is_named(container, selector)
        ]

    def strongest(self, container: Container) -> tuple[int, Policy | None]:
        """The policy of the strongest selector, and how strong that is; 0 and None where none names
        the container."""
        named = [
            (rank, policy)
            for rank, policy, selector in self._selectors
            if _is_named(container, selector)
        ]
        if not named:
            return 0, None
        rank, policy = max(named, key=lambda each: each[0])
        return strength(rank), policy

    def chosen(self, container: Container) -> Policy | None:
        """The policy that the container asks for, or its pod does, if that is offered."""
        asked = wish(container)
        return self._offered.get(asked) if asked else None


def wish(container: Container) -> str | None:
    """The name of the policy that a container, or its pod, asks for."""
    pod_labels = container.pod.labels if container.pod else {}
    for some in (container.annotations, container.labels, pod_labels):
        if WISH in some:
            return some[WISH]
    return None


def _literal(selector: Selector) -> int:
    """How much text the selector spells out before the first wildcard of each of its globs. So one
    that asks for more is the stronger. An engine, of which there are few, counts as a character."""
    return sum(
        1 if each.key == "engine" else len(GLOB.split(each.glob, maxsplit=1)[0])
        for each in selector.conditions
    )


def _is_named(container: Container, selector: Selector) -> bool:
    if selector.kind == "pod" and container.pod is None:
        return False
    return all(
        any(
            compiled(condition.glob).match(value)
            for value in _values(container, selector, condition)
        )
        for condition in selector.conditions
    )


def _values(container: Container, selector: Selector, condition: Condition) -> Iterator[str]:
    """What the container, or its pod, has for a condition: one text or none."""
    pod = container.pod if selector.kind == "pod" else None
    key, of_key, _ = condition
    if key == "label":
        labels = pod.labels if pod else container.labels
        if of_key in labels:
            yield labels[of_key]
    elif key == "annotation":
        if of_key in container.annotations:
            yield container.annotations[of_key]
    elif key == "container":
        yield container.name
    else:
        yield str(getattr(pod or container, key))
