"""How often something may be done that strangers cause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """For what takes the longer the more cgroups strangers have made. `now` is the clock, in
    seconds."""

    # It has a tenth of the time at most where it is short, and else begins a second after its end.
    PAUSE, PAUSE_MAX_S = 9, 1.0

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.due = 0.0  # when it may be done again

    @property
    def is_due(self) -> bool:
        """Whether it may be done now."""
        return self.due <= self._now()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """It is done in this block."""
        began = self._now()
        try:
            yield
        finally:
            ended = self._now()
            self.due = ended + min(self.PAUSE * (ended - began), self.PAUSE_MAX_S)
