"""What is mounted, as /proc/self/mountinfo (proc(5)) says it."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from kabpf import proc


class Mount(NamedTuple):
    """One line of /proc/PID/mountinfo (proc(5))."""

    device: int
    root: str
    point: str
    type: str


def mounts(mountinfo: bytes) -> list[Mount]:
    """The mounts of a mountinfo text, in its order."""
    mounted = []
    # The kernel escapes space, tab, newline and backslash alone (mangle() in fs/proc_namespace.c):
    # a name may hold what Python takes for the end of a line or of a word.
    for line in filter(None, mountinfo.split(b"\n")):
        before, _, after = line.partition(b" - ")
        words = before.split(b" ")
        device = os.makedev(*map(proc.number, words[2].split(b":")))
        type_ = os.fsdecode(after.split(b" ")[0])
        mounted.append(Mount(device, _unescaped(words[3]), _unescaped(words[4]), type_))
    return mounted


def own_mounts() -> list[Mount]:
    """The mounts of cgroup2 trees and of BPF file systems among `visible_mounts`."""
    return [mount for mount in visible_mounts() if mount.type in ("cgroup2", "bpf")]


def visible_mounts() -> list[Mount]:
    """The mounts of cgroup trees, also of v1, and of BPF file systems, but for those hidden by a
    later one."""
    types = ("cgroup", "cgroup2", "bpf")
    return [mount for mount in all_mounts() if mount.type in types and _is_on_top(mount)]


def all_mounts() -> list[Mount]:
    """Every mount of this process's namespace, hidden ones included."""
    return mounts(proc.read("/proc/self/mountinfo", proc.MOUNTINFO_MAX))


def _is_on_top(mount: Mount) -> bool:
    try:
        return os.stat(mount.point).st_dev == mount.device
    except OSError:
        return False


def _unescaped(word: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), word))
