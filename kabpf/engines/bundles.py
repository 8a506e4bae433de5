"""What is in an OCI bundle's config.json, which is there before the first process runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from kabpf.engines import files

_SLICE_MAX = 255  # characters of a unit's name (UNIT_NAME_MAX of systemd, which counts a NUL)


@dataclass(frozen=True)
class Bundle:
    """A container as its runtime was told to make it."""

    annotations: dict[str, str]
    cgroup: str  # the path that its cgroup has to have; "" where this does not tell


def read(directory: Path, name: str) -> Bundle:
    """The bundle whose directory is `name` beneath an engine's. Raises OSError."""
    config = files.read_object(directory, f"{name}/config.json")
    path = files.text(files.inside(config, "linux").get("cgroupsPath"))
    return Bundle(files.texts(files.inside(config, "annotations")), cgroup(path))


def cgroup(path: str) -> str:
    """The path of a cgroup by the `cgroupsPath` of the OCI runtime's specification."""
    if path.startswith("/"):  # the cgroupfs driver
        return path.rstrip("/")
    slice_, colon, rest = path.partition(":")
    prefix, second_colon, name = rest.partition(":")
    if not colon or not second_colon:
        return ""  # below the runtime's own cgroup, which nobody knows later
    if len(slice_) > _SLICE_MAX:
        return ""  # none that systemd would make
    # runc, libcontainer/cgroups/systemd/common.go (getUnitName()), and crun, cgroup-systemd.c
    scope = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return f"{_expanded(slice_ or 'system.slice')}/{scope}"


@functools.lru_cache(maxsize=1024)
def _expanded(slice_: str) -> str:
    """The path of a slice, whose name has those above it (systemd.slice(5))."""
    words = slice_.removesuffix(".slice").split("-")
    if not any(words):  # -.slice, the root
        return ""
    return "".join(f"/{'-'.join(words[: count + 1])}.slice" for count in range(len(words)))
