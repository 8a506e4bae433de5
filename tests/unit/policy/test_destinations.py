"""The look-up by peer and port, walked as the kernel walks it, against a walk over all
destinations."""

from __future__ import annotations

import itertools
from ipaddress import IPv6Address, IPv6Network

from hypothesis import given, settings
from hypothesis import strategies as st

from kabpf.policy.destinations import Table, table
from kabpf.policy.model import Destination, Options, Range

PORTS = (1, 80, 443, 65535)
# Few bits, so that networks contain each other: the first and the last of an address.
ADDRESSES = [IPv6Address(top << 124 | low) for top in range(8) for low in range(8)]
LENGTHS = (0, 1, 2, 3, 4, 125, 126, 127, 128)
NETWORKS = st.tuples(st.sampled_from(ADDRESSES), st.sampled_from(LENGTHS)).map(
    lambda both: IPv6Network(both, strict=False)
)
DESTINATIONS = st.lists(
    st.tuples(NETWORKS, st.sets(st.sampled_from(PORTS), max_size=2)), max_size=12
).map(
    lambda pairs: tuple(
        Destination(network, tuple(sorted(ports)), options(number))
        for number, (network, ports) in enumerate(pairs, 1)
    )
)


@settings(max_examples=300)
@given(DESTINATIONS)
def test_look_up_finds_the_destination_that_counts(destinations: tuple[Destination, ...]) -> None:
    """For every peer and port one look-up by prefix and two by port find what a walk over all
    destinations finds."""
    rows = table(destinations)
    for peer, port in itertools.product(ADDRESSES, (*PORTS, 7)):
        assert looked_up(rows, peer, port) == walked(destinations, peer, port), (peer, port)


def test_table_of_nothing_is_empty() -> None:
    """Without destinations there is nothing to look up."""
    assert table(()) == Table({}, {})


def test_nodes_are_numbered_from_one_and_complete() -> None:
    """A longer prefix has the rows that it leaves to the shorter one, in a node of its own."""
    wide, narrow = IPv6Network("fd00::/16"), IPv6Network("fd00::/32")
    found = table(
        (
            Destination(narrow, (80,), options(1)),
            Destination(wide, (80, 443), options(2)),
            Destination(wide, (), options(3)),
        )
    )
    numbers = {wide: 1, narrow: 2}
    assert found.nodes == numbers
    assert found.options == {
        (1, 0): options(3), (1, 80): options(2), (1, 443): options(2),
        (2, 0): options(3), (2, 80): options(1), (2, 443): options(2),
    }  # fmt: skip


def test_longer_prefix_without_ports_hides_those_of_the_shorter() -> None:
    """The prefix decides before the port."""
    found = table(
        (
            Destination(IPv6Network("fd00::/16"), (80,), options(1)),
            Destination(IPv6Network("fd00::/32"), (), options(2)),
        )
    )
    assert found.options == {(1, 80): options(1), (2, 0): options(2)}


def looked_up(rows: Table, peer: IPv6Address, port: int) -> Options | None:
    """As the kernel does it: the longest prefix, then the port, then any port."""
    around = [network for network in rows.nodes if peer in network]
    if not around:
        return None
    node = rows.nodes[max(around, key=lambda network: network.prefixlen)]
    return rows.options.get((node, port)) or rows.options.get((node, 0))


def walked(destinations: tuple[Destination, ...], peer: IPv6Address, port: int) -> Options | None:
    best = None
    for order, each in enumerate(destinations):
        if peer in each.network and (not each.ports or port in each.ports):
            rank = (each.network.prefixlen, bool(each.ports), order)
            if best is None or rank > best[0]:
                best = (rank, each.options)
    return best[1] if best else None


def options(number: int) -> Options:
    return Options(idle_s=Range(number, number))
