"""Reads what the kernel prints in /proc and /sys, where text of strangers stands in between.

A process's name, a path or a mount's source may hold any byte but NUL, carriage returns and what
Unicode calls the end of a line included. So this is bytes, whose lines end with a newline alone
(which the kernel escapes or refuses in what others wrote); a field has its place or its name at
the beginning of a line, and a number has its exact shape. os.fsdecode makes text of it last.
"""

from __future__ import annotations

import errno
import os
import re

# More than any file of one process or of the kernel's settings has, but for mountinfo and maps.
BYTES_MAX = 1 << 16
MOUNTINFO_MAX = 64 << 20  # 100,000 mounts (fs.mount-max), each with names of some hundred bytes

_NUMBER = re.compile(rb"[0-9]{1,20}")


def read(path: str, size: int = BYTES_MAX) -> bytes:
    """The first `size` bytes of a file. Raises OSError."""
    found = []
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while size > 0 and (part := os.read(descriptor, min(size, BYTES_MAX))):
            found.append(part)
            size -= len(part)
    finally:
        os.close(descriptor)
    return b"".join(found)


def number(word: bytes) -> int:
    """A decimal number of the kernel's. Raises OSError (EBADMSG) for anything else."""
    if not _NUMBER.fullmatch(word):
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    return int(word)


def fields(text: bytes, name: bytes) -> list[bytes]:
    """The words of the line that begins with `name:`, as in /proc/PID/status. Raises OSError
    (EBADMSG) where there is none."""
    for line in text.split(b"\n"):
        if line.startswith(name + b":"):
            return line[len(name) + 1 :].split()
    raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def started(process: int | str) -> int:
    """When a process was started, in ticks since the machine was (proc_pid_stat(5)). Raises
    OSError."""
    # Its name, in parentheses, may have any of these characters; nothing after it has one.
    after = read(f"/proc/{process}/stat").rpartition(b")")[2].split()
    if len(after) < 20:
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    return number(after[19])


def effective_uid(process: int) -> int:
    """Raises OSError."""
    words = fields(read(f"/proc/{process}/status"), b"Uid")  # proc_pid_status(5)
    if len(words) != 4:
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    return number(words[1])


def cgroup_paths(process: int | str, proc: str = "/proc") -> dict[bytes, bytes]:
    """The paths of a process in the cgroup trees, as /proc/PID/cgroup shows them (cgroups(7)), by
    the controllers of each; cgroup2's are b"". Raises OSError.

    The kernel puts " (deleted)" behind the path of a process that has ended and whose cgroup is
    gone; a cgroup in which a process lives can have a name that ends so.
    """
    paths = {}
    for line in read(f"{proc}/{process}/cgroup").split(b"\n"):
        if len(words := line.split(b":", 2)) == 3:  # hierarchy, controllers, path
            paths[words[1]] = words[2]
    return paths
