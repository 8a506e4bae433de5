"""What the daemon does at a certain time, though nothing happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto


class Timer(Enum):
    """What becomes due."""

    REST = auto()  # after which policies are taken back again, whose cgroups have ended
    END = auto()  # of a policy whose cgroup the kernel has told something of
    LOOK = auto()  # at the files, once more after a reload
    BEAT = auto()  # of systemd's watchdog


class Timers:
    """The timers that run, each to end once. `now` is the clock, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ends: dict[Timer, float] = {}

    def start(self, timer: Timer, after_s: float) -> None:
        """Have a timer end in so many seconds, whether it runs or not."""
        self._ends[timer] = self._now() + after_s

    def stop(self, timer: Timer) -> None:
        """Have a timer not end, if it runs."""
        self._ends.pop(timer, None)

    def runs(self, timer: Timer) -> bool:
        """Whether a timer was started, and has not been taken since."""
        return timer in self._ends

    def take(self, timer: Timer) -> bool:
        """Whether a timer has ended; then it runs no more, so that this is said once."""
        if timer not in self._ends or self._ends[timer] > self._now():
            return False
        del self._ends[timer]
        return True

    def rest_s(self, *others: float | None) -> float | None:
        """How long nothing is due, or None where nothing ever will be. `others` are times of the
        same clock at which something else is due, or None."""
        ends = [*self._ends.values(), *(when for when in others if when is not None)]
        return max(0.0, min(ends) - self._now()) if ends else None
