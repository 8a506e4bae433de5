"""What kabpf costs where there are ten times as many cgroups and policies as the budgets name."""

from __future__ import annotations

import contextlib
import signal
from typing import NamedTuple

from crowd import BORN_IDLE_S, born, check_applied, drop_in, mixed_policies, reload, service, tree
from machine import DROP_INS, Daemon, Machine, policy_files, timed_kabpfctl
from retrofit import holding

POLICIES = 1000
SLICES, SERVICES = 100, 99  # in each slice
CONNECTIONS = 10_000
REPEATS = 3

BORN = f"select: [{{unit: kabpf-bench@*.service}}]\nkeepalive: {{idle: {BORN_IDLE_S}}}\n"


class Costs(NamedTuple):
    """Seconds, unless the name says otherwise."""

    policies: int
    cgroups: int
    connections: int
    start_s: list[float]  # nothing was in the kernel
    adopt_s: list[float]  # everything was
    resident_kib: int
    resident_reloaded_kib: int
    reload_s: list[float]  # one drop-in changed
    status_s: list[float]
    apply_again_s: list[float]  # nothing changed
    sockets_s: list[float]  # kabpfctl sockets, with the connections
    glob_new_s: list[float]  # from a mkdir until a new connection had the options


def measure(machine: Machine) -> Costs:
    repeats = 1 if machine.quick else REPEATS
    policies, slices, connections = (
        each // (5 if machine.quick else 1) for each in (POLICIES, SLICES, CONNECTIONS)
    )
    start_s, adopt_s, glob_new_s = [], [], []
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tree(machine, slices, SERVICES))
        files = mixed_policies(machine, place, policies) | {DROP_INS / "born.yaml": BORN}
        stack.enter_context(policy_files(files))
        for _ in range(repeats):
            with Daemon(machine.scratch) as daemon:
                start_s.append(daemon.start_s)
                resident_kib = daemon.resident_kib()
        Daemon(machine.scratch).stop(signal.SIGKILL)
        check_applied()
        status_s = [timed_kabpfctl("status") for _ in range(5)]
        apply_again_s = [timed_kabpfctl("apply") for _ in range(repeats)]
        busy = place / "bench0.slice" / service(0)
        with holding(machine, busy, connections):
            sockets_s = [timed_kabpfctl("sockets") for _ in range(repeats)]
        for _ in range(repeats - 1):
            daemon = Daemon(machine.scratch)
            adopt_s.append(daemon.start_s)
            daemon.stop(signal.SIGKILL)
        with Daemon(machine.scratch) as daemon:
            adopt_s.append(daemon.start_s)
            changed = DROP_INS / f"{service(100)}.yaml"
            reload_s = [reload(daemon, changed, drop_in(61 + turn)) for turn in range(2 * repeats)]
            resident_reloaded_kib = daemon.resident_kib()
            for number in range(5 if machine.quick else 50):
                new_ns, _, _ = born(machine, place / f"kabpf-bench@{number}.service")
                glob_new_s.append(new_ns / 1e9)
    return Costs(
        policies, slices * (1 + SERVICES), connections, start_s, adopt_s, resident_kib,
        resident_reloaded_kib, reload_s, status_s, apply_again_s, sockets_s, glob_new_s,
    )  # fmt: skip
