"""Presets: what the data file says, and the numbers that are derived from it."""

from __future__ import annotations

import re

import pytest

from kabpf.policy.options import TIMEOUT_S
from kabpf.policy.presets import Preset, Timeout, counting_data_alone, presets

TIMEOUTS = [Timeout(seconds) for seconds in (TIMEOUT_S.low, 60, 240, 6000, TIMEOUT_S.high)]


@pytest.mark.parametrize("preset", [*presets().values(), *TIMEOUTS], ids=str)
def test_options_of_a_preset_fit_below_its_time_out(preset: Timeout) -> None:
    """Half of the time-out passes at most before the first probe, a second probe comes in time, and
    a peer that is gone is noticed before the middlebox forgets."""
    assert 1 <= preset.idle_s <= preset.timeout_s / 2
    assert preset.idle_s <= 32767
    assert 1 <= preset.interval_s <= 32767
    assert 1 <= preset.probes <= 127
    assert preset.idle_s + 2 * preset.interval_s < preset.timeout_s
    assert preset.idle_s + preset.interval_s * preset.probes < preset.timeout_s


@pytest.mark.parametrize("preset", presets().values(), ids=lambda preset: preset.name)
def test_preset_says_what_happens_and_who_says_so(preset: Preset) -> None:
    """Every row has a short name, what happens after the time-out, and a source."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", preset.name)
    assert preset.after
    assert preset.source


@pytest.mark.parametrize(
    ("name", "idle_s", "interval_s"),
    [
        ("aws-nlb", 175, 29), ("azure-lb", 120, 20), ("gcp-nat", 600, 75),
        ("conntrack", 7200, 75), ("rfc5382", 3720, 75),
    ],
)  # fmt: skip
def test_numbers_of_a_preset(name: str, idle_s: int, interval_s: int) -> None:
    """Idle is half of the time-out and the interval a twelfth, but no longer than the kernel's."""
    found = presets()[name]
    assert (found.idle_s, found.interval_s, found.probes) == (idle_s, interval_s, 5)


def test_what_keepalive_can_not_keep_is_no_preset() -> None:
    """A proxy that counts data alone has a reason with its source in place of options."""
    assert counting_data_alone().keys() == {"aws-alb", "oci-lb"}
    for name, reason in counting_data_alone().items():
        assert name not in presets()
        assert "(E" in reason or "(Oracle" in reason
