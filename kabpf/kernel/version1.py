"""Cgroups of version 1, which kabpf can't cover, and where their processes are in version 2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from kabpf import proc
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups
from kabpf.kernel.mountinfo import Mount

PROCESSES_MAX = 1000  # looked at in one cgroup
PLACES_MAX = 5  # named in one text


def described(path: str, mounts: Iterable[Mount]) -> str:
    """What there is to say of a path that is a cgroup of version 1 alone: a directory below a mount
    of it, or its path there. "" where it is none."""
    for mount in mounts:
        if mount.type != "cgroup":
            continue
        for directory in (path, f"{mount.point}{path}"):
            inside = os.path.normpath(directory)
            if inside.startswith(f"{mount.point}/") and os.path.isdir(inside):
                return f"{path} is a cgroup of version 1 ({inside}); {_places(inside)}"
    return ""


def _places(directory: str) -> str:
    found = dict.fromkeys(
        place
        for above, _, _ in os.walk(directory)
        for process in _processes(above)
        if (place := _place(process))
    )
    if not found:
        return "it has no process"
    shown = ", ".join(list(found)[:PLACES_MAX])
    more = f" and {len(found) - PLACES_MAX} more" if len(found) > PLACES_MAX else ""
    return f"its processes are in {shown}{more} of version 2"


def _processes(directory: str) -> list[bytes]:
    with contextlib.suppress(OSError):
        return proc.read(f"{directory}/cgroup.procs").split()[:PROCESSES_MAX]
    return []


def _place(process: bytes) -> str:
    with contextlib.suppress(RefusedError):
        return cgroups.path_of_process(process.decode())
    return ""
