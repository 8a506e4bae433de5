"""Waits for the ends of cgroups."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable

from kabpf.apply.transient import Ending
from kabpf.kernel.cgroups import CgroupTree


class Ends:
    """Waits until the last process has left one of several cgroups."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._events: dict[Ending, int] = {}

    def close(self) -> None:
        """Wait no more."""
        for descriptor in self._events.values():
            os.close(descriptor)
        self._poll.close()

    def fileno(self) -> int:
        """A descriptor that can be read from when `news` has something to say."""
        return self._poll.fileno()

    def watch(self, tree: CgroupTree, endings: Iterable[Ending]) -> None:
        """Wait for the end of these cgroups, and of no others."""
        wanted = set(endings)
        for ending in self._events.keys() - wanted:
            os.close(self._events.pop(ending))
        for ending in wanted - self._events.keys():
            with contextlib.suppress(OSError):  # gone already
                path = f"{tree.directory(ending.until.path)}/cgroup.events"
                self._events[ending] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._poll.register(self._events[ending], select.EPOLLPRI)

    def news(self) -> list[Ending]:
        """Those of which the kernel has told something since the last call, or since `watch`. Soon
        after that they may end without a word of it (see apply/watcher.py)."""
        ready = {descriptor for descriptor, _ in self._poll.poll(0)}
        told = [ending for ending, descriptor in self._events.items() if descriptor in ready]
        for ending in told:
            try:
                os.pread(self._events[ending], 4096, 0)  # to be ready for the next event
            except OSError:  # gone, which makes it ready for ever
                os.close(self._events.pop(ending))
        return told
