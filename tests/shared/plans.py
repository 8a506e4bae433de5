"""Policies and cgroup trees in short, for tests of plans."""

from __future__ import annotations

import json
from pathlib import Path

from kabpf.plan.state import Cgroup
from kabpf.policy import parser
from kabpf.policy.model import Policy

BIRTHS = 1 << 16
POLICIES = 64
Files = dict[str, tuple[dict[str, str], object]]  # (selector, keepalive) by the policy's name
Policies = dict[str, dict[str, object]]  # as a policy file spells them


def policies_of(named: Files) -> tuple[Policy, ...]:
    return read(spelled(named))


def read(named: Policies) -> tuple[Policy, ...]:
    content = json.dumps({"policies": named}).encode()
    return parser.combine([parser.parse(content, "p.yaml")])


def spelled(named: Files) -> Policies:
    return {
        name: {"select": [selector], "keepalive": keepalive}
        for name, (selector, keepalive) in named.items()
    }


def unit_directories(case: Path) -> dict[str, list[Path]]:
    """Where a case has systemd's files, the strongest directory first: etc, run and usr."""
    return {"unit": sorted((case / "units").glob("*"))}


def tree(paths: list[str]) -> list[Cgroup]:
    """The cgroups at these paths and above, parents before their children; ids count from 1."""
    found = {"": Cgroup(1, 0, "/")}
    for path in paths:
        names = path.split("/")[1:]
        for depth in range(1, len(names) + 1):
            above = "".join(f"/{name}" for name in names[: depth - 1])
            here = f"{above}/{names[depth - 1]}"
            found.setdefault(here, Cgroup(len(found) + 1, found[above].id, here))
    return list(found.values())
