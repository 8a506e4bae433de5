"""Policies and cgroup trees in short, for tests of plans."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from kabpf.containers.facts import Container, Pod
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


def container(facts: dict[str, Any]) -> Container:
    """A container by some facts of it; the others are empty."""
    facts = {"id": "0" * 64, "engine": "podman", "name": "", "image": "", **facts}
    if "pod" in facts:
        facts["pod"] = Pod(**{"namespace": "", "name": "", "uid": "", **facts["pod"]})
    return Container(**facts)


def containers_of(case: Path, cgroups: Iterable[Cgroup]) -> dict[int, Container]:
    """The containers of a case, by the ids of their cgroups; its containers.yaml has their facts by
    path."""
    file = case / "containers.yaml"
    facts = yaml.safe_load(file.read_text()) if file.exists() else {}
    ids = {cgroup.path: cgroup.id for cgroup in cgroups}
    return {ids[path]: container(each) for path, each in facts.items()}


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
