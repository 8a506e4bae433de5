"""What a connection costs, and a setsockopt(2) call, with kabpf and with others, on loopback."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

from machine import (
    POLICY,
    Machine,
    Programs,
    Sockets,
    cgroup,
    kabpf_active,
    look_before_syn,
    policy_files,
    taken_off,
)  # fmt: skip

ROUNDS = 8
TURNS = 400  # of 20 cycles without and 20 with what a variant does, a quarter of a second
CALL_TURNS = 200  # likewise, of 1,000 calls
CALLS = 1000  # CALLS in sockets.c

DESTINATIONS = 1000

LIBDONTDIE = {
    "DD_TCP_KEEPALIVE_TIME": "60",
    "DD_TCP_KEEPALIVE_INTVL": "10",
    "DD_TCP_KEEPALIVE_PROBES": "6",
}

THREE = "idle: 60s, interval: 10s, probes: 6"
RANGES = "idle: 30s..60s, interval: 5s..10s, probes: 3..6"


class Variant(NamedTuple):
    """One way to have options on a socket, or none."""

    name: str
    policy: str = ""  # kabpf's, without its selector
    idle_s: tuple[int, int] = (60, 60)  # what the sockets must have, bounds included; 0: off
    user_timeout_ms: int = 0
    setsockopt: bool = False  # the policy needs it
    before_syn: bool = False  # the policy needs it


def destinations(count: int) -> str:
    """Of mixed lengths, a third with ports; all that loopback connections find is the options."""
    numbers = random.Random(count)
    lines = [f"{{to: 127.0.0.0/8, {THREE}}}", "{to: 127.0.0.0/8, ports: [5432], idle: 70s}"]
    networks = set()
    while len(networks) < count - len(lines):
        if numbers.random() < 0.7:
            length = numbers.choice((12, 16, 20, 24, 28, 32))
            address = numbers.getrandbits(24) >> 32 - length << 32 - length
            networks.add(f"10.{address >> 16}.{address >> 8 & 255}.{address & 255}/{length}")
        else:
            networks.add(f"2001:db8:{numbers.getrandbits(16):x}::/{numbers.choice((48, 56, 64))}")
    for number, network in enumerate(sorted(networks)):
        ports = f", ports: [{1 + number}]" if number % 3 == 0 else ""
        lines.append(f"{{to: {network}{ports}, idle: {60 + number % 100}s}}")
    return "keepalive: {idle: 90s}\n    destinations:\n" + "".join(
        f"      - {line}\n" for line in lines
    )


NOTHING = Variant("nothing: the error of measurement", idle_s=(0, 0))
OWN = Variant("own options", user_timeout_ms=120_000)
PRELOADED = Variant("libdontdie")
IDLE = Variant("a sock_ops program that does nothing", idle_s=(0, 0))
NO_POLICY = Variant("kabpf, no policy", idle_s=(0, 0))
PLAIN = Variant("kabpf, three options", f"keepalive: {{{THREE}}}")
ENFORCED = Variant(
    "the same, enforced", f"keepalive: {{{THREE}}}\n    mode: enforce", setsockopt=True
)
RANGED = Variant("the same, as ranges", f"keepalive: {{{RANGES}}}", setsockopt=True)
VARIANTS = (
    NOTHING,
    OWN,
    PRELOADED,
    IDLE,
    NO_POLICY,
    PLAIN,
    Variant(
        "kabpf, four options", f"keepalive: {{{THREE}, user_timeout: auto}}",
        user_timeout_ms=120_000,
    ),
    Variant(f"the three from {DESTINATIONS:,} destinations", destinations(DESTINATIONS)),
    Variant("the three, jitter", f"keepalive: {{{THREE}, jitter: 10%}}", idle_s=(54, 60)),
    Variant(
        "the three, SYN retries", f"keepalive: {{{THREE}, syn_retries: 3}}", before_syn=True
    ),
    Variant(
        "the three, connect timeout", f"keepalive: {{{THREE}, connect_timeout: 10s}}",
        before_syn=True,
    ),
    ENFORCED,
    RANGED,
)  # fmt: skip


class Call(NamedTuple):
    """A setsockopt(2) on a connection, while a policy has setsockopt watched."""

    name: str
    variant: Variant  # whose cgroup it is in
    option: str
    becomes: int  # what it is set to; without kabpf 1


CALLED = (
    Call("an unrelated setsockopt, no policy", NO_POLICY, "nodelay", 1),
    Call("an unrelated setsockopt, under enforce", ENFORCED, "nodelay", 1),
    Call("a setsockopt that is ignored", ENFORCED, "idle", 60),
    Call("a setsockopt that is clamped to a range", RANGED, "idle", 30),
)


class Round(NamedTuple):
    """Nanoseconds a cycle or call, by its name."""

    without_ns: dict[str, float]
    with_ns: dict[str, float]
    alone: bool  # no other sock_ops program was at the root of the tree


class Costs(NamedTuple):
    """Nanoseconds, and medians of those of the rounds that were alone if any was."""

    bare_ns: float  # a cycle
    added_ns: dict[str, float]  # to a cycle, or to a call
    call_ns: dict[str, float]  # without kabpf
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
        stack.enter_context(policy_files({POLICY: _policies(machine, places)}))
        for _ in range(1 if machine.quick else ROUNDS):
            foreign = machine.foreign_programs()
            with kabpf_active(), taken_off(machine) as programs:
                found = _round(machine, places, programs)
            foreign += machine.foreign_programs()
            rounds.append(found._replace(alone=foreign == 0))
    used = [one for one in rounds if one.alone] or rounds
    return Costs(
        statistics.median(one.without_ns[variant.name] for one in used for variant in VARIANTS),
        {
            each.name: statistics.median(
                one.with_ns[each.name] - one.without_ns[each.name] for one in used
            )
            for each in (*VARIANTS, *CALLED)
        },
        {
            call.name: statistics.median(one.without_ns[call.name] for one in used)
            for call in CALLED
        },
        used[0].alone,
        rounds,
    )


def _round(machine: Machine, places: dict[Variant, Path], programs: Programs) -> Round:
    found = Round({}, {}, False)
    for each in random.sample((*VARIANTS, *CALLED), len(VARIANTS) + len(CALLED)):
        run = _run_calls if isinstance(each, Call) else _run
        costs = run(machine, each, places, programs)
        found.without_ns[each.name], found.with_ns[each.name] = costs
    return found


def _run(
    machine: Machine, variant: Variant, places: dict[Variant, Path], programs: Programs
) -> tuple[float, float]:
    """Nanoseconds a cycle without the variant, and with it."""
    look_before_syn(wanted=variant.before_syn)
    sock_ops = programs.sock_ops if variant == NO_POLICY or variant.policy else -1
    process = Sockets(
        machine,
        places[variant],
        *("cycle", max(os.sched_getaffinity(0)), TURNS),
        programs.idle if variant == IDLE else sock_ops,
        *(programs.setsockopt if variant.setsockopt else -1, programs.root),
        *(["own"] if variant == OWN else []),
        env=LIBDONTDIE | {"LD_PRELOAD": libdontdie()} if variant == PRELOADED else None,
        descriptors=programs,
    )
    with process:
        *options, without_ns, with_ns = process.answer()
    least, most = variant.idle_s
    idle_s, user_timeout_ms = options[::2], options[1::2]
    if (
        idle_s[:2] != [0, 0]
        or any(not least <= each <= most for each in idle_s[2:])
        or user_timeout_ms != [0, 0, variant.user_timeout_ms, variant.user_timeout_ms]
    ):
        raise SystemExit(f"{variant.name}: options {options}, expected those of {variant}")
    return without_ns, with_ns


def _run_calls(
    machine: Machine, call: Call, places: dict[Variant, Path], programs: Programs
) -> tuple[float, float]:
    """Nanoseconds a call without kabpf, and with it."""
    process = Sockets(
        machine,
        places[call.variant],
        *("calls", max(os.sched_getaffinity(0)), CALL_TURNS),
        *(programs.sock_ops, programs.setsockopt, programs.root, call.option),
        descriptors=programs,
    )
    with process:
        *values, without_ns, with_ns = process.answer()
    if values != [1, call.becomes]:
        raise SystemExit(f"{call.name}: {values}, expected {[1, call.becomes]}")
    return without_ns / CALLS, with_ns / CALLS


def libdontdie() -> str:
    """The library of Debian's package."""
    listed = subprocess.run(
        ["dpkg", "-L", "libdontdie0"], check=True, stdout=subprocess.PIPE, text=True
    )
    return next(line for line in listed.stdout.splitlines() if line.endswith(".so"))


def _policies(machine: Machine, places: dict[Variant, Path]) -> str:
    text = "policies:\n"
    for number, (variant, place) in enumerate(places.items()):
        if variant.policy:
            text += f"  bench-{number}:\n    select: [{{cgroup: {machine.path(place)}}}]\n"
            text += f"    {variant.policy}\n"
    return text
