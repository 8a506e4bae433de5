"""From a cgroup path that a user names to a directory, and to the uid that owns it."""

from __future__ import annotations

import errno
import os
import stat

from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, mountinfo, syscalls
from kabpf.plan.state import Cgroup
from kabpf.policy.model import GLOB
from kabpf.requests.varlink import CallError

PATH_MAX = 4095  # bytes of the directory's path, as the kernel's without the NUL


def opened(path: str, uid: int) -> tuple[Cgroup, int]:
    """The cgroup at a path, and the uid that owns its directory. Raises CallError for what is no
    path of a cgroup, and RefusedError where there is none, or where the caller, `uid`, does not own
    it and a directory above it is closed to them."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    names = path.split("/")[1:]
    if (
        not path.startswith("/")
        or not path.isprintable()
        or GLOB.search(path)
        or len(os.fsencode(tree.directory(path))) > PATH_MAX
        or any(name in ("", ".", "..") for name in names)  # the root, too
    ):
        raise CallError.of_service("InvalidParameter", parameter="cgroup")
    root = os.open(tree.mount, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            status = _status(root, path[1:])
        except RefusedError:
            _check_way(root, names, uid)
            raise
        if uid != status.st_uid:
            _check_way(root, names, uid)
    except RefusedError as error:
        raise RefusedError(
            f"cgroup {path}", error.error, "expected one of the cgroup2 tree"
        ) from None
    finally:
        os.close(root)
    return Cgroup(status.st_ino, 0, path), status.st_uid


def _status(root: int, path: str) -> os.stat_result:
    directory = syscalls.open_within(root, path)
    try:
        if not syscalls.is_cgroup2(directory):
            raise RefusedError("", errno.EXDEV)
        return os.fstat(directory)
    finally:
        os.close(directory)


def _check_way(root: int, names: list[str], uid: int) -> None:
    """Raises RefusedError where a directory on the way to the last of these names is closed to a
    user, or is not there. This process may look into all of them."""
    directory = os.dup(root)
    try:
        for name in names[:-1]:
            inner = syscalls.open_within(directory, name)
            os.close(directory)
            directory = inner
            status = os.fstat(directory)
            search = stat.S_IXUSR if status.st_uid == uid else stat.S_IXOTH
            if uid != 0 and not status.st_mode & search:
                raise RefusedError("", errno.EACCES)
    finally:
        os.close(directory)
