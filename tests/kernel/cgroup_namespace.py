"""A cgroup namespace of a test session's own: what is active there covers nobody else, so that
sessions, workers and the machine's own kabpf can be at work at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import PATIENCE, cgroup_root

CLONE_NEWCGROUP, MNT_DETACH = 0x2000000, 2

libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def entered() -> Iterator[Path]:
    """Inside, this process is in a new cgroup, which is the root of the tree that it sees, and so
    are its children; given is the namespace that it left. It needs a mount namespace of its own.

    All processes below that cgroup end with it."""
    point = cgroup_root()
    here = re.search(r"^0::(/.*)", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    assert here
    name = f"kabpf-session-{os.getpid()}"
    # Descriptors keep the tree that is here now; a file that is open in it lets us back.
    tree = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    home = os.open(f"{point}{here[1]}/cgroup.procs", os.O_WRONLY)
    left = os.open("/proc/self/ns/cgroup", os.O_RDONLY)
    _remove_stale(tree)
    os.mkdir(name, dir_fd=tree)
    _write(tree, f"{name}/cgroup.procs", "0")
    _check(libc.unshare(CLONE_NEWCGROUP), "unshare")
    mountpoint = os.fsencode(point)
    _check(libc.umount2(mountpoint, MNT_DETACH), "umount")
    _check(libc.mount(b"none", mountpoint, b"cgroup2", 0, None), "mount")
    yield Path(f"/proc/{os.getpid()}/fd/{left}")
    libc.umount2(mountpoint, MNT_DETACH)
    os.write(home, b"0")
    _remove(tree, name)
    for descriptor in (left, home, tree):
        os.close(descriptor)


def _remove_stale(tree: int) -> None:
    """Those of sessions that were killed."""
    for name in os.listdir(tree):
        if name.startswith("kabpf-session-") and not Path("/proc", name.split("-")[2]).exists():
            with contextlib.suppress(FileNotFoundError):  # another session is at it
                _remove(tree, name)


def _remove(tree: int, name: str) -> None:
    _write(tree, f"{name}/cgroup.kill", "1")
    deadline = time.monotonic() + 10 * PATIENCE
    while "populated 0" not in _read(tree, f"{name}/cgroup.events"):
        assert time.monotonic() < deadline, f"waited for the end of {name}"
        time.sleep(0.01)
    for directory, _, _, _ in os.fwalk(name, topdown=False, dir_fd=tree):
        os.rmdir(directory, dir_fd=tree)


def _write(tree: int, path: str, text: str) -> None:
    with open(os.open(path, os.O_WRONLY, dir_fd=tree), "w") as file:
        file.write(text)


def _read(tree: int, path: str) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=tree)) as file:
        return file.read()


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)
