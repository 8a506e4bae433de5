"""Selectors as patterns over the names of a cgroup path, and their precedence."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from kabpf.policy.model import GLOB, Policy, Selector

ANY_DEPTH = "**"
INSTANCES = "@*.service"  # of a template
USER_MANAGERS = ("user.slice", "*", "user@*.service")

# What is before the first dot of a cgroup file's name: the controllers that systemd knows.
CGROUP_FILES = frozenset((
    "cgroup", "cpu", "cpuacct", "cpuset", "io", "blkio", "memory", "devices", "pids",
    "bpf-firewall", "bpf-devices", "bpf-foreign", "bpf-socket-bind",
    "bpf-restrict-network-interfaces", "bpf-bind-network-interface",
))  # fmt: skip


class Kind(IntEnum):
    """What a selector is, the weakest first."""

    GLOB = 0
    SOCKET = 1  # foo.socket, because foo.service or foo@.service is selected
    RELATED_SOCKET = 2  # one that systemd's files relate to the service
    UNIT = 3
    USER_UNIT = 4
    CONTAINER = 5  # or a pod, by what its engine knows of it
    PATH = 6


class Rank(NamedTuple):
    """Of two selectors that name one cgroup the greater wins."""

    kind: Kind
    literal_prefix: int
    order: int  # of reading


class Pattern(NamedTuple):
    """The names of a cgroup path, from the root, as a selector has them; each may be a glob."""

    names: tuple[str, ...]
    rank: Rank
    policy: Policy | None  # None: user space is asked about the cgroups that it names


@functools.lru_cache(maxsize=4096)
def compiled(glob: str) -> re.Pattern[str]:
    """A glob within a name as a regular expression."""
    return re.compile(fnmatch.translate(glob))


class Naming:
    """Which selectors of `policies` name a cgroup, the beaten ones included."""

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        self._by_last: dict[str | None, list[tuple[int, tuple[str, ...], Policy, Selector]]] = {}
        selectors = [(policy, each) for policy in policies for each in policy.selectors]
        for order, (policy, selector) in enumerate(selectors):
            for _, _, names in patterns_of(selector):
                last = names[-1] if names else ""
                key = None if GLOB.search(last) else last
                self._by_last.setdefault(key, []).append((order, names, policy, selector))

    def __call__(self, path: str) -> list[tuple[Policy, Selector]]:
        """The selectors that name the cgroup at `path`, in the order they were read."""
        names = tuple(path.split("/")[1:]) if path != "/" else ()
        tried = (*self._by_last.get(path.rpartition("/")[2], ()), *self._by_last.get(None, ()))
        named = {
            order: (policy, selector)
            for order, pattern, policy, selector in tried
            if _matches(pattern, names)
        }
        return [named[order] for order in sorted(named)]


def _matches(pattern: Sequence[str], names: Sequence[str]) -> bool:
    if pattern[:1] == (ANY_DEPTH,):
        return any(_matches(pattern[1:], names[start:]) for start in range(len(names) + 1))
    if not pattern or not names:
        return not pattern and not names
    return bool(compiled(pattern[0]).match(names[0])) and _matches(pattern[1:], names[1:])


def rank_of(pattern: Pattern) -> Rank:
    """The rank, for max() over patterns."""
    return pattern.rank


def strength(rank: Rank) -> int:
    """How strong a selector is, but for the order of reading, by which a file more would change
    the rows of all that come later. 0 is none."""
    return (rank.kind << 16 | min(rank.literal_prefix, 0xFFFE)) + 1


PATHS = strength(Rank(Kind.PATH, 0, 0))  # the least strength of an exact path: KABPF_PATHS


def patterns_of(selector: Selector) -> Iterator[tuple[Kind, int, tuple[str, ...]]]:
    """A selector's kind, literal prefix and names; a service brings its socket units, in whose
    cgroups systemd creates the listeners, and a template that of an Accept=yes (systemd.socket(5)).
    A selector of containers or pods has none: paths do not tell.
    """
    if selector.is_of_containers:
        return
    text = selector.text
    glob = GLOB.search(text)
    prefix = glob.start() if glob else len(text)
    if selector.kind == "cgroup":
        names = tuple(text.split("/")[1:]) if text != "/" else ()
        if names[-1:] == (ANY_DEPTH,):
            names += ("*",)  # everything inside, not the directory itself
        yield Kind.GLOB if glob else Kind.PATH, prefix, names
        return
    above = USER_MANAGERS if selector.kind == "user_unit" else ()
    kind = Kind.USER_UNIT if selector.kind == "user_unit" else Kind.UNIT
    yield Kind.GLOB if glob else kind, prefix, (*above, ANY_DEPTH, _escaped(text))
    if text.endswith(".service"):
        socket = text.removesuffix("service") + "socket"
        yield Kind.GLOB if glob else Kind.SOCKET, prefix, (*above, ANY_DEPTH, _escaped(socket))
    if text.endswith(INSTANCES):
        socket = text.removesuffix(INSTANCES) + ".socket"
        kind = Kind.GLOB if GLOB.search(socket) else Kind.SOCKET
        yield kind, prefix, (*above, ANY_DEPTH, _escaped(socket))
    for socket in selector.sockets:
        kind = Kind.GLOB if glob or GLOB.search(socket) else Kind.RELATED_SOCKET
        yield kind, prefix, (*above, ANY_DEPTH, _escaped(socket))


def _escaped(unit: str) -> str:
    """The name of a unit's cgroup: systemd keeps it apart from the files that the kernel may have
    in a cgroup's directory (cg_needs_escape() in its src/basic/cgroup-util.c)."""
    clashes = unit.startswith(("_", ".")) or unit.partition(".")[0] in CGROUP_FILES
    return f"_{unit}" if clashes else unit
