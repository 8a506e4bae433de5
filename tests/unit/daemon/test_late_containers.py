"""Births of containers that no engine knows yet are looked at again for a while."""

from __future__ import annotations

from kabpf.daemon.late_containers import BIRTHS_MAX, WAITS_S, LateContainers
from kabpf.kernel.dataplane import Born

ONE, TWO = Born(7, 1, "one"), Born(8, 1, "two")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_birth_is_looked_at_again_until_its_container_is_known() -> None:
    """The looks become rarer, and end with one that finds it."""
    clock = Clock()
    late = LateContainers(clock)
    late.looked([ONE, TWO], {ONE.id})
    assert late.due == 100.0 + WAITS_S[0]
    assert not late.are_due and late.take() == []
    clock.now = late.due
    assert late.are_due and late.take() == [ONE]
    late.looked(late.take(), {ONE.id})
    assert late.due == clock.now + WAITS_S[1]
    clock.now = late.due
    late.looked(late.take(), ())
    assert late.due is None and not late.are_due


def test_birth_of_which_nothing_is_ever_known_is_given_up() -> None:
    """After 157 ms nothing wakes the daemon for it any more."""
    clock = Clock()
    late = LateContainers(clock)
    late.looked([ONE], {ONE.id})
    looks = 0
    while late.due is not None:
        clock.now = late.due
        late.looked(late.take(), {ONE.id})
        looks += 1
    assert looks == len(WAITS_S)
    assert round(clock.now - 100, 6) == round(sum(WAITS_S), 6) == 0.157


def test_births_that_wait_are_bounded() -> None:
    """Whoever makes cgroups with such names by the ten thousand fills nothing."""
    late = LateContainers(Clock())
    many = [Born(number, 1, "x") for number in range(2 * BIRTHS_MAX)]
    late.looked(many, {each.id for each in many})
    late.looked(many, {each.id for each in many})
    assert len(late._waiting) == BIRTHS_MAX
