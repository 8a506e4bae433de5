"""What kabpfd costs: to start, to keep, to reload, and to ask when a cgroup is born."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from typing import NamedTuple

from crowd import BORN_IDLE_S, born, check_applied, drop_in, mixed_policies, reload, service, tree
from machine import (
    DROP_INS,
    POLICY,
    Daemon,
    Machine,
    cgroup,
    kabpf_active,
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


class Costs(NamedTuple):
    """Seconds, unless the name says otherwise."""

    start_s: list[float]  # nothing was in the kernel
    adopt_s: list[float]  # everything was
    resident_kib: int
    resident_many_kib: int
    wake_ups: int  # in IDLE_WINDOW_S
    quiet: bool  # no cgroup was born meanwhile, anywhere in the tree
    status_s: list[float]
    verify_s: list[float]
    metrics_s: list[float]
    run_s: list[float]  # added to a command
    reload_s: list[float]
    status_many_s: list[float]  # with 1,000 drop-ins
    apply_cold_s: list[float]
    apply_again_s: list[float]


class Births(NamedTuple):
    """Seconds from the mkdir until a process in the cgroup saw the options."""

    glob_new_s: list[float]  # on a new connection
    glob_first_s: list[float]  # on its first connection, opened before
    glob_first_covered: int  # of these
    literal_first_covered: int  # of as many births, without a glob


def measure(machine: Machine) -> Costs:
    repeats = 2 if machine.quick else REPEATS
    start_s, adopt_s = [], []
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tree(machine, SLICES, SERVICES))
        with policy_files(mixed_policies(machine, place, POLICIES)):
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
                verify_s = [timed_kabpfctl("verify") for _ in range(repeats)]
                metrics_s = [timed_kabpfctl("metrics") for _ in range(repeats)]
                run_s = [_added_by_run() for _ in range(2 * repeats)]
                wake_ups, quiet = _idle(machine, daemon)
        drop_ins = {
            DROP_INS / f"{service(number)}.yaml": drop_in(60) for number in range(RELOADS_OF)
        }
        with policy_files(drop_ins):
            with Daemon(machine.scratch) as daemon:
                reload_s = [
                    reload(daemon, DROP_INS / f"{service(500)}.yaml", drop_in(61 + turn))
                    for turn in range(2 * repeats)
                ]
                resident_many_kib = daemon.resident_kib()
                status_many_s = _statuses(repeats)
            apply_cold_s, apply_again_s = [], []
            for _ in range(repeats):
                with kabpf_active(apply=False):
                    apply_cold_s.append(timed_kabpfctl("apply"))
                    apply_again_s.append(timed_kabpfctl("apply"))
    return Costs(
        start_s, adopt_s, resident_kib, resident_many_kib, wake_ups, quiet, status_s, verify_s,
        metrics_s, run_s, reload_s, status_many_s, apply_cold_s, apply_again_s,
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
    new_s, first_s, by_glob, by_name = [], [], 0, 0
    with (
        cgroup(machine.cgroup / "births") as place,
        policy_files({POLICY: policy}),
        Daemon(machine.scratch),
    ):
        for number in range(count):
            new_ns, first_ns, at_once = born(machine, place / f"kabpf-bench@{number}.service")
            new_s.append(new_ns / 1e9)
            first_s.append(first_ns / 1e9)
            by_glob += at_once
            by_name += born(machine, place / "kabpf-bench.service")[2]
    return Births(new_s, first_s, by_glob, by_name)


def _statuses(count: int) -> list[float]:
    check_applied()
    return [timed_kabpfctl("status") for _ in range(count)]


def _added_by_run() -> float:
    began = time.monotonic()
    subprocess.run(["true"], check=True)
    direct_s = time.monotonic() - began
    return timed_kabpfctl("run", "--idle", "60", "true") - direct_s


def _idle(machine: Machine, daemon: Daemon) -> tuple[int, bool]:
    """How often it woke up, and whether the tree was quiet: a birth may wake it, rightly."""
    for _ in range(1 if machine.quick else IDLE_WINDOWS):
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
