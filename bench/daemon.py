"""What kabpfd costs: to start, to keep, to reload, and to ask when a cgroup is born."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from machine import (
    DROP_INS,
    POLICY,
    Daemon,
    Machine,
    cgroup,
    in_force,
    kabpfctl,
    policy_files,
    timed_kabpfctl,
)  # fmt: skip

SLICES, SERVICES = 10, 99  # in each slice
CGROUPS = SLICES + SLICES * SERVICES
POLICIES = 100
RELOADS_OF = 1000  # drop-ins
REPEATS = 5
IDLE_WINDOW_S = 10
IDLE_WINDOWS = 3  # at most, to find a quiet one
SETTLED_S = 0.2

# As the drop-in of a unit whose name has a glob, and without.
BORN_IDLE_S = 77


class Costs(NamedTuple):
    """Seconds, unless the name says otherwise."""

    start_s: list[float]  # nothing was in the kernel
    adopt_s: list[float]  # everything was
    resident_kib: int
    resident_many_kib: int
    wake_ups: int  # in IDLE_WINDOW_S
    quiet: bool  # no cgroup was born meanwhile, anywhere in the tree
    status_s: list[float]
    reload_s: list[float]
    status_many_s: list[float]  # with 1,000 drop-ins
    apply_cold_s: list[float]
    apply_again_s: list[float]


class Births(NamedTuple):
    """Seconds from the mkdir until a process in the cgroup saw the options."""

    glob_new_s: list[float]  # on a new connection
    glob_first_s: list[float]  # on its first connection, opened before
    literal_first_covered: int  # of as many births, without a glob


def measure(machine: Machine) -> Costs:
    repeats = 2 if machine.quick else REPEATS
    start_s, adopt_s = [], []
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(_tree(machine))
        with policy_files(_hundred_policies(machine, place)):
            for _ in range(repeats):
                with Daemon(machine.scratch) as daemon:
                    start_s.append(daemon.start_s)
                    resident_kib = daemon.resident_kib()
            for _ in range(repeats):
                Daemon(machine.scratch).stop(signal.SIGKILL)
                with Daemon(machine.scratch) as daemon:
                    adopt_s.append(daemon.start_s)
            with Daemon(machine.scratch) as daemon:
                status_s = _statuses(repeats)
                wake_ups, quiet = _idle(machine, daemon)
        drop_ins = {
            DROP_INS / f"{_service(number)}.yaml": _drop_in(60) for number in range(RELOADS_OF)
        }
        with policy_files(drop_ins):
            with Daemon(machine.scratch) as daemon:
                reload_s = [
                    _reload(daemon, DROP_INS / f"{_service(500)}.yaml", 61 + turn)
                    for turn in range(2 * repeats)
                ]
                resident_many_kib = daemon.resident_kib()
                status_many_s = _statuses(repeats)
            apply_cold_s, apply_again_s = [], []
            for _ in range(repeats):
                with in_force(apply=False):
                    apply_cold_s.append(timed_kabpfctl("apply"))
                    apply_again_s.append(timed_kabpfctl("apply"))
    return Costs(
        start_s, adopt_s, resident_kib, resident_many_kib, wake_ups, quiet, status_s, reload_s,
        status_many_s, apply_cold_s, apply_again_s,
    )  # fmt: skip


def measure_births(machine: Machine) -> Births:
    count = 5 if machine.quick else 50
    policy = (
        "policies:\n"
        "  glob:\n"
        "    select: [{unit: kabpf-bench@*.service}]\n"
        f"    keepalive: {{idle: {BORN_IDLE_S}}}\n"
        "  literal:\n"
        "    select: [{unit: kabpf-bench.service}]\n"
        f"    keepalive: {{idle: {BORN_IDLE_S}}}\n"
    )
    new_s, first_s, covered = [], [], 0
    with (
        cgroup(machine.cgroup / "births") as place,
        policy_files({POLICY: policy}),
        Daemon(machine.scratch),
    ):
        for number in range(count):
            new_ns, first_ns, _ = _born(machine, place / f"kabpf-bench@{number}.service")
            new_s.append(new_ns / 1e9)
            first_s.append(first_ns / 1e9)
            covered += _born(machine, place / "kabpf-bench.service")[2]
    return Births(new_s, first_s, covered)


def _born(machine: Machine, directory: Path) -> list[int]:
    seen = subprocess.run(
        [machine.sockets, "born", directory, str(BORN_IDLE_S)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return [int(word) for word in seen.stdout.split()]


@contextlib.contextmanager
def _tree(machine: Machine) -> Iterator[Path]:
    with cgroup(machine.cgroup / "daemon") as place:
        for number in range(SLICES):
            (place / f"bench{number}.slice").mkdir()
        for number in range(SLICES * SERVICES):
            (place / f"bench{number % SLICES}.slice" / _service(number)).mkdir()
        yield place


def _service(number: int) -> str:
    return f"bench-{number:04}.service"


def _drop_in(idle_s: int) -> str:
    return f"keepalive: {{idle: {idle_s}s, interval: 10s, probes: 6, user_timeout: auto}}\n"


def _hundred_policies(machine: Machine, place: Path) -> dict[Path, str]:
    """Half in one file and half in drop-ins; units and templates, paths and globs."""
    text = "defaults: {interval: 10s, probes: 6, user_timeout: auto}\npolicies:\n"
    for number in range(POLICIES // 2):
        selector = (
            f"unit: {_service(number)}",
            f"unit: bench-instance{number}@.service",
            f"cgroup: {machine.path(place)}/bench{number // 5}.slice/**",
            f"unit: bench-{number:02}?9.service",
            f"cgroup: {machine.path(place)}/*/{_service(number)}",
        )[number % 5]
        text += f"  bench-{number}:\n    select: [{{{selector}}}]\n"
        text += f"    keepalive: {{idle: {60 + number}s}}\n"
    files = {POLICY: text}
    for number in range(POLICIES // 2):
        files[DROP_INS / f"{_service(100 + number)}.yaml"] = _drop_in(200 + number)
    return files


def _statuses(count: int) -> list[float]:
    _check_applied()
    return [timed_kabpfctl("status") for _ in range(count)]


def _reload(daemon: Daemon, file: Path, idle_s: int) -> float:
    file.write_text(_drop_in(idle_s))
    passed_s = daemon.reload()
    _check_applied()
    return passed_s


def _check_applied() -> None:
    if not json.loads(kabpfctl("status", "--json"))["policy_files"]["applied"]:
        raise SystemExit("the policy files are not in force, expected them to be")


def _idle(machine: Machine, daemon: Daemon) -> tuple[int, bool]:
    """How often it woke up, and whether the tree was quiet: a birth may wake it, rightly."""
    for _ in range(IDLE_WINDOWS):
        first, before = _next_id(machine), _next_id(machine)
        time.sleep(SETTLED_S)
        wake_ups = daemon.wake_ups(IDLE_WINDOW_S)
        if _next_id(machine) - before == before - first:
            return wake_ups, True
    return wake_ups, False


def _next_id(machine: Machine) -> int:
    """The id of a new cgroup. Ids are given out in a row to all cgroups and their files
    (__kernfs_new_node() in fs/kernfs/dir.c)."""
    with cgroup(machine.cgroup / "next") as place:
        return place.stat().st_ino
