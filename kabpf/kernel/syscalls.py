"""System calls that Python lacks, by ctypes: mount, setns, renameat2, openat2, fstatfs, capget,
pidfd_getfd, and setsockopt of a descriptor."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os

from kabpf.errors import RefusedError
from kabpf.faults import fault_point

RENAME_EXCHANGE = 2
CLONE_NEWNET = 0x40000000
SYS_OPENAT2 = 437  # on all architectures but Alpha
SYS_PIDFD_GETFD = 438  # the same
SIOCGSKNS = 0x894C

# RESOLVE_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS and _BENEATH (openat2(2))
RESOLVE_WITHIN = 0x01 | 0x02 | 0x04 | 0x08
RESOLVE_BENEATH = RESOLVE_WITHIN & ~0x01  # where a mount may be on the way
CGROUP2_SUPER_MAGIC = 0x63677270  # statfs(2)
LINUX_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


def enter_network_namespace(descriptor: int) -> None:
    """Go into a network namespace for good (setns(2))."""
    if libc().setns(descriptor, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise RefusedError(f"enter {os.readlink(f'/proc/self/fd/{descriptor}')}", error)


def namespace_of_socket(process: int, descriptor: int) -> int:
    """A descriptor of the network namespace of a socket that another process has open
    (pidfd_getfd(2), and SIOCGSKNS of linux/sockios.h). Raises OSError."""
    target = os.pidfd_open(process)
    try:
        own = copy_descriptor(target, descriptor)
    finally:
        os.close(target)
    try:
        return fcntl.ioctl(own, SIOCGSKNS)
    finally:
        os.close(own)


def copy_descriptor(process: int, descriptor: int) -> int:
    """A copy of a descriptor of a process that a pidfd is of (pidfd_getfd(2)). Raises OSError."""
    own = libc().syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
    if own < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(own)


def has_option(descriptor: int, level: int) -> bool:
    """Whether setsockopt(2) takes an option of this level, of which no more is said."""
    return not libc().setsockopt(descriptor, level, 0, b"", 0)


def mount_bpffs(path: str) -> None:
    """Mount a BPF file system (mount(2)), as systemd does at boot."""
    if libc().mount(b"bpf", path.encode(), b"bpf", 0, b"mode=700"):
        raise RefusedError(f"mount a BPF file system at {path}", ctypes.get_errno())


def exchange(one: str, other: str) -> bool:
    """Let two files or directories change their places in one step (renameat2(2)).

    False where the file system can't: bpffs since Linux kernel commit 6429e46304ac ("libfs: Support
    RENAME_EXCHANGE in simple_rename()") (in v5.17).
    """
    fault_point("exchange the pins")
    if libc().renameat2(-1, one.encode(), -1, other.encode(), RENAME_EXCHANGE):
        if ctypes.get_errno() == errno.EINVAL:
            return False
        raise RefusedError(f"exchange {one} and {other}", ctypes.get_errno())
    return True


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_within(directory: int, path: str) -> int:
    """A descriptor, good for fstat(2), of the directory at a path below another one, to which no
    symbolic link, no mount and no ".." out of it leads (openat2(2))."""
    try:
        return _openat2(directory, path, os.O_PATH | os.O_DIRECTORY, RESOLVE_WITHIN)
    except OSError as error:
        raise RefusedError(f"open {path}", error.errno or 0) from None


def open_file_beneath(directory: int, path: str) -> int:
    """A descriptor to read what is at a path below a directory, to which no symbolic link and no
    ".." out of it leads (openat2(2)). It waits for nobody. Raises OSError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    return _openat2(directory, path, flags, RESOLVE_BENEATH)


def _openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    opened = libc().syscall(SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), size)
    if opened < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(opened)


def is_cgroup2(descriptor: int) -> bool:
    """Whether a descriptor is of a cgroup2 tree (fstatfs(2))."""
    status = ctypes.create_string_buffer(256)  # more than any struct statfs, which f_type begins
    if libc().fstatfs(descriptor, status):
        raise RefusedError("look at a file system", ctypes.get_errno())
    return ctypes.c_long.from_buffer(status).value & 0xFFFFFFFF == CGROUP2_SUPER_MAGIC


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def effective_capabilities(process: int) -> int:
    """The effective capabilities of a process, or with 0 of this one, a bit each (capget(2)).

    Raises OSError where there is no such process.
    """
    header = _CapabilityHeader(LINUX_CAPABILITY_VERSION_3, process)
    halves = (_CapabilityData * 2)()
    if libc().capget(ctypes.byref(header), halves):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(halves[0].effective) | int(halves[1].effective) << 32


def trim_heap() -> None:
    """Give the system back what of the heap is free (malloc_trim(3), which glibc alone has)."""
    if hasattr(libc(), "malloc_trim"):
        libc().malloc_trim(0)


@functools.cache
def libc() -> ctypes.CDLL:
    """The C library, which keeps errno for ctypes.get_errno()."""
    return ctypes.CDLL(None, use_errno=True)
