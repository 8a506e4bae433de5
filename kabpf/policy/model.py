"""What policy files say, as values. Knows nothing of files, cgroups or the kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from kabpf.policy.yaml import Source

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

GLOB = re.compile(r"[*?\[]")
ASKED = "container:"  # how names of policies begin that containers ask for, and no other's


class Range(NamedTuple):
    """What an option may be, bounds included; one value has equal bounds."""

    low: int
    high: int

    @classmethod
    def exactly(cls, value: int) -> Range:
        """The range of one value."""
        return cls(value, value)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}..{self.high}"


class Options(NamedTuple):
    """What a socket gets, in the kernel's units; None leaves an option as it is on the socket.

    With `keepalive` False nothing is set, but that modes other than fill turn keepalive off.
    OPTIONS has the limits. With jitter, idle is
    spread from that much below its value up to the value.
    """

    keepalive: bool = True
    idle_s: Range | None = None
    interval_s: Range | None = None
    probes: Range | None = None
    user_timeout_ms: Range | None = None
    jitter_percent: int = 0
    syn_retries: int | None = None
    connect_timeout_ms: int | None = None


class OptionRow(NamedTuple):
    """An option: what it is called, what it may be, and where it may stand. A new one is a row, a
    field of Options and of the parser's Draft, one of kabpf.h, and a line where it is set."""

    key: str  # in policy files; with dashes a flag of commands
    field: str  # of Options, in kabpf.h and in JSON
    name: str  # in tables and texts
    unit: str  # "s", "ms", "%", or "" for a plain number
    low: int  # in that unit, as is `high`
    high: int
    expected: str  # what may stand in a policy file, for errors
    meaning: str  # for help texts and the schema
    socket_option: str = ""  # that the programs set; jitter only changes what idle is set to
    is_range: bool = False  # may be a range, and is a Range in Options
    on_sockets: bool = False  # sockets and events show it, and tables in a column of its own
    for_users: bool = False  # users may have it, by their requests or by the defaults
    before_syn: bool = False  # each connection of the machine is looked at before its SYN
    words: tuple[str, ...] = ()  # in place of a number
    none: str = ""  # in a destination: none, where its policy has one
    metavar: str = ""  # of the flag of `attach` and `run`; without it they have none
    flag_values: str = ""  # that the flag's help names

    @property
    def help(self) -> str:
        """The help of the flag."""
        return f"{self.meaning}: {self.flag_values}" if self.flag_values else self.meaning

    @property
    def limits(self) -> str:
        """The bounds as errors say them."""
        if self.unit == "%":
            return f"{self.low}% to {self.high}%"
        return f"{self.low} to {self.high}" + {"s": " seconds", "ms": " ms"}.get(self.unit, "")


# The limits are the kernel's (net/ipv4/tcp.c: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL,
# MAX_TCP_KEEPCNT, MAX_TCP_SYNCNT); it answers EINVAL outside them. A user timeout is an int of
# milliseconds. Those on sockets are first, in the order of `enum option` in bpf/options.h.
OPTIONS = (
    OptionRow(
        "idle", "idle_s", "idle", "s", 1, 32767,
        "a time in seconds (60, 90s, 5m, 1h) or a range (30s..5m)",
        "silence before the first probe", "TCP_KEEPIDLE",
        is_range=True, on_sockets=True, for_users=True,
        metavar="TIME", flag_values="60, 90s, 5m, 1h",
    ),
    OptionRow(
        "interval", "interval_s", "interval", "s", 1, 32767,
        "a time in seconds (60, 90s, 5m, 1h) or a range (30s..5m)",
        "time between probes", "TCP_KEEPINTVL",
        is_range=True, on_sockets=True, for_users=True,
        metavar="TIME",
    ),
    OptionRow(
        "probes", "probes", "probes", "", 1, 127,
        "a number, 1 to 127, or a range (3..9)",
        "unanswered probes before the connection is given up", "TCP_KEEPCNT",
        is_range=True, on_sockets=True, for_users=True,
        metavar="N",
    ),
    OptionRow(
        "user_timeout", "user_timeout_ms", "user timeout", "ms", 1, 2**31 - 1,
        "a time (30, 30s, 1500ms, 5m), a range (30s..2m), auto or off",
        "limit for unacknowledged data, or a closed window", "TCP_USER_TIMEOUT",
        is_range=True, on_sockets=True, for_users=True, words=("auto", "off"), none="off",
        metavar="TIME", flag_values="a time, auto or off",
    ),
    OptionRow(
        "jitter", "jitter_percent", "jitter", "%", 0, 50,
        "a percentage, 0% to 50%",
        "part by which idle is shorter, different for each socket", for_users=True, none="0%",
    ),
    OptionRow(
        "syn_retries", "syn_retries", "SYN retries", "", 1, 127,
        "a number, 1 to 127",
        "how often connect(2) tries again", "TCP_SYNCNT",
        before_syn=True, metavar="N",
    ),
    OptionRow(
        # The kernel looks at it when it sends the SYN again, for the first time after a second.
        "connect_timeout", "connect_timeout_ms", "connect timeout", "ms", 1000, 2**31 - 1,
        "a time of at least a second (10, 10s, 2500ms, 1m) or off",
        "limit for connect(2)", "TCP_USER_TIMEOUT",
        before_syn=True, words=("off",), none="off",
        metavar="TIME", flag_values="a time, or off",
    ),
)  # fmt: skip
BY_KEY = {row.key: row for row in OPTIONS}
IN_RANGES = tuple(row for row in OPTIONS if row.is_range)
ON_SOCKETS = tuple(row for row in OPTIONS if row.on_sockets)
ON_COMMAND_LINE = tuple(row for row in OPTIONS if row.metavar)
BEFORE_SYN = tuple(row for row in OPTIONS if row.before_syn)


def ranges(options: Options) -> dict[str, Range]:
    """Those of the options that may be ranges and are given, by key."""
    given = ((row.key, getattr(options, row.field)) for row in IN_RANGES)
    return {key: value for key, value in given if value}


class Destination(NamedTuple):
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


class Rules(NamedTuple):
    """All that decides what a socket of a covered cgroup gets."""

    options: Options
    mode: Mode = Mode.FILL
    direction: Direction = Direction.BOTH
    loopback: bool = True
    destinations: tuple[Destination, ...] = ()


class Condition(NamedTuple):
    """What a container or a pod has to have."""

    key: str  # of the selector
    of_key: str  # of a label or an annotation
    glob: str


class Selector(NamedTuple):
    """A unit's name, that of a unit of users' managers, or a cgroup path; each may be a glob. Or
    what a container or a pod has."""

    kind: str  # "unit", "user_unit", "cgroup", "container" or "pod"
    text: str
    source: Source
    # Socket units, or globs, that pass their listeners to a service, but for one of its name.
    sockets: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()  # of a container or a pod, which meets all of them

    @property
    def is_of_containers(self) -> bool:
        """Whether it names containers by what their engines know of them."""
        return bool(self.conditions)

    @property
    def is_glob(self) -> bool:
        """Whether more than one name may fit the text."""
        return GLOB.search(self.text) is not None


class Origin(NamedTuple):
    """Where the value of an option comes from; the note says how it was derived."""

    source: Source
    note: str = ""


class Until(NamedTuple):
    """The cgroup that a policy ends with; a cgroup made later at the path has another id."""

    path: str
    id: int


class Limits(NamedTuple):
    """How far somebody may go. Without bounds an option may be whatever the kernel takes, which is
    how far any process may go by itself on its own sockets."""

    allowed: bool = True
    bounds: Mapping[str, Range] = MappingProxyType({})  # by key, in the kernel's units
    source: Source | None = None  # None: by default

    def exceeded(self, given: Options) -> str:
        """Which option is out of bounds, or nothing."""
        values = ranges(given)
        for key, bounds in self.bounds.items():
            value = values.get(key)
            if value and (value.low < bounds.low or value.high > bounds.high):
                unit = f" {BY_KEY[key].unit}".rstrip()
                return f"{key}: {value}{unit} is not in {bounds}{unit} ({self.where})"
        return ""

    @property
    def where(self) -> str:
        """File and line, or that no file says anything."""
        return str(self.source or "by default")


class Policy(NamedTuple):
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
    origins: Mapping[str, Origin] = MappingProxyType({})  # by option key
    warnings: tuple[str, ...] = ()
    offered: bool = False  # containers may choose it by their labels and annotations
    # Of one that is on no cgroup itself: it makes a policy of what each container asks for.
    wishes: Limits | None = None

    @property
    def is_of_containers(self) -> bool:
        """Whether what engines know of containers decides who has it."""
        by_itself = self.offered or self.wishes is not None
        return by_itself or any(each.is_of_containers for each in self.selectors)


def is_asked(name: str) -> bool:
    """Whether a policy of this name is one that containers have asked for."""
    return name.startswith(ASKED)


def options_json(options: Options) -> dict[str, Any]:
    """Options by name; a range is a list of its bounds."""
    return {
        key: (value[0] if value[0] == value[1] else list(value))
        if isinstance(value, Range)
        else value
        for key, value in options._asdict().items()
    }


def options_of(fields: Mapping[str, Any]) -> Options:
    """The options that `options_json` made these fields of."""
    values = {row.field: fields[row.field] for row in OPTIONS}
    for row in IN_RANGES:
        if value := values[row.field]:
            values[row.field] = Range(*value) if isinstance(value, list) else Range.exactly(value)
    return Options(fields["keepalive"], **values)


def network_text(network: IPv4Network | IPv6Network) -> str:
    """A network as people write it; of v4-mapped ones Python 3.13 thinks otherwise than 3.11."""
    mapped = getattr(network.network_address, "ipv4_mapped", None)  # of IPv6
    if mapped and network.prefixlen >= 96:
        return f"{mapped}/{network.prefixlen - 96}"
    return str(network)


def warnings(policies: Iterable[Policy]) -> list[str]:
    """What contradicts itself without being wrong, as `file:line: key: what, what was expected`, in
    the order in which the policies were read."""
    return list(dict.fromkeys(text for policy in policies for text in policy.warnings))
