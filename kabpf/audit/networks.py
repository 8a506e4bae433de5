"""Networks around addresses: few, and no wider than that takes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Network

from kabpf.audit.connections import MAPPED

MOST = 8
# Bits of hosts, of a link, and of a site, as they are mostly given out.
IPV4 = (128, 96 + 24, 96 + 16)  # v4-mapped
IPV6 = (128, 64, 48)  # RFC 6177


def around(addresses: Iterable[bytes]) -> tuple[IPv6Network, ...]:
    """The hosts, or the links, or the sites that the addresses are of, sorted: the first of these
    that are at most MOST; none where even the sites are more. Addresses have 128 bits."""
    hosts = set(addresses)
    for lengths in zip(IPV4, IPV6, strict=True):
        found = set()
        for each in hosts:
            length = lengths[0] if each.startswith(MAPPED) else lengths[1]
            found.add(IPv6Network((int.from_bytes(each, "big"), length), strict=False))
            if len(found) > MOST:
                break
        else:
            return tuple(sorted(found))
    return ()
