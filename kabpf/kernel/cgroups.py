"""The cgroup2 tree as a file system: where it is, which cgroups it has, and who lives in them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kabpf.errors import RefusedError, UnsupportedError
from kabpf.plan import Cgroup


@dataclass(frozen=True)
class Mount:
    """One line of /proc/PID/mountinfo (proc(5))."""

    device: int
    root: str
    point: str
    type: str


def mounts(mountinfo: str) -> list[Mount]:
    """The mounts of a mountinfo text, in its order."""
    found = []
    # The kernel escapes space, tab, newline and backslash alone (mangle() in fs/proc_namespace.c):
    # a name may hold what Python takes for the end of a line or of a word.
    for line in filter(None, mountinfo.split("\n")):
        before, _, after = line.partition(" - ")
        words = before.split(" ")
        device = os.makedev(*map(int, words[2].split(":")))
        found.append(Mount(device, _unescaped(words[3]), _unescaped(words[4]), after.split(" ")[0]))
    return found


def own_mounts() -> list[Mount]:
    """The mounts of this process that kabpf works with, but for those hidden by a later one."""
    return [mount for mount in visible_mounts() if mount.type in ("cgroup2", "bpf")]


def visible_mounts() -> list[Mount]:
    """The same, and those of cgroup v1."""
    types = ("cgroup", "cgroup2", "bpf")
    return [mount for mount in _all_mounts() if mount.type in types and _is_on_top(mount)]


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
        found: list[Cgroup] = []
        waiting = [cgroup]
        while waiting:
            children = self._children(waiting.pop())
            found += children
            waiting += children
        return found

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
        found: set[int] = set()
        for path in paths:
            # In a threaded cgroup cgroup.procs can't be read (EOPNOTSUPP); its threads can.
            for name in ("cgroup.procs", "cgroup.threads"):
                try:
                    text = Path(self.directory(path), name).read_text()
                except OSError:
                    continue
                found.update(int(word) for word in text.split())
                break
        return found - {0}

    def has(self, cgroup: Cgroup) -> bool:
        """Whether the cgroup is there still."""
        try:
            return os.stat(self.directory(cgroup.path)).st_ino == cgroup.id
        except OSError:
            return False

    def is_populated(self, cgroup: Cgroup) -> bool:
        """Whether a process lives in the cgroup or below it; the root has no such file and does."""
        try:
            events = Path(self.directory(cgroup.path), "cgroup.events").read_text()
            return "populated 0" not in events
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


def path_of_process(pid: str) -> str:
    """The cgroup path of a process, or of "self". Raises RefusedError where it is outside of the
    tree of this cgroup namespace."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError as error:
        raise RefusedError(f"process {pid}", error.errno or 0, "expected one that runs") from None
    # The line of the cgroup2 tree (cgroups(7)); in a cgroup namespace it may lead outside by "..".
    found = re.search(r"^0::(/.*?)( \(deleted\))?$", text, re.MULTILINE)
    if not found or "/.." in found[1]:
        raise RefusedError(f"process {pid} is outside of this cgroup2 tree", hint="expected inside")
    return found[1]


def network_namespaces(processes: Iterable[int] | None = None) -> Iterator[int]:
    """A descriptor of each network namespace that threads of these processes are in, open until the
    next is asked for; with None, of every one that a process or a mount of the machine holds.

    A thread that is gone leaves the turn to the next one in its namespace.
    """
    mounted = _namespace_mounts() if processes is None else ()
    if processes is None:
        processes = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    seen: set[int] = set()
    for path in itertools.chain(["/proc/self/ns/net"], _namespace_paths(processes), mounted):
        try:
            if os.stat(path).st_ino in seen:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            inode = os.fstat(descriptor).st_ino
            if inode not in seen:
                seen.add(inode)
                yield descriptor
        finally:
            os.close(descriptor)


def _namespace_paths(processes: Iterable[int]) -> Iterator[str]:
    for process in processes:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{process}/task"):
                yield f"/proc/{process}/task/{thread}/ns/net"


def _namespace_mounts() -> Iterable[str]:
    return [mount.point for mount in _all_mounts() if mount.root.startswith("net:[")]


def _all_mounts() -> list[Mount]:
    return mounts(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))


def _is_on_top(mount: Mount) -> bool:
    try:
        return os.stat(mount.point).st_dev == mount.device
    except OSError:
        return False


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)
