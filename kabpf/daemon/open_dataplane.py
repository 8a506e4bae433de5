"""The data plane that the daemon has open, and the births that it tells of."""

from __future__ import annotations

import contextlib
import select

from kabpf.errors import RefusedError
from kabpf.kernel.dataplane import Born, Dataplane
from kabpf.kernel.libbpf.buffers import RingBuffer


class OpenDataplane:
    """The data plane that is open, if one is, and the births of cgroups that wait to be resolved.

    `poll` ends when there are new ones.
    """

    def __init__(self, poll: select.epoll) -> None:
        self._poll = poll
        self._identity = 0
        self._events: RingBuffer | None = None
        self._births: list[Born] = []
        self._events_dropped = 0
        self.loaded: Dataplane | None = None
        self.is_damaged = False  # the kernel does not do what it should, until one is open again

    def open(self, loaded: Dataplane) -> None:
        """Take over a data plane that is open, and hear of births; none was open before."""
        self.loaded, self.is_damaged = loaded, False
        self._identity = loaded.identity()
        self._events = loaded.events(self._births.append)
        self._poll.register(self._events, select.EPOLLIN)

    def close(self) -> None:
        """Close the data plane, if one is open; what is pinned stays so."""
        if self._events:
            self._poll.unregister(self._events)
            self._events.close()
        if self.loaded:
            self.loaded.close()
        self._events = self.loaded = None
        self._births.clear()

    def is_current(self) -> bool:
        """Whether the data plane that is pinned is the one that is open here, and active."""
        if self.loaded:
            with contextlib.suppress(RefusedError):
                self.loaded.check()
                return self.loaded.identity() == self._identity
        return False

    @property
    def has_births(self) -> bool:
        """Whether births wait that were heard of."""
        return bool(self._births)

    def hear_births(self) -> bool:
        """Receive new births; whether any wait."""
        if self._events:
            self._events.consume()
        return self.has_births

    def take_births(self) -> list[Born]:
        """The births that waited; they wait no more."""
        births = self._births[:]
        self._births.clear()
        return births

    def forget_births(self) -> list[Born]:
        """Drop the births that wait, before the whole tree is read; they are the answer. A data
        plane is open."""
        assert self.loaded
        self.hear_births()
        self._events_dropped = self.loaded.totals().events_dropped
        return self.take_births()

    def has_lost_births(self) -> bool:
        """Whether the kernel dropped births since `forget_births`. A data plane is open."""
        assert self.loaded
        return self.loaded.totals().events_dropped != self._events_dropped
