"""The network namespaces of processes, and of the whole machine."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator

from kabpf.kernel.mountinfo import all_mounts


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
    return [mount.point for mount in all_mounts() if mount.root.startswith("net:[")]
