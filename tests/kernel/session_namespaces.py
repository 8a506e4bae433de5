"""The namespaces of a test session: entered once, whichever tier is the first to want them, as what
one tier's fixtures have started would not find its cgroups in a second one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cgroup_namespace
import shared

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000

DIRECTORIES = ("/etc/kabpf", "/run/kabpf", "/var/lib/kabpf")

_entered: list[Path] = []  # the cgroup namespace that was left, once for each that is inside

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def entered() -> Iterator[Path]:
    """Inside, this process has a mount namespace and a cgroup namespace of its own, with its own
    directories and BPF file system; given is the cgroup namespace that it left."""
    with ExitStack() as held:
        _entered.append(_entered[0] if _entered else held.enter_context(_own()))
        yield _entered[0]
        # Whoever was the first ends it, as fixtures of a session end together.
        _entered.pop()


@contextmanager
def _own() -> Iterator[Path]:
    with ExitStack() as held:
        for path in DIRECTORIES:
            held.enter_context(shared.directory(Path(path)))
        if _libc.unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        _mount(b"none", b"/", b"", MS_REC | MS_PRIVATE)
        for path in DIRECTORIES:
            mount("tmpfs", path)
        mount("bpf", "/sys/fs/bpf")
        mount("proc", "/proc")  # a container may have a /proc/sys that can't be written
        yield held.enter_context(cgroup_namespace.entered())
        for path in ("/proc", *DIRECTORIES, "/sys/fs/bpf"):
            unmount(path)


def mount(kind: str, target: Path | str) -> None:
    """Mount a new file system."""
    _mount(kind.encode(), os.fsencode(target), kind.encode())


def unmount(target: Path | str) -> None:
    """Unmount the uppermost one."""
    _libc.umount(os.fsencode(target))


def _mount(source: bytes, target: bytes, kind: bytes, flags: int = 0) -> None:
    data = b"mode=755" if kind in (b"tmpfs", b"bpf") else None
    if _libc.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), f"mount {os.fsdecode(target)}")
