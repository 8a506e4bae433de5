"""A policy for connections that are at risk, as it would be written by hand. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kabpf.audit import networks
from kabpf.audit.connections import Connection, Setter
from kabpf.policy.model import Destination, Direction, Options, Policy, Range, Rules, Selector
from kabpf.policy.presets import Timeout
from kabpf.policy.yaml import Source

PORTS_MOST = 8


def policy(
    file: str,
    name: str,
    selectors: tuple[Selector, ...],
    at_risk: Sequence[Connection],
    timeout: Timeout,
    *,
    is_covered: bool,
) -> Policy:
    """The numbers of an idle timeout, for the direction and the peers of these connections. Of a
    cgroup that a policy covers already this takes the place of that one, and so is for all peers:
    others would lose what they have."""
    options = _options(at_risk, timeout)
    if is_covered:
        return Policy(name, selectors, Rules(options), Source(file, 1))
    found = destinations(at_risk, options)
    rules = Rules(
        Options(keepalive=False) if found else options,
        direction=direction(at_risk),
        destinations=found,
    )
    return Policy(name, selectors, rules, Source(file, 1))


def direction(connections: Sequence[Connection]) -> Direction:
    """Which way they all were opened."""
    ways = {each.is_incoming for each in connections}
    return Direction.BOTH if len(ways) > 1 else Direction.IN if True in ways else Direction.OUT


def destinations(connections: Sequence[Connection], options: Options) -> tuple[Destination, ...]:
    """Rows for the peers' networks with the ports connected to; none where there are too many."""
    ports = {each.local_port if each.is_incoming else each.peer_port for each in connections}
    named = tuple(sorted(ports)) if len(ports) <= PORTS_MOST else ()
    return tuple(
        Destination(network, named, options)
        for network in networks.around(each.peer for each in connections)
    )


def _options(connections: Sequence[Connection], timeout: Timeout) -> Options:
    """An application's own idle or interval that is too long is brought to the numbers by a range,
    as `fill` would keep it."""
    has = [each.keepalive for each in connections if each.keepalive.is_on]
    return Options(
        True,
        _up_to(timeout.idle_s, ((each.idle_s, each.idle_by) for each in has)),
        _up_to(timeout.interval_s, ((each.interval_s, each.interval_by) for each in has)),
        Range.exactly(timeout.probes),
    )


def _up_to(most: int, has: Iterable[tuple[int | None, int]]) -> Range:
    is_longer = any(by == Setter.APPLICATION and (value or 0) > most for value, by in has)
    return Range(1 if is_longer else most, most)
