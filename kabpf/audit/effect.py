"""What a connection would have of keepalive: without policies, or under others. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable

from kabpf.audit.connections import OF_POLICIES, Connection, Keepalive, Place, Setter
from kabpf.policy import destinations
from kabpf.policy.model import Direction, Mode, Options, Policy, Range

PEERS_KEPT = 65536  # whose options are remembered


def without_policies(connection: Connection) -> Keepalive:
    """What the application and the system would leave it with, if no policy had set anything."""
    has = connection.keepalive
    if has.on_by in OF_POLICIES:
        has = has._replace(is_on=False, on_by=Setter.SYSTEM)
    if has.idle_by in OF_POLICIES:
        has = has._replace(idle_s=connection.system_idle_s, idle_by=Setter.SYSTEM)
    if has.interval_by in OF_POLICIES:
        has = has._replace(interval_s=connection.system_interval_s, interval_by=Setter.SYSTEM)
    return has


def under(policy: Policy | None) -> Callable[[Connection], Keepalive]:
    """A function that tells what a connection would have, if it were opened under this policy."""
    if policy is None:
        return without_policies
    rules = policy.rules
    options_of = _finder(policy)

    def changed(connection: Connection) -> Keepalive:
        has = without_policies(connection)
        if rules.direction == (Direction.OUT if connection.is_incoming else Direction.IN):
            return has
        if not rules.loopback and connection.place == Place.LOOPBACK:
            return has
        port = connection.local_port if connection.is_incoming else connection.peer_port
        return _with(options_of(connection.peer, port), rules.mode, has)

    return changed


def _with(options: Options, mode: Mode, has: Keepalive) -> Keepalive:
    """As bpf/options.h sets them on a new connection."""
    if not options.keepalive:
        if mode == Mode.FILL:
            return has
        return has._replace(is_on=False, on_by=Setter.POLICY)
    # Under fill an application that turned it off keeps it off.
    if has.is_on or mode != Mode.FILL or has.on_by != Setter.APPLICATION:
        has = has._replace(is_on=True, on_by=Setter.POLICY)
    idle = _number(options.idle_s, mode, has.idle_s, has.idle_by)
    interval = _number(options.interval_s, mode, has.interval_s, has.interval_by)
    return Keepalive(has.is_on, idle[0], has.on_by, idle[1], *interval)


def _number(given: Range | None, mode: Mode, has: int | None, by: int) -> tuple[int | None, int]:
    """What a connection would have of an option, and who set it."""
    if given is None:
        return has, by
    if by == Setter.UNKNOWN and mode == Mode.FILL:
        return None, by  # the application's, or else the policy's
    if by == Setter.APPLICATION and has:
        if given.low < given.high:
            return min(max(has, given.low), given.high), by
        if mode == Mode.FILL:
            return has, by
    return given.high, Setter.POLICY


def _finder(policy: Policy) -> Callable[[bytes, int], Options]:
    """A function that tells which options a peer gets, by its address and port."""
    rules = policy.rules
    table = destinations.table(rules.destinations)
    by_length = sorted(table.nodes, key=lambda network: -network.prefixlen)
    networks = [
        (int(each.network_address), int(each.netmask), table.nodes[each]) for each in by_length
    ]

    @functools.lru_cache(maxsize=PEERS_KEPT)
    def options_of(peer: bytes, port: int) -> Options:
        number = int.from_bytes(peer, "big")
        for address, mask, node in networks:
            if number & mask == address:
                found = table.options.get((node, port)) or table.options.get((node, 0))
                return found or rules.options
        return rules.options

    return options_of
