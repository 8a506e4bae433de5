"""Which selectors name a container or a pod, by what its engine knows of it, and what it asks for
itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from kabpf.containers.facts import Container
from kabpf.errors import PolicyError
from kabpf.plan.patterns import Kind, Rank, compiled, strength
from kabpf.plan.state import RECORDS_MAX
from kabpf.policy import wishes
from kabpf.policy.model import ASKED, GLOB, Condition, Policy, Selector

# Names of cgroups that are containers', and of some others: `containers.names.identify` tells. The
# last is that of the cgroupfs driver, an id alone.
CGROUPS = (
    "libpod-*", "docker-*.scope", "cri-containerd-*.scope", "nerdctl-*.scope", "crio-*",
    "[0-9a-f]" * 64,
)  # fmt: skip

CHOICE = "io.kabpf.policy"  # of a label or an annotation, whose value is a policy's name

# Policies of containers' own wishes at once: whoever may start containers has others without end.
ASKED_MAX = 256

NAME_MAX = 255  # characters of a container's name in a refusal; engines have no limit


class Wish(NamedTuple):
    """What a container, or its pod, says with one of its labels or annotations."""

    kind: str  # "annotation" or "label"
    text: str


class Naming:
    """The selectors of containers and pods that `policies` have, which come in the order they were
    read; and the policies that containers have asked for, as far as these are admitted."""

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        self._selectors = [
            (Rank(Kind.CONTAINER, _literal(selector), order), policy, selector)
            for order, policy in enumerate(policies)
            if policy.until is None
            for selector in policy.selectors
            if selector.is_of_containers
        ]
        self._offered = {policy.name: policy for policy in policies if policy.offered}
        self._template = next((policy for policy in policies if policy.wishes), None)
        self._asked: dict[str, Policy] = {}  # by name
        # What containers ask for keeps no policy of a file out of the kernel.
        self._room_max = max(0, min(ASKED_MAX, RECORDS_MAX - len(policies)))
        self._room = self._room_max

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
        """The policy that the container asks for, or its pod does, if that is offered; or else that
        of the options that it asks for."""
        choice = wish(container, CHOICE)
        if choice and (offered := self._offered.get(choice.text)):
            return offered
        try:
            asked = self._asked_by(container)
        except PolicyError:
            return None
        if asked and asked.name not in self._asked:
            if self.is_full:
                return None
            self._asked[asked.name] = asked
        return asked and self._asked[asked.name]

    def refusal(self, container: Container) -> str:
        """Why the options that a container asks for do not count, or nothing."""
        try:
            self._asked_by(container)
        except PolicyError as error:
            return str(error)
        if self.has_no_room(container):
            return f"containers have {len(self._asked)} others already, expected one of these"
        return ""

    def has_no_room(self, container: Container) -> bool:
        """Whether options that a container asks for would count, but that others have the room."""
        if not self.is_full:
            return False
        try:
            asked = self._asked_by(container)
        except PolicyError:
            return False
        return asked is not None and asked.name not in self._asked

    @property
    def has_wishes(self) -> bool:
        """Whether containers may ask for options of their own."""
        return self._template is not None

    @property
    def asked(self) -> dict[str, Policy]:
        """The policies of wishes that are admitted, by name."""
        return dict(self._asked)

    @property
    def is_full(self) -> bool:
        """Whether no other wish is admitted until one is forgotten."""
        return self._template is not None and len(self._asked) >= self._room

    def admit_all(self) -> None:
        """Begin again, and admit whatever containers ask for, until `keep` says which it is."""
        self._asked.clear()
        self._room = sys.maxsize

    def admit(self, names: Iterable[str]) -> None:
        """Admit policies of these names as far as there is room, and they are allowed."""
        for name in names:
            with contextlib.suppress(PolicyError):
                if self._template and not self.is_full:
                    self._asked[name] = wishes.policy(name.removeprefix(ASKED), self._template)

    def keep(self, names: Collection[str]) -> None:
        """Admit policies of these names, the first as far as there is room, and more while there
        is."""
        self._asked = {name: self._asked[name] for name in [*names][: self._room_max]}
        self._room = self._room_max

    def forget(self, names: Iterable[str]) -> None:
        """No container has these any more."""
        for name in names:
            self._asked.pop(name, None)

    def _asked_by(self, container: Container) -> Policy | None:
        asked = wish(container, wishes.KEY)
        if asked is None or self._template is None:
            return None
        return wishes.policy(asked.text, self._template)


def refusals(naming: Naming | None, containers: Mapping[int, Container]) -> dict[int, str]:
    """Why options that containers ask for do not count, a line each, by their cgroups' ids."""
    if naming is None:
        return {}
    found = ((id, each, naming.refusal(each)) for id, each in containers.items())
    return {
        id: str(PolicyError(f"container {_called(each)} of {each.engine}: {wishes.KEY}: {why}"))
        for id, each, why in found
        if why
    }


def _called(container: Container) -> str:
    """A container's name, as far as a line of a log has room: journald breaks one after 48 KiB, and
    the rest would be a line of its own."""
    name = container.name or container.id
    return name if len(name) <= NAME_MAX else f"{name[:NAME_MAX]}..."


def wish(container: Container, key: str) -> Wish | None:
    """What a container says with a label or an annotation, an annotation first, or its pod does
    with a label."""
    pod_labels = container.pod.labels if container.pod else {}
    for kind, some in (
        ("annotation", container.annotations), ("label", container.labels), ("label", pod_labels),
    ):  # fmt: skip
        if key in some:
            return Wish(kind, some[key])
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
