"""Containers of a Docker that is not there: its files, and cgroups as it makes them."""

import json
import secrets
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import shared
from harness import path_of

CONFIGS = Path("/var/lib/docker")
BUNDLES = Path("/run/docker")


@contextmanager
def directories():
    """Docker's, for this session alone."""
    with ExitStack() as stack:
        for path in (CONFIGS, BUNDLES):
            stack.enter_context(shared.directory(path))
            subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
            stack.callback(subprocess.run, ["umount", path], check=True)
        yield


class Container:
    """A container of Docker's: its cgroup, and the files that say what it is."""

    def __init__(self, make_cgroup, name="web-1", labels=None):
        self.id = secrets.token_hex(32)
        self.name, self.labels = name, {"team": "shop"} if labels is None else labels
        self._parent = make_cgroup()
        self.path = f"{path_of(self._parent)}/docker-{self.id}.scope"
        self._make = make_cgroup

    def describe(self):
        """Write the files, as Docker and containerd do before they start it."""
        config = {"ID": self.id, "Name": f"/{self.name}", "Config": {"Labels": self.labels}}
        bundle = {"linux": {"cgroupsPath": self.path}}
        for file, content in (
            (CONFIGS / "containers" / self.id / "config.v2.json", config),
            (
                BUNDLES / "containerd/daemon/io.containerd.runtime.v2.task/moby"
                / self.id / "config.json",
                bundle,
            ),
        ):  # fmt: skip
            file.parent.mkdir(parents=True)
            fresh = file.with_suffix(".new")
            fresh.write_text(json.dumps(content))
            fresh.rename(file)

    def start(self):
        """Make its cgroup."""
        return self._make(f"docker-{self.id}.scope")
