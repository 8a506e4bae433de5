"""What it costs to set the options of connections that are open already."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from machine import Machine, Sockets, cgroup, in_force, timed_kabpfctl

from kabpf import dataplane, reconcile
from kabpf.dataplane import Dataplane
from kabpf.plan import Changes, Entry, Record
from kabpf.policy import Options

CONNECTIONS = 100_000
REPEATS = 3

# A listener of each process has a port below the ephemeral ones, and an address for each 20,000
# connections in a network of its own.
PORT = 1000


class Costs(NamedTuple):
    """Seconds for `sockets` sockets."""

    sockets: int
    first_s: list[float]  # the iterator alone, where the sockets had no option yet
    changed_s: list[float]  # where they had those of another policy
    attach_s: float  # kabpfctl attach as a whole, where they had none
    attach_changed_s: float


class Holders:
    """Processes that hold connections open, as many as the limit of open files takes."""

    def __init__(self, running: list[Sockets]) -> None:
        self._running = running

    def with_idle(self, idle_s: int) -> int:
        """How many of their sockets have this idle time."""
        for holder in self._running:
            holder.say(idle_s)
        return sum(holder.answer()[0] for holder in self._running)


def measure(machine: Machine) -> Costs:
    """The iterator alone runs through what reconcile calls, without the look at tree and files."""
    count = CONNECTIONS // 10 if machine.quick else CONNECTIONS
    first_s, changed_s = [], []
    with cgroup(machine.cgroup / "retrofit") as place:
        for _ in range(1 if machine.quick else REPEATS):
            with in_force(), _holding(machine, place, count) as holders:
                first_s.append(_owe(machine, place, holders, count, 0, 1))
                changed_s.append(_owe(machine, place, holders, count, 1, 2))
        with in_force(), _holding(machine, place, count) as holders:
            attach_s = _attach(place, holders, count, 60)
            attach_changed_s = _attach(place, holders, count, 90)
    return Costs(2 * count, first_s, changed_s, attach_s, attach_changed_s)


def per_second(sockets: int, seconds: list[float]) -> float:
    return sockets / statistics.median(seconds)


def _attach(place: Path, holders: Holders, count: int, idle_s: int) -> float:
    passed_s = timed_kabpfctl(
        "attach", "--cgroup", str(place), "--idle", f"{idle_s}s", "--interval", "10s",
        "--probes", "6", "--user-timeout", "auto",
    )  # fmt: skip
    _expect(holders.with_idle(idle_s), 2 * count)
    return passed_s


def _owe(
    machine: Machine, place: Path, holders: Holders, count: int, was_id: int, policy_id: int
) -> float:
    """Seconds to retrofit from one policy, 0 for none, to another; the latter's idle time is 100 s
    times its id."""
    found = machine.tree.find(str(place))
    idle_s = 100 * policy_id
    options = Options(True, idle_s, 10 * policy_id, 5 + policy_id, idle_s * 2000)
    with reconcile.locked(), Dataplane(dataplane.PINS, machine.tree) as loaded:
        state = loaded.entries([found.id])[found.id].state
        owed = {found.id: Entry(state, policy_id, was_id, True)}
        loaded.apply(Changes(records={policy_id: Record(f"bench-{policy_id}", options)}), {})
        loaded.apply(Changes(cgroups=owed), {})
        began = time.monotonic()
        loaded.apply(Changes(retrofits=owed), {found.id: found.path})
        passed_s = time.monotonic() - began
    _expect(holders.with_idle(idle_s), 2 * count)
    return passed_s


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise SystemExit(f"{found} sockets have the options, expected {wanted}")


@contextlib.contextmanager
def _holding(machine: Machine, place: Path, count: int) -> Iterator[Holders]:
    each = (_open_files_max() - 64) // 2
    with contextlib.ExitStack() as stack:
        running = []
        for number in range(-(-count // each)):
            share = min(each, count - number * each)
            holder = Sockets(machine, place, "hold", share, PORT + number, number)
            running.append(stack.enter_context(holder))
        for holder in running:
            holder.answer()
        yield Holders(running)


def _open_files_max() -> int:
    """What a process may have, raised as far as this machine allows."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
