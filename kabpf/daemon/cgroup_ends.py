"""Waits for the ends of cgroups."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable

from kabpf.kernel.cgroups import CgroupTree
from kabpf.policy.model import Until


class Ends:
    """Waits until the last process has left one of several cgroups."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._events: dict[Until, int] = {}

    def close(self) -> None:
        """Wait no more."""
        for descriptor in self._events.values():
            os.close(descriptor)
        self._poll.close()

    def fileno(self) -> int:
        """A descriptor that can be read from when `happened` has something to say."""
        return self._poll.fileno()

    def watch(self, tree: CgroupTree, untils: Iterable[Until]) -> None:
        """Wait for the end of these cgroups, and of no others."""
        wanted = set(untils)
        for until in self._events.keys() - wanted:
            os.close(self._events.pop(until))
        for until in wanted - self._events.keys():
            with contextlib.suppress(OSError):  # gone already
                path = f"{tree.directory(until.path)}/cgroup.events"
                self._events[until] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._poll.register(self._events[until], select.EPOLLPRI)

    def happened(self) -> bool:
        """Whether the last process has left one of them since the last call."""
        is_over = False
        ready = {descriptor for descriptor, _ in self._poll.poll(0)}
        for until, descriptor in list(self._events.items()):
            if descriptor in ready:
                try:
                    is_over |= b"populated 0" in os.pread(descriptor, 4096, 0)
                except OSError:  # gone, which makes it ready for ever
                    is_over = True
                    os.close(self._events.pop(until))
        return is_over
