"""What a connection costs: connect, accept and close on loopback, with kabpf and with others."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

from machine import POLICY, Machine, Sockets, cgroup, in_force, policy_files, taken_off

ROUNDS = 12
TURNS = 500  # of 20 cycles without and 20 with what a variant does, a third of a second

LIBDONTDIE = {
    "DD_TCP_KEEPALIVE_TIME": "60",
    "DD_TCP_KEEPALIVE_INTVL": "10",
    "DD_TCP_KEEPALIVE_PROBES": "6",
}


class Variant(NamedTuple):
    """One way to have options on a socket, or none."""

    name: str
    kabpf: bool
    idle_s: int  # what the sockets must have; 0: keepalive is off
    user_timeout_ms: int


VARIANTS = (
    Variant("nothing: the error of measurement", False, 0, 0),
    Variant("own options", False, 60, 120_000),
    Variant("libdontdie", False, 60, 0),
    Variant("kabpf, no policy", True, 0, 0),
    Variant("kabpf, three options", True, 60, 0),
    Variant("kabpf, four options", True, 60, 120_000),
)


class Round(NamedTuple):
    """Nanoseconds a cycle, by variant."""

    without_ns: dict[str, int]
    with_ns: dict[str, int]
    alone: bool  # no other sock_ops program was at the root of the tree


class Costs(NamedTuple):
    """Nanoseconds a cycle, and medians of those of the rounds that were alone if any was."""

    bare_ns: float
    added_ns: dict[str, float]
    alone: bool  # else kabpf shared with others what the kernel does before any program of its hook
    rounds: list[Round]


def measure(machine: Machine) -> Costs:
    """In each round, one process of each variant compares cycles with and without it."""
    rounds: list[Round] = []
    with contextlib.ExitStack() as stack:
        places = {
            variant: stack.enter_context(cgroup(machine.cgroup / f"connections-{index}"))
            for index, variant in enumerate(VARIANTS)
        }
        stack.enter_context(policy_files({POLICY: _policy(machine, places)}))
        for _ in range(2 if machine.quick else ROUNDS):
            foreign = machine.foreign_programs()
            found = Round({}, {}, False)
            with in_force(), taken_off(machine) as descriptors:
                for variant in random.sample(VARIANTS, len(VARIANTS)):
                    costs = _run(machine, variant, places[variant], descriptors)
                    found.without_ns[variant.name], found.with_ns[variant.name] = costs
            foreign += machine.foreign_programs()
            rounds.append(found._replace(alone=foreign == 0))
    used = [one for one in rounds if one.alone] or rounds
    return Costs(
        statistics.median(cost for one in used for cost in one.without_ns.values()),
        {
            variant.name: statistics.median(
                one.with_ns[variant.name] - one.without_ns[variant.name] for one in used
            )
            for variant in VARIANTS
        },
        used[0].alone,
        rounds,
    )


def _run(
    machine: Machine, variant: Variant, place: Path, descriptors: tuple[int, int]
) -> tuple[int, int]:
    """Nanoseconds a cycle without the variant, and with it."""
    process = Sockets(
        machine,
        place,
        *("cycle", max(os.sched_getaffinity(0)), TURNS),
        *(descriptors if variant.kabpf else (-1, -1)),
        *(["own"] if variant.name == "own options" else []),
        env=LIBDONTDIE | {"LD_PRELOAD": libdontdie()} if variant.name == "libdontdie" else None,
        descriptors=descriptors,
    )
    with process:
        *options, without_ns, with_ns = process.answer()
    expected = [0, 0] * 2 + [variant.idle_s, variant.user_timeout_ms] * 2
    if options != expected:
        raise SystemExit(f"{variant.name}: options {options}, expected {expected}")
    return without_ns, with_ns


def libdontdie() -> str:
    """The library of Debian's package."""
    listed = subprocess.run(
        ["dpkg", "-L", "libdontdie0"], check=True, stdout=subprocess.PIPE, text=True
    )
    return next(line for line in listed.stdout.splitlines() if line.endswith(".so"))


def _policy(machine: Machine, places: dict[Variant, Path]) -> str:
    text = "policies:\n"
    for number, (variant, place) in enumerate(places.items()):
        if variant.idle_s and variant.kabpf:
            timeout = ", user_timeout: auto" if variant.user_timeout_ms else ""
            text += (
                f"  bench-{number}:\n"
                f"    select: [{{cgroup: {machine.path(place)}}}]\n"
                f"    keepalive: {{idle: 60s, interval: 10s, probes: 6{timeout}}}\n"
            )
    return text
