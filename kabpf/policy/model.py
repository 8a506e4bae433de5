"""What policy files say, as values. Knows nothing of files, cgroups or the kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Any, NamedTuple

from kabpf.policy.yaml import Source

GLOB = re.compile(r"[*?\[]")


class Range(NamedTuple):
    """What an option may be, bounds included; one value has equal bounds."""

    low: int
    high: int

    @classmethod
    def exactly(cls, value: int) -> Range:
        return cls(value, value)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Options:
    """What a socket gets, in the kernel's units; None leaves an option as it is on the socket.

    With `keepalive` False nothing is set at all. Limits: idle and interval 1 to 32767 s, probes 1
    to 127, user timeout 1 to 2147483647 ms, SYN retries 1 to 127 (tcp(7)). With jitter, 0 to 50 %,
    idle is spread from that much below its value up to the value.
    """

    keepalive: bool = True
    idle_s: Range | None = None
    interval_s: Range | None = None
    probes: Range | None = None
    user_timeout_ms: Range | None = None
    jitter_percent: int = 0
    syn_retries: int | None = None


@dataclass(frozen=True)
class Destination:
    """Options by peer. An IPv4 network is v4-mapped: 10.0.0.0/8 is ::ffff:10.0.0.0/104."""

    network: IPv6Network
    ports: tuple[int, ...]  # connected to, sorted; empty: any
    options: Options

    @property
    def to(self) -> str:
        """The network as people write it."""
        return network_text(self.network)


class Mode(StrEnum):
    """What happens where the application has an opinion of its own."""

    FILL = "fill"
    OVERRIDE = "override"
    ENFORCE = "enforce"


class Direction(StrEnum):
    """Both, accepted connections, or outgoing ones."""

    BOTH = "both"
    IN = "in"
    OUT = "out"


@dataclass(frozen=True)
class Rules:
    """All that decides what a socket of a covered cgroup gets."""

    options: Options
    mode: Mode = Mode.FILL
    direction: Direction = Direction.BOTH
    loopback: bool = True
    destinations: tuple[Destination, ...] = ()


@dataclass(frozen=True)
class Selector:
    """A unit's name, that of a unit of users' managers, or a cgroup path; each may be a glob."""

    kind: str  # "unit", "user_unit" or "cgroup"
    text: str
    source: Source

    @property
    def is_glob(self) -> bool:
        return GLOB.search(self.text) is not None


class Origin(NamedTuple):
    """Where the value of an option comes from; the note says how it was derived."""

    source: Source
    note: str = ""


class Until(NamedTuple):
    """The cgroup that a policy ends with; a cgroup made later at the path has another id."""

    path: str
    id: int


@dataclass(frozen=True)
class Policy:
    """Which cgroups get what. Of two policies of one name the one read last is kept.

    One with an owner, a user's id, is about the cgroup that it ends with and what is below.
    """

    name: str
    selectors: tuple[Selector, ...]
    rules: Rules
    source: Source
    existing: bool = True  # open connections are given what is new, too
    log: bool = False  # what happens to its sockets is written to the journal
    until: Until | None = None
    owner: int | None = None
    origins: Mapping[str, Origin] = field(  # by option key
        default_factory=dict, compare=False, repr=False
    )
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)


def options_json(options: Options) -> dict[str, Any]:
    """Options by name; a range is a list of its bounds."""
    return {
        key: (value[0] if value[0] == value[1] else list(value))
        if isinstance(value, Range)
        else value
        for key, value in vars(options).items()
    }


def options_of(found: Mapping[str, Any]) -> Options:
    """What `options_json` made."""

    def bounds(name: str) -> Range | None:
        value = found[name]
        return Range(*value) if isinstance(value, list) else value and Range.exactly(value)

    return Options(
        found["keepalive"],
        bounds("idle_s"),
        bounds("interval_s"),
        bounds("probes"),
        bounds("user_timeout_ms"),
        found["jitter_percent"],
        found["syn_retries"],
    )


def network_text(network: IPv4Network | IPv6Network) -> str:
    """A network as people write it; of v4-mapped ones Python 3.13 thinks otherwise than 3.11."""
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped and network.prefixlen >= 96:
        return f"{mapped}/{network.prefixlen - 96}"
    return str(network)


def warnings(policies: Iterable[Policy]) -> list[str]:
    """What contradicts itself without being wrong, as `file:line: key: what, what was expected`, in
    the order in which the policies were read."""
    return list(dict.fromkeys(text for policy in policies for text in policy.warnings))
