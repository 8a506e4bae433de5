"""Which files lie on a file system that is mounted after kabpf.service starts, if at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from kabpf import root_files
from kabpf.kernel import mountinfo
from kabpf.kernel.mountinfo import Mount

# What systemd mounts in remote-fs.target, after the network (fstype_is_network() in its
# src/basic/mount-util.c), and what a program in user space serves.
_OF_NETWORK = (
    *("9p", "afs", "ceph", "cifs", "davfs", "gfs", "gfs2", "glusterfs", "lustre", "ncp", "ncpfs"),
    *("nfs", "nfs4", "ocfs2", "orangefs", "pvfs2", "smb3", "smbfs", "sshfs", "virtiofs"),
)
FSTAB_MAX = 1 << 20  # bytes
_LATE_OPTIONS = {"_netdev", "noauto", "nofail", "x-systemd.automount"}  # fstab(5), systemd.mount(5)


def mount_points(mounts: Iterable[Mount], fstab: str) -> set[str]:
    """Where such file systems are mounted, or will be."""
    by_type = {each.point for each in mounts if _is_late(each.type)}
    return by_type | {
        words[1]
        for line in fstab.splitlines()
        if len(words := line.split()) >= 4 and not words[0].startswith("#")
        if _is_late(words[2]) or _LATE_OPTIONS & set(words[3].split(","))
    }


def place_of(path: Path, late: set[str]) -> str | None:
    """The mount point of those in `late` below which a file or its target lies. Where kabpf itself
    lies below, it starts later, too."""
    for place in (os.path.realpath(path), os.path.realpath(path.parent)):
        for above in (place, *map(str, Path(place).parents)):
            if above in late and not Path(__file__).is_relative_to(above):
                return above
    return None


def warnings(paths: Iterable[Path], fstab: Path = Path("/etc/fstab")) -> list[str]:
    """A line for each of these files that kabpf.service may not find at a boot."""
    text, mounts = "", list[Mount]()
    with contextlib.suppress(OSError):
        text = os.fsdecode(root_files.beginning(fstab, FSTAB_MAX))
    with contextlib.suppress(OSError):  # without /proc
        mounts = mountinfo.all_mounts()
    late = mount_points(mounts, text)
    return [
        f"{path}: lies below {place}, which may be mounted after kabpf.service starts, expected a"
        " file that is there from the start"
        for path in paths
        if (place := place_of(path, late))
    ]


def _is_late(type_: str) -> bool:
    return type_ in _OF_NETWORK or type_.startswith("fuse.") or type_ == "autofs"
