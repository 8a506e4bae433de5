"""What kabpf adds to a mkdir, by names and by globs, and what it takes to build many globs, to keep
them and to change one."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crowd import drop_in, reload, tree
from machine import DROP_INS, POLICY, Daemon, Machine, cgroup, kabpf_active, policy_files

from kabpf.plan.globs import compiled_names

MKDIRS = 3000
ROUNDS = 5
TEMPLATES = 100
MANY = 1000  # units with a template
SLICES, SERVICES = 10, 99  # in each slice
NAMES = ("ssh.service", "bench50@main.service", "docker-" + "0123456789abcdef" * 4 + ".scope")


class Costs(NamedTuple):
    """Medians of alternating rounds."""

    mkdir_ns: float  # without kabpf
    literal_ns: float  # one unit's policy
    globs_ns: float  # TEMPLATES of them
    built_s: list[float]  # the automaton of MANY templates
    built_bytes: int  # that it takes in the kernel
    # Of kabpfd, with MANY policies of a template each.
    reload_s: list[float]  # the options of one changed
    reload_glob_s: list[float]  # the template of one changed
    resident_kib: int  # after that


def measure(machine: Machine) -> Costs:
    mkdirs = MKDIRS // 10 if machine.quick else MKDIRS
    settings = {"none": None, "literal": _policy(["ssh.service"]), "globs": _policy(_templates())}
    found: dict[str, list[float]] = {name: [] for name in settings}
    with cgroup(machine.cgroup / "mkdirs") as place:
        for _ in range(2 if machine.quick else ROUNDS):
            for name, policy in settings.items():
                with _under(policy):
                    found[name].append(_median_mkdir_ns(place, mkdirs))
    some = frozenset(glob for each in range(MANY) for glob in _globs(each))
    built_s = []
    for _ in range(5):
        compiled_names.cache_clear()
        began = time.monotonic()
        automaton = compiled_names(some)
        built_s.append(time.monotonic() - began)
    medians = (statistics.median(found[name]) for name in settings)
    return Costs(*medians, built_s, sum(map(len, automaton.blocks)), *_reloads(machine))


def _reloads(machine: Machine) -> tuple[list[float], list[float], int]:
    changed = DROP_INS / "bench0500.yaml"
    files = {DROP_INS / f"bench{number:04}.yaml": _drop_in(number) for number in range(MANY)}
    options_s, glob_s = [], []
    with tree(machine, SLICES, SERVICES), policy_files(files), Daemon(machine.scratch) as daemon:
        for turn in range(2 if machine.quick else ROUNDS):
            glob_s.append(reload(daemon, changed, _drop_in(MANY + turn)))
            options_s.append(reload(daemon, changed, _drop_in(MANY + turn, 61)))
        return options_s, glob_s, daemon.resident_kib()


def _drop_in(number: int, idle_s: int = 60) -> str:
    return f'select: [{{unit: "bench{number}@.service"}}]\n{drop_in(idle_s)}'


def _templates() -> list[str]:
    return [f"bench{number}@.service" for number in range(TEMPLATES)]


def _globs(number: int) -> tuple[str, str]:
    """What the selector of a template comes to."""
    return f"bench{number}@*.service", f"bench{number}@*.socket"


def _policy(units: list[str]) -> str:
    selectors = ", ".join(f'{{unit: "{unit}"}}' for unit in units)
    return f"policies:\n  bench:\n    select: [{selectors}]\n    keepalive: {{idle: 77}}\n"


@contextlib.contextmanager
def _under(policy: str | None) -> Iterator[None]:
    if policy is None:
        yield
        return
    with policy_files({POLICY: policy}), kabpf_active():
        yield


def _median_mkdir_ns(place: Path, count: int) -> float:
    took = []
    for number in range(count):
        directory = place / NAMES[number % len(NAMES)]
        began = time.perf_counter_ns()
        os.mkdir(directory)
        took.append(time.perf_counter_ns() - began)
        os.rmdir(directory)
    return statistics.median(took)
