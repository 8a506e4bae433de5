"""Many cgroups under many policies, for a daemon to keep."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from machine import DROP_INS, POLICY, Daemon, Machine, cgroup, kabpfctl

BORN_IDLE_S = 77


@contextlib.contextmanager
def tree(machine: Machine, slices: int, services: int) -> Iterator[Path]:
    """So many slices, with as many services in each."""
    with cgroup(machine.cgroup / "crowd") as place:
        for number in range(slices):
            (place / f"bench{number}.slice").mkdir()
        for number in range(slices * services):
            (place / f"bench{number % slices}.slice" / service(number)).mkdir()
        yield place


def service(number: int) -> str:
    return f"bench-{number:04}.service"


def drop_in(idle_s: int) -> str:
    return f"keepalive: {{idle: {idle_s}s, interval: 10s, probes: 6, user_timeout: auto}}\n"


def mixed_policies(machine: Machine, place: Path, count: int) -> dict[Path, str]:
    """Half in one file and half in drop-ins; units and templates, paths and globs."""
    text = "defaults: {interval: 10s, probes: 6, user_timeout: auto}\npolicies:\n"
    for number in range(count // 2):
        selector = (
            f"unit: {service(number)}",
            f"unit: bench-instance{number}@.service",
            f"cgroup: {machine.path(place)}/bench{number // 5}.slice/**",
            f"unit: bench-{number:03}?.service",
            f"cgroup: {machine.path(place)}/*/{service(number)}",
        )[number % 5]
        text += f"  bench-{number}:\n    select: [{{{selector}}}]\n"
        text += f"    keepalive: {{idle: {60 + number}s}}\n"
    files = {POLICY: text}
    for number in range(count // 2):
        files[DROP_INS / f"{service(100 + number)}.yaml"] = drop_in(200 + number)
    return files


def born(machine: Machine, directory: Path) -> list[int]:
    """Makes a cgroup whose policy has an idle time of BORN_IDLE_S: nanoseconds from the mkdir until
    a process in it saw that on a new connection, and on its first; and whether on that at once."""
    seen = subprocess.run(
        [machine.sockets, "born", directory, str(BORN_IDLE_S)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return [int(word) for word in seen.stdout.split()]


def reload(daemon: Daemon, file: Path, text: str) -> float:
    """The seconds that a reload takes after a drop-in got this text."""
    file.write_text(text)
    passed_s = daemon.reload()
    check_applied()
    return passed_s


def check_applied() -> None:
    """End the run unless the policy files are active."""
    if not json.loads(kabpfctl("status", "--json"))["policy_files"]["applied"]:
        raise SystemExit("the policy files are not active")
