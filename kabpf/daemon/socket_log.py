"""What happens to sockets of policies that want it logged, on its way to the journal."""

from __future__ import annotations

import contextlib
import logging
import select

from kabpf.kernel import dataplane
from kabpf.kernel.cgroups import CgroupTree

log = logging.getLogger("kabpfd")


class SocketLog:
    """What happens to sockets of policies that want it logged, on its way to the journal."""

    def __init__(self, tree: CgroupTree) -> None:
        from kabpf.observe.events import Monitor  # here, because most machines log no socket
        from kabpf.observe.journal import Journal

        with contextlib.ExitStack() as stack:
            self._monitor = stack.enter_context(Monitor(dataplane.PINS, tree, log=True))
            self._journal = stack.enter_context(Journal(_say))
            self._stack = stack.pop_all()

    def close(self) -> None:
        for _ in range(2):  # what is too young for the first look
            self.write()
        self._stack.close()

    def descriptors(self) -> list[int]:
        """Of which one is readable when there is something new to write."""
        return self._monitor.descriptors()

    @property
    def due(self) -> float | None:
        """When to write though there is nothing new, by time.monotonic()."""
        return 0 if self._monitor.is_waiting else self._journal.due

    def is_current(self) -> bool:
        """Whether everything is heard of."""
        return self._monitor.is_current()

    def write(self) -> None:
        for event in self._monitor.read():
            self._journal.write(event)
        self._journal.settle()


def _say(line: str) -> bool:
    """Log a line; False where standard error takes none now, as its reader is not waited for."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if not poll.poll(0):
        return False
    log.info("%s", line)
    return True
