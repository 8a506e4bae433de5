"""What containers cost: where no policy names any, nothing; and where one does, from the mkdir of a
container's cgroup to its policy. The files that say what a container is are CRI-O's, all of which
are in /run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from crowd import BORN_IDLE_S, born
from machine import POLICY, Daemon, Machine, cgroup, kabpf_active, policy_files, timed_kabpfctl

BUNDLES = Path("/run/containers/storage/overlay-containers")
HOOKS = Path("/run/kabpf/containers.socket")
MANY = 1000  # containers at once
BORN = 200  # in a row
SETTLED_S = 0.5
NO_CONTAINERS = "policies: {bench: {select: [{unit: bench.service}], keepalive: on}}\n"
NAMED = (
    "policies: {bench: {select: [{container: {name: bench}}],"
    f" keepalive: {{idle: {BORN_IDLE_S}}}}}}}\n"
)


class Costs(NamedTuple):
    """Where no policy names containers, and where one does."""

    imported: int  # modules of engines that kabpfd imports
    watched: int  # sockets for hooks
    wake_ups: int  # of kabpfd, while BORN cgroups of containers are made
    covered_s: list[float]  # from the mkdir until a process in the cgroup saw the options
    apply_s: list[float]  # of MANY containers


def measure(machine: Machine) -> Costs:
    count = BORN // 10 if machine.quick else BORN
    with cgroup(machine.cgroup / "containers") as place:
        with policy_files({POLICY: NO_CONTAINERS}):
            unpaid = _unpaid(machine, place, count)
        try:
            with policy_files({POLICY: NAMED}), Daemon(machine.scratch):
                covered_s = [
                    born(machine, _described(machine, place))[0] / 1e9 for _ in range(count)
                ]
            for _ in range(MANY):
                _described(machine, place).mkdir()
            apply_s = []
            for _ in range(2 if machine.quick else 5):
                with policy_files({POLICY: NAMED}), kabpf_active():
                    apply_s.append(timed_kabpfctl("apply"))
        finally:
            shutil.rmtree(BUNDLES)
    return Costs(*unpaid, covered_s, apply_s)


def _unpaid(machine: Machine, place: Path, count: int) -> tuple[int, int, int]:
    os.environ["PYTHONVERBOSE"] = "1"
    try:
        with Daemon(machine.scratch) as daemon:
            log = (machine.scratch / "kabpfd.log").read_text()
            time.sleep(SETTLED_S)
            wake_ups = daemon.wake_ups(SETTLED_S, lambda: _make(place, count))
            imported = sum(line.startswith("import 'kabpf.engines") for line in log.splitlines())
            assert "import 'kabpf.plan" in log
            return imported, int(HOOKS.exists()), wake_ups
    finally:
        del os.environ["PYTHONVERBOSE"]


def _make(place: Path, count: int) -> None:
    for _ in range(count):
        (place / _name()).mkdir()


def _name() -> str:
    return f"crio-{secrets.token_hex(32)}.scope"


def _described(machine: Machine, place: Path) -> Path:
    """The cgroup to be made of a container whose bundle is on disk."""
    directory = place / _name()
    id = directory.name.removeprefix("crio-").removesuffix(".scope")
    annotations = {
        "io.container.manager": "cri-o",
        "io.kubernetes.cri-o.SandboxID": id,
        "io.kubernetes.cri-o.Name": "bench",
    }
    config = {"annotations": annotations, "linux": {"cgroupsPath": machine.path(directory)}}
    bundle = BUNDLES / id / "userdata"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps(config))
    return directory
