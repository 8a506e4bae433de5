"""Rates of a live view; tests/kernel/test_watch.py has the view itself."""

from __future__ import annotations

from kabpf.live import Rates


def test_rate_is_that_of_the_last_ten_seconds() -> None:
    """Unknown at the first look; a count that began anew counts from nothing."""
    clock = iter([0.0, 1.0, 2.0, 13.0, 14.0])
    rates: Rates[str] = Rates(lambda: next(clock))
    rates.note({"a": (100, 7)})
    assert rates.of("a") == ["?", "?"]
    rates.note({"a": (105, 7), "b": (3, 0)})
    assert (rates.of("a"), rates.of("b")) == (["5.0", "0"], ["3.0", "0"])
    rates.note({"a": (4, 7)})
    assert rates.of("a") == ["2.0", "0"]
    rates.note({"a": (1104, 18)})
    assert rates.of("a") == ["100", "1.0"]
