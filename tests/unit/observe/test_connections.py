"""Where the other ends of connections are; tests/kernel/test_audit.py has what the kernel tells."""

from __future__ import annotations

import time
from ipaddress import IPv6Address

import pytest

from kabpf.audit.connections import Place
from kabpf.kernel.inet_diag import Network
from kabpf.observe.connections import Places


def packed(address: str) -> bytes:
    return IPv6Address(address if ":" in address else f"::ffff:{address}").packed


NETWORKS = (
    Network(96 + 24, packed("10.1.0.1"), True),
    Network(96 + 24, packed("10.1.0.2"), True),
    Network(128, packed("10.9.0.1"), False),
    Network(64, packed("fd00::1"), True),
)


@pytest.mark.parametrize(
    ("peer", "place"),
    [
        ("127.9.0.1", Place.LOOPBACK),
        ("::1", Place.LOOPBACK),
        ("10.1.0.1", Place.LOOPBACK),
        ("10.1.0.2", Place.LOOPBACK),  # which is in the network of the first one
        ("fd00::1", Place.LOOPBACK),
        ("10.1.0.255", Place.NETWORK),
        ("10.9.0.1", Place.NETWORK),
        ("fd00::2", Place.NETWORK),
        ("10.1.1.0", Place.BEYOND),
        ("10.9.0.2", Place.BEYOND),
        ("fd00:0:0:1::1", Place.BEYOND),
        ("::a01:1", Place.BEYOND),  # has the bytes of an own one, and is not mapped
    ],
)
def test_places(peer: str, place: Place) -> None:
    """By the own addresses, and by the networks that these are of."""
    assert Places(NETWORKS).of(packed(peer)) == place


def test_as_many_addresses_as_peers() -> None:
    """Whoever has a network namespace gives it as many as they like; audit does not compare each
    with each."""
    count = 3000
    networks = [
        Network(128, packed(f"fd00::{number:x}"), number % 2 == 0) for number in range(count)
    ]
    places = Places(networks)
    began = time.process_time()
    found = [places.of(packed(f"fd01::{number:x}")) for number in range(count)]
    assert time.process_time() - began < 1  # each with each took 4 s
    assert {*found} == {Place.BEYOND}
