"""Whether kabpfctl monitor keeps up with many connections, and what it costs them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from connections import THREE
from machine import POLICY, Machine, Sockets, cgroup, installed, kabpf_active, policy_files

RATE = 10_000  # connections a second; both ends of each are told of
SECONDS = 5
ROUNDS = 5


class Costs(NamedTuple):
    """What the load and one monitor of each form did."""

    connections: dict[str, int]  # of SECONDS * RATE, by the monitor's form
    told: dict[str, int]  # lines
    lost: dict[str, int]
    busy: dict[str, float]  # the monitor's share of a processor
    cycle_ns: dict[str, list[float]]  # a connection with its accept and close; "none": unwatched


def measure(machine: Machine) -> Costs:
    """The load alone, under a monitor that prints text, and one that prints JSON, in turns."""
    costs = Costs({}, {}, {}, {}, {"none": [], "text": [], "json": []})
    with cgroup(machine.cgroup / "monitor") as place:
        policy = f"policies:\n  bench:\n    select: [{{cgroup: {machine.path(place)}}}]\n"
        policy += f"    keepalive: {{{THREE}}}\n"
        with policy_files({POLICY: policy}), kabpf_active():
            for _ in range(1 if machine.quick else ROUNDS):
                for form in costs.cycle_ns:
                    _round(machine, place, form, costs)
    return costs


def _round(machine: Machine, place: Path, form: str, costs: Costs) -> None:
    output = machine.scratch / "monitor"
    with _monitor(form, output) as process:
        began, used = time.monotonic(), _used_s(process)
        with Sockets(machine, place, "load", RATE, SECONDS) as load:
            connections, cycle_ns = load.answer()
        busy = (_used_s(process) - used) / (time.monotonic() - began)
    costs.cycle_ns[form].append(cycle_ns)
    if form != "none":
        lines = output.read_text().splitlines()
        lost = [line for line in lines if '"lost"' in line or "  lost  " in line]
        counts = [
            json.loads(line)["count"] if form == "json" else int(line.split()[2]) for line in lost
        ]
        costs.connections[form] = costs.connections.get(form, 0) + connections
        costs.lost[form] = costs.lost.get(form, 0) + sum(counts)
        heads = form == "text"
        costs.told[form] = costs.told.get(form, 0) + len(lines) - len(lost) - heads
        costs.busy[form] = max(costs.busy.get(form, 0.0), busy)
    output.unlink(missing_ok=True)


@contextlib.contextmanager
def _monitor(form: str, output: Path) -> Iterator[subprocess.Popen[bytes] | None]:
    """A monitor that writes to a file, and ends when it has written all."""
    if form == "none":
        yield None
        return
    command = [installed("kabpfctl"), "monitor", *(["--json"] if form == "json" else [])]
    with output.open("wb") as file, subprocess.Popen(command, stdout=file) as process:
        time.sleep(2)  # it says nothing when it has begun
        yield process
        time.sleep(2)  # for what waits
        process.send_signal(signal.SIGTERM)


def _used_s(process: subprocess.Popen[bytes] | None) -> float:
    if process is None:
        return 0.0
    words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(word) for word in words[11:13]) / os.sysconf("SC_CLK_TCK")


def added_ns(costs: Costs, form: str) -> float:
    """To a connection, both ends of which are told of."""
    return statistics.median(costs.cycle_ns[form]) - statistics.median(costs.cycle_ns["none"])
