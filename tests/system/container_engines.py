"""Real container engines in a machine, and a container of each whose first act is a connection."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from harness import PROGRAMS
from machine import PROGRAMS_INSIDE, Machine

IMAGE = "registry.example/first:1"
# runc joins a session keyring.
OPTIONS = ("--system-call-filter=@keyring",)

# A host whose cgroup2 tree has no controllers, or that may not raise limits, lets crun and runc set
# none; containers/storage's overlay needs whiteouts, which Debian 12's asks for by mknod(2).
_STORAGE = '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "{}"\n'
_GRAPH_ROOT = "/var/lib/containers/storage"
_RUNC = """#!/usr/bin/python3 -I
import json, os, sys
if "create" in sys.argv:
    place = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    with open(place) as file:
        config = json.load(file)
    config["linux"].pop("resources", None)
    with open(place, "w") as file:
        json.dump(config, file)
os.execv("/usr/sbin/runc", ["runc", *sys.argv[1:]])
"""
_SETTINGS_OF_CONTAINERD = (
    *("-e", "s/SystemdCgroup = false/SystemdCgroup = true/"),
    *("-e", "s/restrict_oom_score_adj = false/restrict_oom_score_adj = true/"),
    *("-e", 's/snapshotter = "overlayfs"/snapshotter = "native"/'),
    *("-e", 's|sandbox_image = ".*"|sandbox_image = "registry.example/first:1"|'),
)

# All that the engines know, by cgroup.
_FACTS = """
import dataclasses, json, os
from kabpf.containers import names
from kabpf.engines.engines import Engines
found = {}
for directory, _, _ in os.walk("/sys/fs/cgroup"):
    path = directory.removeprefix("/sys/fs/cgroup")
    if identity := names.identify(path):
        container = Engines().facts(path, identity.id)
        found[path] = container and dataclasses.asdict(container)
print(json.dumps([found, [dataclasses.asdict(each) for each in Engines().found()]]))
"""


def facts(machine: Machine) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What the installed package knows of all containers by their cgroups, and the engines."""
    known, found = json.loads(machine.run("python3", "-I", "-c", _FACTS))
    return known, found


def compile_first(directory: Path) -> Path:
    """The file tree of the image."""
    tree = directory / "image"
    (tree / "dev").mkdir(parents=True)
    for name in ("proc", "sys", "etc", "run", "tmp"):
        (tree / name).mkdir()
    source = str(PROGRAMS / "first.c")
    subprocess.run(["clang", "-O2", "-static", "-o", tree / "first", source], check=True)
    return tree


class Podman:
    """podman with crun."""

    name = "podman"
    command: tuple[str, ...] = ("podman",)
    options: tuple[str, ...] = ("--privileged", "--pids-limit=0")

    def __init__(self, machine: Machine, image: Path) -> None:
        self._machine = machine
        self._set_up()
        tar = machine.root / "run/image.tar"
        subprocess.run(["tar", "-C", image, "-cf", tar, "."], check=True)
        self._import()
        tar.unlink()

    def _set_up(self) -> None:
        self._store("/var/lib/containers")
        self._machine.write("/etc/containers/storage.conf", _STORAGE.format(_GRAPH_ROOT))

    def _store(self, path: str) -> None:
        """A store can't be on an overlay."""
        self._machine.run("mkdir", "-p", path)
        self._machine.run("mount", "-t", "tmpfs", "tmpfs", path)

    def _import(self) -> None:
        change = ("--change", 'CMD ["/first", "pause"]')  # for the sandboxes of pods
        self._machine.run(*self.command, "import", *change, "/run/image.tar", IMAGE)

    def first(self, name: str, *options: str) -> tuple[int, int]:
        """Run a container to its end: the idle time of its first socket, and after how many
        microseconds that was the policy's, or -1."""
        idle, after = self._machine.run(
            *(*self.command, "run", "--rm", "--network=none", f"--name={name}"),
            *(*self.options, *options, IMAGE, "/first"),
        ).split()
        return int(idle), int(after)

    def start(self, name: str, *options: str) -> str:
        """Start a container that stays; returns its id."""
        return self._machine.run(
            *(*self.command, "run", "--detach", "--network=none", f"--name={name}"),
            *(*self.options, *options, IMAGE, "/first", "stay"),
        )


class Docker(Podman):
    """Docker with runc, without a network of its own."""

    name = "docker"
    command = ("docker",)
    options = ()

    def _set_up(self) -> None:
        self._store("/var/lib/docker")
        self._store("/var/lib/containerd")
        self._machine.write("/etc/docker/daemon.json", '{"bridge": "none", "iptables": false}')
        self._machine.run("systemctl", "start", "docker.service")


class Containerd:
    """containerd by its CRI socket, with pods as kubelet makes them."""

    name = "containerd"

    def __init__(self, machine: Machine, image: Path) -> None:
        self._machine = machine
        podman = Podman(machine, image)
        podman._store("/var/lib/containerd")
        machine.run("podman", "save", "--format=docker-archive", "--output=/run/save.tar", IMAGE)
        machine.write("/usr/local/sbin/runc", _RUNC)
        machine.run("chmod", "+x", "/usr/local/sbin/runc")
        settings = machine.run("containerd", "config", "default")
        machine.write(
            "/etc/containerd/config.toml",
            machine.run("sed", *_SETTINGS_OF_CONTAINERD, stdin=settings),
        )
        machine.run("systemctl", "start", "containerd.service")
        machine.run("ctr", "-n", "k8s.io", "images", "import", "/run/save.tar")

    def first(self, name: str) -> tuple[int, int]:
        """As Podman's, in a pod of this name."""
        idle, after = self._cri(name, "/first").split()
        return int(idle), int(after)

    def start(self, name: str) -> None:
        """Start a pod that stays."""
        self._cri(name, "/first", "stay")

    def _cri(self, *arguments: str) -> str:
        return self._machine.run("python3", f"{PROGRAMS_INSIDE}/cri.py", *arguments)


ENGINES = (Podman, Docker, Containerd)
