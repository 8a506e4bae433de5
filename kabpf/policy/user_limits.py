"""What users may have for cgroups of their own, as policy files say it under `users`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kabpf.policy import options
from kabpf.policy.model import BY_KEY, IN_RANGES, Policy, Range, ranges
from kabpf.policy.yaml import Node

KEYS = tuple(row.key for row in IN_RANGES if row.for_users)
EXPECTED = "on, off, or bounds (idle: 10s..2h)"


@dataclass(frozen=True)
class Users:
    """What users may have. Without bounds an option may be whatever the kernel takes, which is how
    far any process may go by itself on its own sockets."""

    allowed: bool = True
    bounds: Mapping[str, Range] = field(default_factory=dict)  # by key, in the kernel's units
    source: str = "by default"


ANY = Users()


def parse(node: Node) -> Users:
    """What stands under `users`."""
    source = str(node.source)
    if not isinstance(node.value, dict):
        if node.word(EXPECTED) not in ("on", "off"):
            raise node.expected(EXPECTED)
        return Users(node.value == "on", source=source)
    keys = node.mapping(KEYS)
    draft = options.parse(keys)
    bounds: dict[str, Range] = {}
    for key in keys:
        value = getattr(draft, key).value
        if not isinstance(value, Range):
            raise keys[key].expected("bounds, the lower first (30s..2m)")
        bounds[key] = value
    return Users(True, bounds, source)


def denial(policy: Policy, users: Users) -> str:
    """Why a user's policy does not count, or nothing."""
    if not policy.owner:  # nobody's, or root's
        return ""
    if not users.allowed:
        return f"users may not attach policies ({users.source})"
    given = ranges(policy.rules.options)
    for key, bounds in users.bounds.items():
        value = given.get(key)
        if value and (value.low < bounds.low or value.high > bounds.high):
            unit = f" {BY_KEY[key].unit}".rstrip()
            return f"{key}: {value}{unit} is not in {bounds}{unit} ({users.source})"
    return ""
