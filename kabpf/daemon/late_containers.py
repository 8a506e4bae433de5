"""Births of containers that no engine knows yet: engines write of some when they run already."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from kabpf.kernel.dataplane import Born

# After a birth is heard of it is looked at again after so many seconds each, and then no more until
# the next look at all cgroups.
WAITS_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08)
BIRTHS_MAX = 1000  # that wait at once; any user may make cgroups with the names of containers


class LateContainers:
    """The births that are to be looked at again. `now` is the clock, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._waiting: dict[int, tuple[Born, int, float]] = {}  # with the looks, and the next one

    @property
    def due(self) -> float | None:
        """When the next look is due, or None."""
        return min((when for _, _, when in self._waiting.values()), default=None)

    @property
    def are_due(self) -> bool:
        """Whether a look is due."""
        due = self.due
        return due is not None and due <= self._now()

    def take(self) -> list[Born]:
        """The births whose look is due; `looked` says how that went."""
        now = self._now()
        return [born for born, _, when in self._waiting.values() if when <= now]

    def looked(self, births: Iterable[Born], unknown: Collection[int]) -> None:
        """These were looked at, and of those whose ids are `unknown` no engine knows anything."""
        now = self._now()
        for born in births:
            _, looks, _ = self._waiting.pop(born.id, (born, 0, 0.0))
            is_late = born.id in unknown and looks < len(WAITS_S)
            if is_late and len(self._waiting) < BIRTHS_MAX:
                self._waiting[born.id] = born, looks + 1, now + WAITS_S[looks]
