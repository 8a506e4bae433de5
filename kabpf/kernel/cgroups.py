"""The cgroup2 tree as a file system: where it is, which cgroups it has, and which processes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kabpf import proc
from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel.mountinfo import Mount
from kabpf.plan.state import Cgroup

PROCESSES_MAX = 32 << 20  # 4 million (PID_MAX_LIMIT), a line each


def find_tree(mounted: list[Mount]) -> CgroupTree:
    """The cgroup2 tree: at /sys/fs/cgroup, in hybrid mode at /sys/fs/cgroup/unified, or elsewhere.

    In a cgroup namespace its root is the namespace's. Raises UnsupportedError where there is none.
    """
    for mount in mounted:
        if mount.type == "cgroup2" and mount.root == "/":
            return CgroupTree(Path(mount.point))
    raise UnsupportedError(
        "no cgroup2 tree is mounted whose root is this cgroup namespace's,"
        " expected one at /sys/fs/cgroup, as systemd mounts it"
    )


@dataclass(frozen=True)
class CgroupTree:
    """The cgroup2 tree mounted at `mount`."""

    mount: Path

    def cgroups(self) -> list[Cgroup]:
        """Every cgroup, parents before their children; one that vanishes meanwhile is left out."""
        root = Cgroup(os.stat(self.mount).st_ino, 0, "/")
        return [root, *self.below(root)]

    def below(self, cgroup: Cgroup) -> list[Cgroup]:
        """The cgroups inside `cgroup`, parents before their children."""
        inside: list[Cgroup] = []
        waiting = [cgroup]
        while waiting:
            children = self._children(waiting.pop())
            inside += children
            waiting += children
        return inside

    def path(self, path: str) -> str:
        """The cgroup path of a directory below the mount; another absolute path is taken for one
        itself. Raises RefusedError for a relative path that leads elsewhere."""
        if not path:
            raise RefusedError("no cgroup", hint=f"expected a directory below {self.mount}")
        absolute = "/" + os.path.abspath(path).lstrip("/")  # abspath() keeps a second one
        if absolute == str(self.mount):
            return "/"
        if absolute.startswith(f"{self.mount}/"):
            return absolute.removeprefix(str(self.mount))
        if not path.startswith("/"):
            raise RefusedError(f"cgroup {path}", hint=f"expected a directory below {self.mount}")
        return absolute

    def find(self, path: str) -> Cgroup:
        """The cgroup at a directory below the mount, or at a cgroup path.

        Raises RefusedError where there is none.
        """
        inside = self.path(path)
        directory = self.directory(inside)
        try:
            status = os.stat(directory, follow_symlinks=False)
            parent = os.stat(os.path.dirname(directory))
            if not stat.S_ISDIR(status.st_mode) or status.st_dev != os.stat(self.mount).st_dev:
                raise NotADirectoryError(errno.ENOTDIR, "")
        except OSError as error:
            raise RefusedError(
                f"cgroup {path}", error.errno or 0, f"expected a directory below {self.mount}"
            ) from None
        return Cgroup(status.st_ino, 0 if inside == "/" else parent.st_ino, inside)

    def directory(self, path: str) -> str:
        """Where a cgroup path is in the file system."""
        return str(self.mount) if path == "/" else f"{self.mount}{path}"

    def processes(self, paths: Iterable[str]) -> set[int]:
        """The processes in exactly the cgroups at these paths, seen from this pid namespace."""
        processes: set[int] = set()
        for path in paths:
            # In a threaded cgroup cgroup.procs can't be read (EOPNOTSUPP); its threads can.
            for name in ("cgroup.procs", "cgroup.threads"):
                try:
                    text = proc.read(f"{self.directory(path)}/{name}", PROCESSES_MAX)
                    processes.update(map(proc.number, text.split()))
                except OSError:
                    continue
                break
        return processes - {0}

    def has(self, cgroup: Cgroup) -> bool:
        """Whether the cgroup is there still."""
        try:
            return os.stat(self.directory(cgroup.path)).st_ino == cgroup.id
        except OSError:
            return False

    def is_populated(self, cgroup: Cgroup) -> bool:
        """Whether a process lives in the cgroup or below it; the root has no such file and does."""
        try:
            events = proc.read(f"{self.directory(cgroup.path)}/cgroup.events")
            return b"populated 0" not in events.split(b"\n")
        except OSError:
            return cgroup.path == "/"

    def _children(self, cgroup: Cgroup) -> list[Cgroup]:
        directory = self.directory(cgroup.path)
        try:
            # kernfs counts the directories below one in its link count: most cgroups have none, and
            # need no listing of their forty files.
            if os.stat(directory).st_nlink == 2:
                return []
            with os.scandir(directory) as entries:
                inside = [(entry.inode(), entry.name) for entry in entries if entry.is_dir()]
        except OSError:
            return []  # removed meanwhile
        prefix = cgroup.path.rstrip("/")
        return [Cgroup(inode, cgroup.id, f"{prefix}/{name}") for inode, name in inside]


def path_of_process(pid: int | str) -> str:
    """The cgroup path of a process, or of "self". Raises RefusedError where it is outside of the
    tree of this cgroup namespace."""
    try:
        path = os.fsdecode(proc.cgroup_paths(pid).get(b"", b""))
    except OSError as error:
        raise RefusedError(f"process {pid}", error.errno or 0, "expected one that runs") from None
    # In a cgroup namespace it may lead outside.
    if not path or f"{path}/".startswith("/../"):
        raise RefusedError(f"process {pid} is outside of this cgroup2 tree", hint="expected inside")
    return path
