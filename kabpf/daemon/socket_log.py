"""What happens to sockets of policies that want it logged, on its way to the journal."""

from __future__ import annotations

import contextlib
import logging
import select
from typing import TYPE_CHECKING, NamedTuple

from kabpf.errors import KabpfError
from kabpf.kernel import dataplane
from kabpf.kernel.cgroups import CgroupTree

if TYPE_CHECKING:
    from kabpf.observe.events import Monitor
    from kabpf.observe.journal import Journal

log = logging.getLogger("kabpfd")


class _Listening(NamedTuple):
    monitor: Monitor
    journal: Journal
    resources: contextlib.ExitStack


class SocketLog:
    """Listens while a policy wants its sockets logged, and writes to the journal what it hears.

    `poll` ends while there is something new to write.
    """

    def __init__(self, tree: CgroupTree, poll: select.epoll) -> None:
        self._tree, self._poll = tree, poll
        self._open: _Listening | None = None

    def listen(self, *, policies: int) -> None:
        """Log sockets from now on for so many policies, or for none; called before one that wants
        it becomes active."""
        if not policies:
            self.close()
            return
        if not self._open or not self._open.monitor.is_current():
            self.close()
            try:
                self._open = self._begin()
            except KabpfError as error:
                log.warning("sockets are not logged: %s", error)
                return
        else:
            self._open.journal.forget_units()  # systemd may have reloaded its own
        self._open.journal.policies = policies

    def keep_up(self) -> None:
        """Listen anew where not everything is heard of any more."""
        if self._open:
            self.listen(policies=self._open.journal.policies)

    def write(self) -> None:
        """Write what there is."""
        if self._open:
            for event in self._open.monitor.read():
                self._open.journal.write(event)
            self._open.journal.settle()

    @property
    def due(self) -> float | None:
        """When to write though there is nothing new, by time.monotonic()."""
        if not self._open:
            return None
        return 0 if self._open.monitor.is_waiting else self._open.journal.due

    def close(self) -> None:
        """Write what there is, and listen no more."""
        if self._open:
            for _ in range(2):  # what is too young for the first look
                self.write()
            self._open.resources.close()
            self._open = None

    def _begin(self) -> _Listening:
        from kabpf.observe.events import Monitor  # here, because most machines log no socket
        from kabpf.observe.journal import Journal

        with contextlib.ExitStack() as stack:
            monitor = stack.enter_context(Monitor(dataplane.PINS, self._tree, log=True))
            journal = stack.enter_context(Journal(_say))
            for descriptor in monitor.descriptors():
                self._poll.register(descriptor, select.EPOLLIN)
                stack.callback(self._poll.unregister, descriptor)
            return _Listening(monitor, journal, stack.pop_all())


def _say(line: str) -> bool:
    """Log a line; False where standard error takes none now, as its reader is not waited for."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if not poll.poll(0):
        return False
    log.info("%s", line)
    return True
