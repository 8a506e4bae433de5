"""The network namespaces of the machine, and ways to enter them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kabpf import proc
from kabpf.kernel import syscalls
from kabpf.kernel.mountinfo import all_mounts

OWN = "/proc/self/ns/net"
WAYS_MAX = 4  # to one namespace, as processes end


@dataclass(frozen=True)
class Namespace:
    """A network namespace, by its inode number."""

    inode: int
    paths: list[str] = field(default_factory=list)  # that lead to it, and may end
    sockets: list[tuple[int, int]] = field(default_factory=list)  # in it: process and descriptor

    def open(self) -> int | None:
        """A descriptor of it, or None where no way leads to it any more.

        Raises OSError where it is there and can't be opened.
        """
        refused: OSError | None = None
        ways = [
            *(functools.partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC) for path in self.paths),
            *(functools.partial(syscalls.namespace_of_socket, *one) for one in self.sockets),
        ]
        for way in ways:
            try:
                descriptor = way()
            except (FileNotFoundError, ProcessLookupError):
                continue
            except OSError as error:
                refused = error
                continue
            if os.fstat(descriptor).st_ino == self.inode:
                return descriptor
            os.close(descriptor)
        if refused:
            raise refused
        return None


def own_namespace() -> Namespace:
    """That of this process."""
    return Namespace(os.stat(OWN).st_ino, [OWN])


def held_namespaces(processes: Iterable[int] | None = None) -> dict[int, Namespace]:
    """The network namespaces that threads of these processes are in, by their inode numbers; with
    None, those of every process, and of every mount that can be seen from here."""
    found: dict[int, Namespace] = {}
    paths: list[Iterable[str]] = []
    if processes is None:
        processes = (int(name) for name in os.listdir("/proc") if name.isdecimal())
        paths.append(mount.point for mount in all_mounts() if mount.root.startswith("net:["))
    for path in (path for each in (_paths_of(processes), *paths) for path in each):
        with contextlib.suppress(OSError):
            inode = os.stat(path).st_ino
            ways = found.setdefault(inode, Namespace(inode)).paths
            if len(ways) < WAYS_MAX:
                ways.append(path)
    return found


def has_tcp_sockets() -> bool:
    """Whether the namespace of this thread has a TCP socket that listens or is connected, or is
    about to be: what the kernel counts when it enters a socket into its tables (inet_hash(),
    sock_prot_inuse_add())."""
    for name, words in (("sockstat", (b"TCP", b"inuse")), ("sockstat6", (b"TCP6", b"inuse"))):
        try:
            values = proc.fields(proc.read(f"/proc/thread-self/net/{name}"), words[0])
            count = proc.number(values[values.index(words[1]) + 1])
        except (OSError, ValueError, IndexError):
            if name == "sockstat":
                return True  # unknown
            continue  # without IPv6
        if count:
            return True
    return False


def _paths_of(processes: Iterable[int]) -> Iterator[str]:
    for process in processes:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{process}/task"):
                yield f"/proc/{process}/task/{thread}/ns/net"
