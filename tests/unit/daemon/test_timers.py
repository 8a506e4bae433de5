"""Timers: which has ended, and how long the daemon may rest."""

from __future__ import annotations

import pytest

from kabpf.daemon.timers import Timer, Timers
from kabpf.runtime.pace import Pace


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock that this test moves."""
    return Clock()


@pytest.fixture
def timers(clock: Clock) -> Timers:
    """Timers of which none runs."""
    return Timers(clock)


def test_timer_ends_once_after_its_time(timers: Timers, clock: Clock) -> None:
    """A timer ends at its time, not before, and says so once."""
    timers.start(Timer.LOOK, 2)
    clock.now_s += 1.5
    assert not timers.take(Timer.LOOK)
    assert timers.runs(Timer.LOOK)
    clock.now_s += 0.5
    assert timers.take(Timer.LOOK)
    assert not timers.take(Timer.LOOK)
    assert not timers.runs(Timer.LOOK)


def test_timers_end_apart(timers: Timers, clock: Clock) -> None:
    """The end of one timer is not that of another, also where both have passed."""
    timers.start(Timer.END, 1)
    timers.start(Timer.BEAT, 3)
    clock.now_s += 2
    assert not timers.take(Timer.BEAT)
    assert not timers.take(Timer.LOOK)
    clock.now_s += 2
    assert timers.take(Timer.BEAT)
    assert timers.take(Timer.END)


def test_timer_that_is_started_again_ends_later(timers: Timers, clock: Clock) -> None:
    """A second start counts from then on; the first end is forgotten."""
    timers.start(Timer.END, 1)
    clock.now_s += 0.5
    timers.start(Timer.END, 1)
    clock.now_s += 0.5
    assert not timers.take(Timer.END)
    clock.now_s += 0.5
    assert timers.take(Timer.END)


def test_stopped_timer_never_ends(timers: Timers, clock: Clock) -> None:
    """A timer that was stopped does not end, and wakes nobody; to stop it again is no error."""
    timers.start(Timer.LOOK, 1)
    for _ in range(2):
        timers.stop(Timer.LOOK)
    clock.now_s += 2
    assert not timers.take(Timer.LOOK)
    assert timers.rest_s() is None


def test_rest_ends_with_the_first_timer(timers: Timers, clock: Clock) -> None:
    """The daemon rests until the first end, not at all where one has passed, and for ever where no
    timer runs."""
    assert timers.rest_s() is None
    timers.start(Timer.BEAT, 90)
    timers.start(Timer.LOOK, 1)
    assert timers.rest_s() == 1
    clock.now_s += 5
    assert timers.rest_s() == 0
    assert timers.take(Timer.LOOK)
    assert timers.rest_s() == 85


@pytest.mark.parametrize(
    ("others", "rest_s"),
    [((None,), 10), ((1003.0,), 3), ((1020.0,), 10), ((0,), 0), ((None, 1003.0, 1002.0), 2)],
)
def test_rest_ends_with_what_else_is_due(
    timers: Timers, others: tuple[float | None, ...], rest_s: float
) -> None:
    """Other times of the same clock shorten the rest and never lengthen it."""
    timers.start(Timer.BEAT, 10)
    assert timers.rest_s(*others) == rest_s


def test_rest_needs_no_timer(timers: Timers) -> None:
    """What else is due counts also where no timer runs."""
    assert timers.rest_s(None) is None
    assert timers.rest_s(None, 1004.0) == 4


@pytest.mark.parametrize(("took_s", "rest_s"), [(0.01, 0.09), (0.5, 1.0), (30, 1.0)])
def test_what_takes_long_is_done_the_less_often(clock: Clock, took_s: float, rest_s: float) -> None:
    """A tenth of the time, and after a second at the latest; also where it fails."""
    pace = Pace(clock)
    assert pace.is_due
    with pytest.raises(ZeroDivisionError), pace.taken():
        clock.now_s += took_s
        raise ZeroDivisionError
    assert not pace.is_due
    assert pace.due == pytest.approx(clock.now_s + rest_s)
    clock.now_s = pace.due
    assert pace.is_due
