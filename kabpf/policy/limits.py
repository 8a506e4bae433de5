"""What users may have for cgroups of their own, and containers by their own wish, as policy files
say it under `users` and `containers`."""

from __future__ import annotations

from kabpf.policy import options
from kabpf.policy.model import IN_RANGES, Limits, Policy, Range
from kabpf.policy.yaml import Node

KEYS = tuple(row.key for row in IN_RANGES if row.for_users)
EXPECTED = "on, off, or bounds (idle: 10s..2h)"


ANY = Limits()
NONE = Limits(allowed=False)


def parse(node: Node) -> Limits:
    """What stands under `users` or `containers`."""
    if not isinstance(node.value, dict):
        if node.word(EXPECTED) not in ("on", "off"):
            raise node.expected(EXPECTED)
        return Limits(node.value == "on", source=node.source)
    keys = node.mapping(KEYS)
    if not keys:  # which would be no bounds at all
        raise node.error(f"no options, expected {EXPECTED}")
    draft = options.parse(keys)
    bounds: dict[str, Range] = {}
    for key in keys:
        value = getattr(draft, key).value
        if not isinstance(value, Range):
            raise keys[key].expected("bounds, the lower first (30s..2m)")
        bounds[key] = value
    return Limits(True, bounds, node.source)


def denial(policy: Policy, users: Limits) -> str:
    """Why a user's policy does not count, or nothing."""
    if not policy.owner:  # nobody's, or root's
        return ""
    if not users.allowed:
        return f"users may not attach policies ({users.where})"
    return users.exceeded(policy.rules.options)
