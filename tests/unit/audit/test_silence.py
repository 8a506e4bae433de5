"""Which connections a middlebox may forget: a table of situations, for an idle timeout of 350 s.
tests/kernel/test_audit.py makes those that can be made, with a firewall that forgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from audited import HIDDEN, OFF, RUNS, connection, on, probing

from kabpf.audit import effect, silence
from kabpf.audit.connections import Connection, Keepalive, Place, Setter, Timer
from kabpf.audit.silence import Why
from kabpf.policy import parser
from kabpf.policy.presets import presets

TIMEOUT_S = 350
HOUR_MS = 3_600_000


class Situation(NamedTuple):
    """What is known of a connection, and whether it is at risk; None: nobody can tell."""

    facts: dict[str, Any]
    is_at_risk: bool | None
    why: Why


SITUATIONS = {
    # Without keepalive.
    "idle": Situation({"silence_ms": 60_000}, True, Why.NOTHING),
    "idle for longer": Situation({"silence_ms": HOUR_MS}, True, Why.NOTHING),
    "just opened": Situation({"silence_ms": 0}, True, Why.NOTHING),
    "accepted": Situation({"is_incoming": True}, True, Why.NOTHING),
    "not accepted yet": Situation({"is_incoming": True, "is_orphan": True}, True, Why.NOTHING),
    "half closed by the peer": Situation({"state": "close-wait"}, True, Why.NOTHING),
    "half closed by us": Situation({"state": "fin-wait-2"}, True, Why.NOTHING),
    "with a user timeout": Situation({"silence_ms": 9000}, True, Why.NOTHING),
    "to the same network": Situation({"place": Place.NETWORK}, True, Why.NOTHING),
    "in another namespace": Situation({"namespace": 4026532999}, True, Why.NOTHING),
    "subflow of MPTCP": Situation({"is_orphan": True}, True, Why.NOTHING),
    "silence unknown": Situation({"silence_ms": None}, True, Why.NOTHING),
    # With keepalive: below, near, and above the idle timeout.
    "keepalive below": Situation(probing(60), False, Why.KEEPALIVE),
    "keepalive at half": Situation(probing(175), False, Why.KEEPALIVE),
    "keepalive that a late timer keeps below": Situation(probing(311), False, Why.KEEPALIVE),
    "keepalive that a late timer takes above": Situation(probing(312), True, Why.KEEPALIVE),
    "keepalive at the timeout": Situation(probing(350), True, Why.KEEPALIVE),
    "keepalive of the system": Situation(probing(7200), True, Why.KEEPALIVE),
    "keepalive, the longest": Situation(probing(32767), True, Why.KEEPALIVE),
    "keepalive unanswered": Situation(
        probing(60, silence_ms=130_000, tries=7, expires_ms=4000), False, Why.KEEPALIVE
    ),
    "keepalive, half closed by us": Situation(
        probing(60, state="fin-wait-2"), False, Why.KEEPALIVE
    ),
    "keepalive, half closed by the peer": Situation(
        probing(60, state="close-wait"), False, Why.KEEPALIVE
    ),
    "subflow of MPTCP with keepalive": Situation(probing(60, is_orphan=True), False, Why.KEEPALIVE),
    "keepalive below, its interval above": Situation(
        probing(60, keepalive=on(60, 400)), True, Why.INTERVAL
    ),
    "keepalive whose interval a late timer keeps below": Situation(
        probing(60, keepalive=on(60, 311)), False, Why.INTERVAL
    ),
    "keepalive of the system, shortened since": Situation(
        probing(60, expires_ms=7_000_000), True, Why.TIMER
    ),
    "keepalive unanswered for long": Situation(
        probing(60, keepalive=on(60, 75), silence_ms=300_000, tries=3, expires_ms=55_000),
        False,
        Why.INTERVAL,
    ),
    # Without the data plane.
    "keepalive of unknown idle, due late": Situation(
        {"keepalive": RUNS, "timer": Timer.KEEPALIVE, "expires_ms": 7_000_000}, True, Why.UNKNOWN
    ),
    "keepalive of unknown idle, silent and due late": Situation(
        {
            "keepalive": RUNS,
            "timer": Timer.KEEPALIVE,
            "silence_ms": 300_000,
            "expires_ms": 50_000,
        },
        True,
        Why.UNKNOWN,
    ),
    "keepalive of unknown idle, due soon": Situation(
        {"keepalive": RUNS, "timer": Timer.KEEPALIVE, "expires_ms": 20_000}, None, Why.UNKNOWN
    ),
    "keepalive hidden by data": Situation(
        {"keepalive": HIDDEN, "timer": Timer.RETRANSMISSION}, None, Why.UNKNOWN
    ),
    # Data.
    "data in flight": Situation(
        {"timer": Timer.RETRANSMISSION, "expires_ms": 200}, True, Why.NOTHING
    ),
    "data in flight, keepalive": Situation(
        probing(60, timer=Timer.RETRANSMISSION), False, Why.KEEPALIVE
    ),
    "data sent again": Situation(
        {"timer": Timer.RETRANSMISSION, "tries": 3}, False, Why.RETRANSMISSION
    ),
    "closed window": Situation({"timer": Timer.WINDOW_PROBE}, False, Why.WINDOW_PROBES),
    "closed window, keepalive above": Situation(
        probing(7200, timer=Timer.WINDOW_PROBE), False, Why.WINDOW_PROBES
    ),
    # What is no connection that anybody could lose.
    "listener": Situation({"state": "listen"}, False, Why.LISTENER),
    "being opened": Situation(
        {"state": "syn-sent", "timer": Timer.RETRANSMISSION, "tries": 2}, False, Why.OPENING
    ),
    "request": Situation({"state": "syn-recv"}, False, Why.OPENING),
    "closed, its FIN in flight": Situation(
        {"state": "fin-wait-1", "is_orphan": True, "timer": Timer.RETRANSMISSION}, False, Why.ENDING
    ),
    "closed": Situation(
        {"state": "fin-wait-2", "is_orphan": True, "timer": Timer.KEEPALIVE}, False, Why.ENDING
    ),
    "closed by both": Situation({"state": "last-ack", "is_orphan": True}, False, Why.ENDING),
    "time-wait": Situation({"state": "time-wait", "is_orphan": True}, False, Why.ENDING),
    "loopback": Situation({"place": Place.LOOPBACK, "silence_ms": HOUR_MS}, False, Why.LOOPBACK),
}


def test_table_has_its_situations() -> None:
    """No two of them alike, but for those that differ in how they come to be."""
    assert len(SITUATIONS) == 44


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation_is_judged(name: str) -> None:
    """By the greatest possible silence, and what bounds it."""
    situation = SITUATIONS[name]
    found = silence.of(connection(**situation.facts))
    assert (found.is_at_risk(TIMEOUT_S), found.why) == (situation.is_at_risk, situation.why)


@pytest.mark.parametrize("why", [Why.RETRANSMISSION, Why.WINDOW_PROBES])
@pytest.mark.parametrize(("rto_max_ms", "is_at_risk"), [(120_000, True), (1000, False)])
def test_what_is_sent_again_comes_at_most_so_seldom(
    why: Why, rto_max_ms: int, is_at_risk: bool
) -> None:
    """The kernel doubles the time between two retransmissions, or window probes, up to a bound: a
    middlebox that forgets before that does forget."""
    timer = Timer.RETRANSMISSION if why == Why.RETRANSMISSION else Timer.WINDOW_PROBE
    found = silence.of(connection(timer=timer, tries=1, rto_max_ms=rto_max_ms))
    assert (found.is_at_risk(60), found.why) == (is_at_risk, why)


@pytest.mark.parametrize("preset", presets().values(), ids=lambda each: each.name)
def test_each_preset_keeps_its_own_middlebox(preset: Any) -> None:
    """What kabpf gives against an idle timeout is not at risk of it, also with late timers."""
    found = silence.of(connection(keepalive=on(preset.idle_s)))
    assert found.is_at_risk(preset.timeout_s) is False


def test_without_keepalive_a_silence_has_no_bound() -> None:
    """Not even the longest idle timeout is long enough."""
    found = silence.of(connection())
    assert found.longest_ms == math.inf
    assert found.is_at_risk(silence.LONGEST_S) is True


OF_APPLICATION = (Setter.APPLICATION, Setter.APPLICATION)
OF_POLICY = (Setter.POLICY, Setter.POLICY)
NUMBERS = "keepalive: {idle: 60s, interval: 10s, probes: 6}\n"
BY_TIMER = Keepalive(False, 7200, Setter.UNKNOWN, Setter.SYSTEM, 75, Setter.SYSTEM)
OUT = {"is_incoming": False}
IN = {"is_incoming": True}
# What a connection has, the policy, and what it would have under that: on or off, and idle.
EFFECTS = [
    ("nothing", OFF, NUMBERS, OUT, (True, 60)),
    ("system's idle", Keepalive(True, 7200, 1, 0), NUMBERS, OUT, (True, 60)),
    ("own idle, fill", Keepalive(True, 900, *OF_APPLICATION), NUMBERS, OUT, (True, 900)),
    ("own idle, override", Keepalive(True, 900, *OF_APPLICATION), f"{NUMBERS}mode: override\n",
     OUT, (True, 60)),
    ("own idle, range", Keepalive(True, 900, *OF_APPLICATION), "keepalive: {idle: 30s..300s}\n",
     OUT, (True, 300)),
    ("own idle below range", Keepalive(True, 15, *OF_APPLICATION),
     "keepalive: {idle: 30s..300s}\n", OUT, (True, 30)),
    ("turned off, fill", Keepalive(False, 60, *OF_APPLICATION), NUMBERS, OUT, (False, 60)),
    ("turned off, enforce", Keepalive(False, 60, *OF_APPLICATION), f"{NUMBERS}mode: enforce\n",
     OUT, (True, 60)),
    ("a policy's, off under fill", Keepalive(True, 60, *OF_POLICY), "keepalive: off\n", OUT,
     (False, 7200)),
    ("own, off under fill", on(60), "keepalive: off\n", OUT, (True, 60)),
    ("own, off under enforce", on(60), "keepalive: off\nmode: enforce\n", OUT, (False, 60)),
    ("former policy's idle", Keepalive(True, 900, 3, 3), NUMBERS, OUT, (True, 60)),
    ("other direction", OFF, f"{NUMBERS}direction: in\n", OUT, (False, 7200)),
    ("its direction", OFF, f"{NUMBERS}direction: in\n", IN, (True, 60)),
    ("loopback", OFF, f"{NUMBERS}loopback: false\n", {"place": Place.LOOPBACK}, (False, 7200)),
    ("its destination", OFF, "keepalive: off\ndestinations:\n"
     "  - {to: 10.2.0.0/16, ports: [5432], idle: 30s}\n", OUT, (True, 30)),
    ("another port", OFF, "keepalive: off\ndestinations:\n"
     "  - {to: 10.2.0.0/16, ports: [6432], idle: 30s}\n", OUT, (False, 7200)),
    ("accepted on the port", OFF, "keepalive: off\ndestinations:\n"
     "  - {to: 10.2.0.0/16, ports: [48956], idle: 30s}\n", IN, (True, 30)),
    ("the narrower destination", OFF, f"{NUMBERS}destinations:\n  - {{to: 10.0.0.0/8, idle: 20s}}\n"
     "  - {to: 10.2.0.7, idle: 30s}\n  - {to: 10.3.0.0/16, idle: 40s}\n", OUT, (True, 30)),
    ("unknown idle, fill", RUNS, NUMBERS, OUT, (True, None)),
    ("unknown idle, enforce", RUNS, f"{NUMBERS}mode: enforce\n", OUT, (True, 60)),
    ("off by its timer", BY_TIMER, NUMBERS, OUT, (True, 60)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("has", "policy", "facts", "expected"),
    [each[1:] for each in EFFECTS],
    ids=[each[0] for each in EFFECTS],
)
def test_policy_has_its_effect(
    has: Keepalive, policy: str, facts: dict[str, Any], expected: tuple[bool, int | None]
) -> None:
    """What a connection would have is what bpf/options.h sets on one that is opened."""
    found = under(policy)(connection(keepalive=has, **facts))
    assert (found.is_on, found.idle_s) == expected


INTERVALS = [
    ("unset", OFF, NUMBERS, 10),
    ("own, fill", on(60, 400, Setter.APPLICATION), NUMBERS, 400),
    ("own, override", on(60, 400, Setter.APPLICATION), f"{NUMBERS}mode: override\n", 10),
    ("own, range", on(60, 400, Setter.APPLICATION), "keepalive: {interval: 10s..30s}\n", 30),
    ("a policy's", on(60, 400, Setter.POLICY), "keepalive: {idle: 60s}\n", 75),
    ("unknown", RUNS, NUMBERS, None),
    ("unknown, enforce", RUNS, f"{NUMBERS}mode: enforce\n", 10),
    ("off by its timer", BY_TIMER, "keepalive: {idle: 60s}\n", 75),
    ("perhaps own", RUNS, "keepalive: {idle: 60s}\n", None),
]


@pytest.mark.parametrize(
    ("has", "policy", "interval_s"),
    [each[1:] for each in INTERVALS],
    ids=[n for n, *_ in INTERVALS],
)
def test_policy_has_its_effect_on_the_interval(
    has: Keepalive, policy: str, interval_s: int | None
) -> None:
    """As on idle."""
    assert under(policy)(connection(keepalive=has)).interval_s == interval_s


def under(text: str) -> Callable[[Connection], Keepalive]:
    (parsed,) = parser.combine([parser.parse(text.encode(), "a.service.yaml")])
    return effect.under(parsed)


def test_without_policies_the_applications_values_are_left() -> None:
    """Values of a policy, and of former ones, are taken away; the application's stay."""
    given = Keepalive(True, 60, Setter.POLICY, Setter.POLICY)
    found = effect.without_policies(connection(keepalive=given, system_idle_s=600))
    assert (found.is_on, found.idle_s) == (False, 600)
    own = Keepalive(True, 60, Setter.APPLICATION, Setter.FORMER_POLICY)
    found = effect.without_policies(connection(keepalive=own))
    assert (found.is_on, found.idle_s) == (True, 7200)
    assert effect.under(None)(connection(keepalive=own)) == found
