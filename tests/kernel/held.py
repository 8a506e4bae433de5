"""The kernel's objects of one kabpf: they have no owner, and are told by who holds them.

An object lives as long as a pin, an attachment, a descriptor or another object holds it. Those of a
kabpf are held by its BPF file system, by cgroups of its tree and by the processes in these."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("prog", "map", "link")  # as bpftool and /proc/PID/fdinfo have them

_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_BPF_OBJ_GET = 7
_libc = ctypes.CDLL(None, use_errno=True)


def objects(cgroup: Path, bpffs: Path) -> dict[str, dict[int, str]]:
    """The ids and names of kabpf's programs, maps and links, by kind, that are held by a BPF file
    system, a cgroup, or what is below that. A link's name is its program's."""
    held = _attached(cgroup) | _open(cgroup) | _pinned(bpffs)
    if not held:
        return {kind: {} for kind in KINDS}
    all = {kind: {one["id"]: one for one in listed(kind, "list")} for kind in KINDS}
    below = {os.stat(directory).st_ino for directory in _directories(cgroup)}
    held |= {("link", id) for id, one in all["link"].items() if one.get("cgroup_id") in below}
    links = [one for id, one in all["link"].items() if ("link", id) in held]
    held |= {("prog", one["prog_id"]) for one in links if "prog_id" in one}
    programs = [one for id, one in all["prog"].items() if ("prog", id) in held]
    held |= {("map", id) for one in programs for id in one.get("map_ids", ())}
    for link in links:
        link["name"] = all["prog"].get(link.get("prog_id"), {}).get("name", "")
    return {
        kind: {
            id: one["name"]
            for id, one in all[kind].items()
            if (kind, id) in held and one.get("name", "").startswith("kabpf")
        }
        for kind in KINDS
    }


def _attached(cgroup: Path) -> set[tuple[str, int]]:
    """By links or without, to the cgroup and those below."""
    trees = listed("cgroup", "tree", str(cgroup))
    return {("prog", program["id"]) for tree in trees for program in tree["programs"]}


def _pinned(bpffs: Path) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for directory, _, names in os.walk(bpffs):
        for name in names:
            descriptor = _get(os.fsencode(os.path.join(directory, name)))
            if descriptor >= 0:
                found |= _described(f"/proc/self/fdinfo/{descriptor}")
                os.close(descriptor)
    return found


def _get(path: bytes) -> int:
    """A descriptor of a pinned object; a negative number where nothing is pinned (any more)."""
    name = ctypes.create_string_buffer(path)
    attributes = (ctypes.c_uint64 * 2)(ctypes.addressof(name), 0)
    return int(_libc.syscall(_BPF, _BPF_OBJ_GET, attributes, ctypes.sizeof(attributes)))


def _open(cgroup: Path) -> set[tuple[str, int]]:
    """By the processes in the cgroup and in those below."""
    found: set[tuple[str, int]] = set()
    for directory in _directories(cgroup):
        with contextlib.suppress(OSError):  # removed, or a threaded cgroup, which kabpf is never in
            for pid in Path(directory, "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    for name in os.listdir(f"/proc/{pid}/fd"):
                        with contextlib.suppress(OSError):
                            if "bpf" in os.readlink(f"/proc/{pid}/fd/{name}"):
                                found |= _described(f"/proc/{pid}/fdinfo/{name}")
    return found


def _described(fdinfo: str) -> set[tuple[str, int]]:
    text = Path(fdinfo).read_text()
    return {(kind, int(id)) for kind, id in re.findall(r"^(prog|map|link)_id:\s*(\d+)", text, re.M)}


def _directories(cgroup: Path) -> Iterator[str]:
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(FileNotFoundError):
            os.stat(directory)
            yield directory


def listed(*command: str) -> list[dict[str, Any]]:
    """What bpftool lists, given what it is asked for: it fails where another session's objects go
    meanwhile."""
    for _ in range(100):
        done = subprocess.run(["bpftool", "--json", *command], capture_output=True)
        if done.returncode == 0:
            return json.loads(done.stdout or b"[]")
    raise AssertionError(f"bpftool does not list what there is: {done.stderr!r}")
