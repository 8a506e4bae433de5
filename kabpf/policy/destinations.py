"""Destinations as the kernel looks them up: by longest prefix, then by port. Pure."""

from __future__ import annotations

from ipaddress import IPv6Network
from typing import NamedTuple

from kabpf.policy.model import Destination, Options


class Table(NamedTuple):
    """A peer's longest prefix in `nodes` leads to a node; `options` has the node's ports, and under
    0 what any other port has. Where there is nothing the policy's own options hold."""

    nodes: dict[IPv6Network, int]  # from 1
    options: dict[tuple[int, int], Options]


def table(destinations: tuple[Destination, ...]) -> Table:
    """Of the destinations that contain the peer and name its port or none, the one with the longest
    prefix wins, of equal prefixes one that names the port, then the one written last.

    Each node has every row that decides in it, those of shorter prefixes too, so that one look-up
    of the prefix is enough.
    """
    rows: dict[tuple[int, int], dict[int, Options]] = {}
    nodes: dict[IPv6Network, int] = {}
    # Shorter prefixes first, so that what a longer one takes over is complete. Within a prefix what
    # names no port comes first, because it takes the place of all that was taken over.
    for each in sorted(destinations, key=lambda each: (each.network.prefixlen, bool(each.ports))):
        key = _key(each.network, each.network.prefixlen)
        if each.network not in nodes:
            nodes[each.network] = len(nodes) + 1
            rows[key] = _shorter(rows, each.network)
        if each.ports:
            rows[key] |= dict.fromkeys(each.ports, each.options)
        else:
            rows[key] = {0: each.options}
    return Table(
        nodes,
        {
            (node, port): options
            for network, node in nodes.items()
            for port, options in rows[_key(network, network.prefixlen)].items()
        },
    )


def _shorter(
    rows: dict[tuple[int, int], dict[int, Options]], network: IPv6Network
) -> dict[int, Options]:
    """A copy of the rows of the longest prefix around `network`."""
    for length in range(network.prefixlen - 1, -1, -1):
        if outer := rows.get(_key(network, length)):
            return dict(outer)
    return {}


def _key(network: IPv6Network, length: int) -> tuple[int, int]:
    return length, int(network.network_address) >> (128 - length)
