"""Updates of open sockets by another process, for which the daemon does not wait: cgroups are born
meanwhile, and some of them are to be resolved before their first connection."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kabpf.apply import retrofit
from kabpf.apply.retrofit import Left
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS
from kabpf.plan.state import CgroupEntry

_PIECE = 1 << 16  # bytes


class Done(NamedTuple):
    """An update that has ended."""

    owed: dict[int, CgroupEntry]  # the entries as they were when it began
    left: Left
    is_of_all: bool  # of every cgroup that was owed it
    refused: str = ""  # why no socket was updated, if so


class SocketUpdates:
    """At most one update is under way; what comes meanwhile is begun when it has ended. `poll` ends
    when there is news of it."""

    def __init__(self, tree: CgroupTree, poll: select.epoll) -> None:
        self._tree, self._poll = tree, poll
        self._answer = -1  # a descriptor, while one is under way
        self._received = b""
        self._began = 0.0
        self._owed: dict[int, CgroupEntry] = {}
        self._is_of_all = False
        # What is to be begun next: with the processes that may have the sockets.
        self._next: dict[int, CgroupEntry] = {}
        self._processes: set[int] | None = set()

    def close(self) -> None:
        """Wait for nothing any more; what is under way goes on, and its cgroups stay owed."""
        self._let_go()
        self._next, self._processes = {}, set()

    @property
    def due(self) -> float | None:
        """When `take` has something to do though there is no news, by time.monotonic(), or None."""
        if self._answer >= 0:
            return self._began + retrofit.ANSWER_S
        return 0 if self._next else None

    def add(self, owed: Mapping[int, CgroupEntry], processes: Iterable[int] | None = None) -> None:
        """Have the open sockets of these cgroups updated, as by `retrofit.update`. The caller does
        not hold the lock, which is for others while this is under way."""
        self._next |= owed
        if processes is None or self._processes is None:
            self._processes = None
        else:
            self._processes |= {*processes}

    def take(self) -> Done | None:
        """What has ended, once; or else begins what waits."""
        done = self._ended()
        if done is None and self._answer < 0 and self._next:
            done = self._begin()
        return done

    def _begin(self) -> Done | None:
        self._owed, self._is_of_all = self._next, self._processes is None
        processes, self._next, self._processes = self._processes, {}, set()
        try:
            self._answer = retrofit.begin(self._owed, PINS, self._tree.mount, processes)
        except RefusedError as error:
            return Done(self._owed, Left(), self._is_of_all, str(error))
        os.set_blocking(self._answer, False)
        self._poll.register(self._answer, select.EPOLLIN)
        self._received, self._began = b"", time.monotonic()
        return None

    def _ended(self) -> Done | None:
        if self._answer < 0:
            return None
        try:
            while piece := os.read(self._answer, _PIECE):
                self._received += piece
            return self._done()
        except BlockingIOError:
            pass
        except OSError:  # as where its process ended before it read what it was asked (ECONNRESET)
            return self._done()
        if time.monotonic() > self._began + retrofit.ANSWER_S:
            return self._done()
        return None

    def _done(self) -> Done:
        self._let_go()
        try:
            left, refused = retrofit.answered(self._received), ""
        except RefusedError as error:
            left, refused = Left(), str(error)
        return Done(self._owed, left, self._is_of_all, refused)

    def _let_go(self) -> None:
        if self._answer >= 0:
            self._poll.unregister(self._answer)
            os.close(self._answer)
            self._answer = -1
