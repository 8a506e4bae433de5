"""The cgroup2 tree as a file system: where it is, which cgroups it has, and which processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kabpf import proc
from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel.mountinfo import Mount
from kabpf.kernel.walk import Unread, is_gone, opened, walk
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
        "no cgroup2 tree is mounted whose root is this cgroup namespace's;"
        " mount one at /sys/fs/cgroup, as systemd does"
    )


class Removed(NamedTuple):
    """Where a cgroup was that is removed."""

    parent_id: int
    name: str


def add_removed(cgroups: dict[int, Cgroup], removed: Mapping[int, Removed]) -> None:
    """Put those that are removed where they were, if that is known: they have the policies that
    their paths have. Both by their ids."""
    for id in removed:
        above = [id]
        while above[-1] not in cgroups and above[-1] in removed:
            above.append(removed[above[-1]].parent_id)
        if above[-1] in cgroups:
            for parent, child in itertools.pairwise(reversed(above)):
                cgroups[child] = cgroups[parent].child(child, removed[child].name)


class CgroupTree:
    """The cgroup2 tree mounted at `mount`."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount

    @property
    def is_whole(self) -> bool:
        """Whether no cgroup is outside, as others are in a cgroup namespace: the machine's own root
        has the id 1 (kernel/cgroup/cgroup.c, cgroup_setup_root())."""
        return self.root().id == 1

    def cgroups(self, unread: Unread | None = None) -> list[Cgroup]:
        """Every cgroup, parents before their children; one that vanishes meanwhile is left out.
        What can't be looked at is noted in `unread`."""
        root = self.root()
        return [root, *self.below(root, unread)]

    def below(self, cgroup: Cgroup, unread: Unread | None = None) -> list[Cgroup]:
        """The cgroups inside `cgroup`, parents before their children, as `cgroups` has them."""
        return list(self.each_below(cgroup, unread))

    def each_below(self, cgroup: Cgroup, unread: Unread | None = None) -> Iterator[Cgroup]:
        """The same one by one, for who may not want all."""
        noted = Unread() if unread is None else unread
        return (each for each, _ in walk(cgroup, self.directory(cgroup.path), noted))

    def opened(self, unread: Unread) -> Iterator[tuple[Cgroup, int]]:
        """Every cgroup but the root, each with a descriptor until the next one is asked for."""
        for cgroup, descriptor in walk(self.root(), str(self.mount), unread, opens_all=True):
            if descriptor is not None:
                yield cgroup, descriptor

    def root(self) -> Cgroup:
        """The root of the tree."""
        return Cgroup(os.stat(self.mount).st_ino, 0, "/")

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
                    text = self._read(path, name)
                except OSError:
                    continue
                processes.update(map(proc.number, text.split()))
                break
        return processes - {0}

    def has(self, cgroup: Cgroup) -> bool:
        """Whether the cgroup is there still, or can't be reached."""
        try:
            with self._directory(cgroup.path) as descriptor:
                return os.fstat(descriptor).st_ino == cgroup.id
        except OSError as error:
            return not is_gone(error)

    def belongs_to(self, cgroup: Cgroup, uid: int) -> bool:
        """Whether the cgroup is there still and its directory is that user's, or can't be
        reached."""
        try:
            with self._directory(cgroup.path) as descriptor:
                status = os.fstat(descriptor)
        except OSError as error:
            return not is_gone(error)
        return (status.st_ino, status.st_uid) == (cgroup.id, uid)

    def owner(self, path: str) -> int | None:
        """The uid that owns a cgroup's directory; None where it is gone or can't be reached."""
        try:
            with self._directory(path or "/") as descriptor:
                return os.fstat(descriptor).st_uid
        except OSError:
            return None

    def id_above(self, path: str) -> int | None:
        """The id of the cgroup above a path; None where it is gone or can't be reached."""
        try:
            with self._directory(path.rpartition("/")[0] or "/") as descriptor:
                return os.fstat(descriptor).st_ino
        except OSError:
            return None

    def is_populated(self, cgroup: Cgroup) -> bool:
        """Whether a process lives in the cgroup or below it, as in one that can't be reached; the
        root has no such file and does."""
        try:
            return b"populated 0" not in self._read(cgroup.path, "cgroup.events").split(b"\n")
        except OSError as error:
            return cgroup.path == "/" or not is_gone(error)

    @contextlib.contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        descriptor = opened(self.directory(path))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, path: str, name: str) -> bytes:
        with self._directory(path) as descriptor:  # not by its path, which may be too long
            return proc.read(f"/proc/self/fd/{descriptor}/{name}", PROCESSES_MAX)


def path_of_process(pid: int | str) -> str:
    """The cgroup path of a process, or of "self". Raises RefusedError where it is outside of the
    tree of this cgroup namespace."""
    try:
        path = os.fsdecode(proc.cgroup_paths(pid).get(b"", b""))
    except OSError as error:
        raise RefusedError(
            f"process {pid}", error.errno or 0, "expected a running process"
        ) from None
    # In a cgroup namespace it may lead outside.
    if not path or f"{path}/".startswith("/../"):
        raise RefusedError(
            f"process {pid} is outside this cgroup namespace", hint="run kabpfctl on the host"
        )
    return path
