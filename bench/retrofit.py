"""What it costs to set the options of connections that are open already."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from connections import DESTINATIONS, destinations
from machine import POLICY, Machine, Sockets, cgroup, kabpf_active, policy_files, timed_kabpfctl

from kabpf.kernel import abi, dataplane
from kabpf.kernel.libbpf import maps
from kabpf.plan.state import CgroupEntry

CONNECTIONS = 100_000
REPEATS = 3

# A listener of each process has a port below the ephemeral ones, and an address for each 20,000
# connections in a network of its own.
PORT = 1000


class Costs(NamedTuple):
    """Seconds for `sockets` sockets; of the iterator alone unless they are the command's."""

    sockets: int
    first_s: list[float]  # where the sockets had no option yet
    changed_s: list[float]  # where they had those of another policy
    to_destinations_s: list[float]  # the same, to a policy with many destinations
    from_destinations_s: list[float]  # from there, with all former policies that are remembered
    attach_s: float  # kabpfctl attach as a whole, where they had none
    attach_changed_s: float
    audit_s: list[float]  # kabpfctl audit of half as many sockets


class Cgroup:
    """What the kernel has for a cgroup, to be changed without a reconcile."""

    def __init__(self, place: Path) -> None:
        self._key = abi.key(place.stat().st_ino, 8)

    @property
    def policy_id(self) -> int:
        return self._read().policy_id

    def write(self, policy_id: int, *, owed: bool = False, was: tuple[int, ...] = ()) -> None:
        entry = self._read()._replace(policy_id=policy_id, owed=owed, was=was)
        with self._map() as entries:
            entries.update(self._key, abi.entry(entry))

    def _read(self) -> CgroupEntry:
        with self._map() as entries:
            return abi.read_entry(entries.look_up(self._key) or b"")

    def _map(self) -> maps.Map:
        return dataplane.open_map(dataplane.PINS, "kabpf_cgroups")


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
    count = CONNECTIONS // 10 if machine.quick else CONNECTIONS
    costs = Costs(2 * count, [], [], [], [], 0, 0, [])
    with contextlib.ExitStack() as stack:
        names = ("retrofit", "former", "destinations", "last")
        places = [stack.enter_context(cgroup(machine.cgroup / name)) for name in names]
        place = places[0]
        policies = "policies:\n"
        for index, options in enumerate((_keepalive(60), _keepalive(90), None, _keepalive(120))):
            policies += (
                f"  bench-{index}:\n    select: [{{cgroup: {machine.path(places[index])}}}]\n"
            )
            policies += f"    {options or destinations(DESTINATIONS)}\n"
        for _ in range(1 if machine.quick else REPEATS):
            with policy_files({POLICY: policies}), kabpf_active():
                _updates(machine, places, costs)
        with kabpf_active(), holding(machine, place, count) as holders:
            attach_s = _attach(place, 60)
            _expect(holders.with_idle(60), 2 * count)
            attach_changed_s = _attach(place, 90)
            _expect(holders.with_idle(90), 2 * count)
        with kabpf_active(), holding(machine, place, count // 2):
            costs.audit_s.extend(
                timed_kabpfctl("audit", "--timeout", "350s") for _ in range(REPEATS)
            )
    return costs._replace(attach_s=attach_s, attach_changed_s=attach_changed_s)


def _updates(machine: Machine, places: list[Path], costs: Costs) -> None:
    """Connections are opened under no policy and go from one to the next."""
    first, second, many, last = (Cgroup(place).policy_id for place in places)
    entry = Cgroup(places[0])
    entry.write(0)
    with holding(machine, places[0], costs.sockets // 2) as holders:
        for found, idle_s, policy_id, was in (
            (costs.first_s, 60, first, ()),
            (costs.changed_s, 90, second, (first,)),
            (costs.to_destinations_s, 60, many, (second,)),
            (costs.from_destinations_s, 120, last, (many, second, first, last)),
        ):
            entry.write(policy_id, owed=True, was=was)
            found.append(_exhausted_s())
            _expect(holders.with_idle(idle_s), costs.sockets)


def _keepalive(idle_s: int) -> str:
    return f"keepalive: {{idle: {idle_s}s, interval: 10s, probes: 6, user_timeout: auto}}"


def _attach(place: Path, idle_s: int) -> float:
    return timed_kabpfctl(
        "attach", "--cgroup", str(place), "--idle", f"{idle_s}s", "--interval", "10s",
        "--probes", "6", "--user-timeout", "auto",
    )  # fmt: skip


def _exhausted_s() -> float:
    """Seconds that the iterator takes. It writes nothing; a read ends with EAGAIN after every
    million objects (bpf_seq_read() in kernel/bpf/bpf_iter.c)."""
    began = time.monotonic()
    descriptor = os.open(dataplane.PINS / "kabpf_retrofit", os.O_RDONLY)
    with open(descriptor, "rb", buffering=0) as iterator:
        while iterator.read(4096) is None:
            pass
    return time.monotonic() - began


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise SystemExit(f"{found} sockets have the options, expected {wanted}")


@contextlib.contextmanager
def holding(machine: Machine, place: Path, count: int) -> Iterator[Holders]:
    """So many connections on loopback, both ends in a cgroup."""
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
