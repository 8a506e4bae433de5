"""Signals that wait until the daemon deals with them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable


class Signals:
    """The signals that have arrived. A context manager; after it they wake nobody up."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = tuple(numbers)
        self._wake, self._wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.arrived: set[int] = set()

    def __enter__(self) -> Signals:
        for number in self._numbers:
            signal.signal(number, lambda number, _: self.arrived.add(number))
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._wake_end)

    def fileno(self) -> int:
        """A descriptor that can be read from when a signal has arrived since the last `drain`."""
        return self._wake

    def drain(self) -> None:
        """Have the descriptor wait for the next signal; what has arrived stays."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
