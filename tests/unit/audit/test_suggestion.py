"""The policies that an audit suggests: right, small, and for what was seen."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Any

import pytest
from audited import OFF, connection, on
from hypothesis import given
from hypothesis import strategies as st

from kabpf.audit import effect, networks, silence, suggestion
from kabpf.audit.connections import Keepalive, Setter
from kabpf.policy import parser, presets, writer
from kabpf.policy.model import Direction, Policy, network_text

FILE, NAME = "/etc/kabpf/policy.d/app.service.yaml", "app.service"
AWS = presets.presets()["aws-nlb"]


def packed(text: str) -> bytes:
    address = ip_address(text)
    mapped = f"::ffff:{text}" if address.version == 4 else text
    return IPv6Address(mapped).packed


def peers(*texts: str, **others: Any) -> list[Any]:
    return [connection(peer=packed(each), **others) for each in texts]


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["10.2.0.7"], ["10.2.0.7/32"]),
        (
            ["10.2.0.7", "10.2.0.9", "2001:db8::5"],
            ["10.2.0.7/32", "10.2.0.9/32", "2001:db8::5/128"],
        ),
        ([f"10.2.0.{each}" for each in range(9)], ["10.2.0.0/24"]),
        ([f"10.2.{each}.1" for each in range(9)], ["10.2.0.0/16"]),
        ([f"10.{each}.0.1" for each in range(9)], []),
        ([f"2001:db8::{each}" for each in range(9)], ["2001:db8::/64"]),
        ([f"2001:db8:0:{each}::1" for each in range(9)], ["2001:db8::/48"]),
    ],
)
def test_networks_are_few_and_narrow(addresses: list[str], expected: list[str]) -> None:
    """Hosts, else links, else sites, and none where even these are many."""
    found = networks.around(map(packed, addresses))
    assert sorted(map(network_text, found)) == sorted(expected)


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=40))
def test_networks_are_around_every_address(addresses: list[bytes]) -> None:
    """However they lie, they are at most eight, and each address is in one of them."""
    found = networks.around(addresses)
    assert len(found) <= networks.MOST
    for each in addresses if found else ():
        assert any(IPv6Address(each) in network for network in found)


def suggested(connections: list[Any], **others: Any) -> Policy:
    """The policy as it is read from the file that it makes."""
    made = suggestion.policy(FILE, NAME, (), connections, AWS, **{"is_covered": False} | others)
    text = writer.text(made, "5 of 5\nconnections \x1b[31m")
    assert text.startswith("# 5 of 5\\nconnections \\x1b[31m\n")
    (policy,) = parser.combine([parser.parse(text.encode(), FILE)])
    return policy


CASES = {
    "outgoing": (peers("10.2.0.7", "10.2.0.9"), Direction.OUT, 2),
    "accepted": (peers("10.2.0.7", is_incoming=True), Direction.IN, 1),
    "both ways": (
        [*peers("10.2.0.7"), *peers("10.2.0.9", is_incoming=True)], Direction.BOTH, 2,
    ),
    "many peers": (peers(*(f"10.{each}.0.1" for each in range(20))), Direction.OUT, 0),
    "many ports": (
        [connection(peer_port=each) for each in range(1000, 1020)], Direction.OUT, 1,
    ),
    "keepalive of the system": (peers("10.2.0.7", keepalive=Keepalive(True, 7200, 1, 0, 75, 0)),
                                Direction.OUT, 1),
    "the application's idle": (peers("10.2.0.7", keepalive=on(3600)), Direction.OUT, 1),
    "the application's interval": (
        peers("10.2.0.7", keepalive=on(60, 400, Setter.APPLICATION)), Direction.OUT, 1,
    ),
    "idle unknown": (
        peers("10.2.0.7", keepalive=Keepalive(True, None), timer=2, expires_ms=7_000_000),
        Direction.OUT, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_suggestion_makes_what_was_at_risk_safe(case: str) -> None:
    """Its file is right, and under its policy no connection would be at risk that was; with the
    direction and about as many destinations as there were."""
    connections, direction, rows = CASES[case]
    policy = suggested(connections)
    assert policy.rules.direction == direction
    assert len(policy.rules.destinations) == rows
    for each in connections:
        found = silence.of(each, effect.under(policy)(each))
        if each.keepalive.idle_s is not None:
            assert found.is_at_risk(AWS.timeout_s) is False
        else:
            assert found.is_at_risk(AWS.timeout_s) is None


def test_suggestion_leaves_others_alone() -> None:
    """A peer, a port or a direction that was not at risk gets nothing."""
    policy = suggested(peers("10.2.0.7"))
    for others in (
        {"peer": packed("10.2.0.8")}, {"peer_port": 80}, {"is_incoming": True},
    ):  # fmt: skip
        assert effect.under(policy)(connection(**others)) == OFF


def test_suggestion_in_place_of_a_policy_is_for_all() -> None:
    """What other connections have of the former policy they do not lose."""
    policy = suggested(peers("10.2.0.7"), is_covered=True)
    assert (policy.rules.direction, policy.rules.destinations) == (Direction.BOTH, ())
    assert policy.rules.options.idle_s == (AWS.idle_s, AWS.idle_s)


def test_what_the_application_turned_off_stays_at_risk() -> None:
    """`fill` leaves it so, which the command says."""
    turned_off = Keepalive(False, 60, Setter.APPLICATION, Setter.APPLICATION)
    (one,) = peers("10.2.0.7", keepalive=turned_off)
    found = silence.of(one, effect.under(suggested([one]))(one))
    assert found.is_at_risk(AWS.timeout_s) is True
