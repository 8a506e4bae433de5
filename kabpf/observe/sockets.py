"""The TCP sockets of the machine: whose they are, and which keepalive options are active.

The data plane knows all of it, in every network namespace. Where it can't be read, inet_diag
knows whose they are, in the caller's namespace, and whether a keepalive timer runs.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import socket
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

from kabpf.apply.retrofit import sorted_namespaces
from kabpf.apply.visitors import Part, outcomes
from kabpf.audit.connections import MAPPED, Setter, Timer
from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel import dataplane
from kabpf.kernel.abi import NEVER, CSocket
from kabpf.kernel.cgroups import CgroupTree, add_removed
from kabpf.kernel.dataplane import LISTER, Dataplane
from kabpf.kernel.namespaces import held_namespaces, own_namespace
from kabpf.observe import containers
from kabpf.policy.model import ON_SOCKETS

# include/net/tcp_states.h in the kernel.
STATES = (
    "none", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close",
    "close-wait", "last-ack", "listen", "closing",
)  # fmt: skip
# Time-wait and request sockets have no options.
LISTED = sum(
    1 << STATES.index(state) for state in STATES[1:] if state not in ("time-wait", "syn-recv")
)

FAMILIES = {int(socket.AF_INET): "ipv4", int(socket.AF_INET6): "ipv6"}

SETTERS = tuple(setter.name.lower().replace("_", " ") for setter in Setter)
SET = (*(row.field for row in ON_SOCKETS), "keepalive")  # in the order of `by`

# Units that have a cgroup (systemd.unit(5)).
UNIT = re.compile(r".+\.(service|socket|scope|slice|mount|swap)", re.DOTALL)

# Characters of a path whose name is kept, for tables of sockets. Who makes longer ones makes many.
KEPT_MAX = 512

CGROUP_ID = "INET_DIAG_CGROUP_ID"
NLMSG_ERROR = 2  # nlmsg_type (netlink(7))


class Address(NamedTuple):
    """One end; an IPv4 address is written as such, also where the socket is of IPv6."""

    address: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return "*"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Socket:
    """A TCP socket that is neither a request nor in time-wait. None: nothing there, or unknown."""

    cgroup_id: int | None
    # The path; None: outside of this cgroup namespace, or removed, and not known where it was.
    cgroup: str | None
    namespace: int  # the network namespace's inode number
    family: str
    local: Address
    peer: Address
    state: str
    keepalive: bool | None
    idle_s: int | None
    interval_s: int | None
    probes: int | None
    user_timeout_ms: int | None  # 0: none
    next_probe_ms: int | None  # from now, if the connection stays silent
    policy: str | None  # its cgroup's
    set_by: Mapping[str, str]  # by option, as in SET: one of SETTERS
    is_removed: bool = False  # its cgroup

    @property
    def unit(self) -> str | None:
        """The innermost systemd unit that the cgroup is in."""
        return next(reversed(units(self.cgroup)), None)


@dataclass(frozen=True)
class Filter:
    """Which sockets are asked for; None is any."""

    cgroup: str | None = None  # a cgroup path, and all below it
    units: tuple[str, ...] | None = None  # units' names or globs, and all inside them
    policy: str | None = None
    without_keepalive: bool = False
    container: str | None = None  # as `containers.is_meant` takes it

    def __call__(self, candidate: Socket) -> bool:
        """Whether a socket is asked for."""
        return (
            is_inside(candidate.cgroup, self.cgroup, self.units, self.container)
            and (self.policy is None or candidate.policy == self.policy)
            and (not self.without_keepalive or candidate.keepalive is False)
        )


def is_inside(
    path: str | None, cgroup: str | None, named: tuple[str, ...] | None, container: str | None
) -> bool:
    """Whether a cgroup is asked for: in the cgroup of this path, in a unit of one of these names or
    globs, and in a container that is meant, or below them; None is any."""
    return (
        (cgroup is None or _is_within(path, cgroup))
        and (named is None or any(fnmatch.filter(units(path), name) for name in named))
        and (container is None or containers.is_meant(path, container))
    )


def all_of_machine(tree: CgroupTree, loaded: Dataplane | None) -> Iterator[Socket]:
    """What the data plane lists, or where that can't, what inet_diag does. Raises
    UnsupportedError."""
    if not loaded or not loaded.lists_sockets:
        return from_inet_diag(tree)
    return iter(Look(loaded, Filter(), of_machine(loaded, lambda _: None))[:])


def policy_names(loaded: Dataplane) -> dict[int, str]:
    """The names of the policies in the kernel, by their ids."""
    return {id: each.name for id, each in loaded.records().items()}


class Look(Sequence[Socket]):
    """The sockets of every network namespace that are asked for, in the order of their cgroups and
    ends. What each is, is worked out when it is looked at: most of ten thousand are not.

    `records` are those of `of_machine` or of `open_by_processes`.
    """

    def __init__(self, loaded: Dataplane, selection: Filter, records: Collection[CSocket]) -> None:
        self.policies = policy_names(loaded)  # by id
        # Read last: whatever is missing is gone, and not newer.
        cgroups = {cgroup.id: cgroup for cgroup in loaded.tree.cgroups()}
        ids = {record.cgroup_id for record in records}
        self._removed = ids - cgroups.keys()
        if self._removed:
            removed = loaded.removed()
            add_removed(cgroups, removed)
            if not loaded.tree.is_whole:  # others are outside
                self._removed &= removed.keys()
        # Of these alone: paths may have 4 KB, and there may be many others.
        self.paths = {id: cgroups[id].path for id in ids & cgroups.keys()}
        self._records = [*filter(self._selector(selection), records)]
        self._records.sort(key=self._place)

    @property
    def records(self) -> list[CSocket]:
        """As the kernel has them, in the same order."""
        return self._records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> Socket: ...
    @overload
    def __getitem__(self, place: slice) -> list[Socket]: ...
    def __getitem__(self, place: int | slice) -> Socket | list[Socket]:
        if isinstance(place, slice):
            return list(map(self._socket, self._records[place]))
        return self._socket(self._records[place])

    def _selector(self, selection: Filter) -> Callable[[CSocket], bool]:
        policies = {id for id, name in self.policies.items() if name == selection.policy}

        @functools.cache
        def is_inside_of(cgroup_id: int) -> bool:
            path = self.paths.get(cgroup_id)
            return is_inside(path, selection.cgroup, selection.units, selection.container)

        return lambda record: (
            is_inside_of(record.cgroup_id)
            and (selection.policy is None or record.policy_id in policies)
            and not (selection.without_keepalive and record.keepalive)
        )

    def _place(self, record: CSocket) -> tuple[object, ...]:
        return (self.paths.get(record.cgroup_id, ""), *_ends(record))

    def _socket(self, record: CSocket) -> Socket:
        return Socket(
            record.cgroup_id,
            self.paths.get(record.cgroup_id),
            record.namespace,
            FAMILIES[record.family],
            Address(text(bytes(record.local)), record.local_port),
            Address(text(bytes(record.remote)), record.remote_port),
            STATES[record.state],
            bool(record.keepalive),
            record.idle_s,
            record.interval_s,
            record.probes,
            record.user_timeout_ms,
            None if record.next_probe_ms == NEVER else record.next_probe_ms,
            self.policies.get(record.policy_id),
            _set_by(bytes(record.by)),
            record.cgroup_id in self._removed,
        )


def without_keepalive(listed: Sequence[Socket]) -> int:
    """How many have keepalive off."""
    if isinstance(listed, Look):
        return sum(1 for record in listed.records if not record.keepalive)
    return sum(1 for one in listed if one.keepalive is False)


def namespaces(listed: Sequence[Socket]) -> int:
    """In how many network namespaces they are."""
    return len({one.namespace for one in (listed.records if isinstance(listed, Look) else listed)})


def identities(listed: Sequence[Socket]) -> set[Hashable]:
    """What tells each from the others, at a later look as well."""
    if isinstance(listed, Look):
        return {(record.namespace, *_ends(record)) for record in listed.records}
    return {(one.namespace, one.local, one.peer) for one in listed}


def _ends(record: CSocket) -> tuple[bytes, int, bytes, int]:
    return bytes(record.local), record.local_port, bytes(record.remote), record.remote_port


def of_machine(loaded: Dataplane, say: Callable[[str], None]) -> list[CSocket]:
    """The sockets of every network namespace. `say` is told of those of which only the sockets are
    there that processes have open."""
    pins = loaded.pins
    records: list[CSocket] = []
    incomplete: set[int] = set()
    for outcome in outcomes(functools.partial(dataplane.output, pins / LISTER), parts(pins)):
        if outcome.is_held:
            incomplete.add(outcome.namespace)
        elif outcome.refused:
            raise RefusedError(outcome.refused)
        else:
            records += dataplane.sockets(outcome.output)
    if incomplete:
        records += (one for one in _open(pins) if one.namespace in incomplete)
    for inode in sorted(incomplete):
        say(f"network namespace {inode}: a socket there is held; others may be missing")
    return records


def parts(pins: Path | None) -> Iterator[Part]:
    """Every network namespace for `outcomes`, this one first; without the data plane those that
    processes are in, or mounts are of."""
    own = own_namespace()
    yield Part([own])
    holders = dataplane.holders(pins) if pins else ()
    yield Part([*chain(*sorted_namespaces(own, holders, held_namespaces()))])


def open_by_processes(loaded: Dataplane) -> Collection[CSocket]:
    """The sockets that processes have open, of every network namespace, without waiting for any
    that is held. Connections that no process has accepted yet are not among them."""
    return _open(loaded.pins)


def _open(pins: Path) -> Collection[CSocket]:
    # Several processes may have one socket.
    return {_identity(one): one for one in dataplane.open_sockets(pins)}.values()


def _identity(one: CSocket) -> tuple[object, ...]:
    return one.namespace, one.cgroup_id, one.state, *_ends(one)


def from_inet_diag(tree: CgroupTree) -> Iterator[Socket]:
    """The sockets of the caller's network namespace; it needs no privilege.

    Raises UnsupportedError without pyroute2 or without the kernel's module for it.
    """
    namespace = os.stat("/proc/self/ns/net").st_ino
    messages = list(_inet_diag())
    paths = _paths(tree, {message.get_attr(CGROUP_ID) for message in messages})
    is_whole = tree.is_whole
    for message in messages:
        id = message.get_attr(CGROUP_ID)
        state, timer = STATES[message["idiag_state"]], message["idiag_timer"]
        # After its last close a socket waits for the end of the other side by the same timer.
        probes = timer == Timer.KEEPALIVE and state != "fin-wait-2"
        silent = timer == 0 and state in ("established", "close-wait")
        yield Socket(
            id,
            paths.get(id),
            namespace,
            FAMILIES[message["idiag_family"]],
            Address(_unmapped(message["idiag_src"]), message["idiag_sport"]),
            Address(_unmapped(message["idiag_dst"]), message["idiag_dport"]),
            state,
            True if probes else False if silent else None,
            None,
            None,
            None,
            None,
            message["idiag_expires"] if probes else None,
            None,
            {},
            is_whole and id is not None and id not in paths,
        )


def _inet_diag() -> Iterator[Any]:
    try:
        # Imported here, because it takes 0.2 s and is not needed otherwise.
        from pyroute2 import DiagSocket
        from pyroute2.netlink.diag import inet_diag_msg
    except ImportError:
        raise UnsupportedError(
            "pyroute2 is missing; install python3-pyroute2 (Debian, Fedora)"
        ) from None

    class Message(inet_diag_msg):  # type: ignore[misc]
        """With the one attribute of linux/inet_diag.h that matters; pyroute2 lacks it before
        0.7.9. Linux has it since commit 6e3a401fc8af ("inet_diag: add cgroup id attribute") (in
        v5.8)."""

        nla_map = ((21, CGROUP_ID, "uint64"),)

    with DiagSocket() as diag:
        diag.marshal.msg_map = dict.fromkeys(FAMILIES, Message)
        diag.bind()
        for family in FAMILIES:
            for message in diag.get_sock_stats(family=family, states=LISTED):
                if message["header"]["type"] == NLMSG_ERROR:
                    raise UnsupportedError(
                        "the kernel lists no TCP sockets; try: modprobe tcp_diag"
                    )
                yield message


def _paths(tree: CgroupTree, ids: set[int]) -> dict[int, str]:
    return {cgroup.id: cgroup.path for cgroup in tree.cgroups() if cgroup.id in ids}


@functools.cache
def _set_by(setters: bytes) -> dict[str, str]:
    return {option: SETTERS[setter] for option, setter in zip(SET, setters, strict=False)}


def units(path: str | None) -> tuple[str, ...]:
    """The systemd units that a cgroup is in, the innermost last."""
    path = path or ""
    return _kept_units(path) if len(path) <= KEPT_MAX else _units(path)


def _units(path: str) -> tuple[str, ...]:
    return tuple(name for name in path.split("/") if UNIT.fullmatch(name))


_kept_units = functools.lru_cache(maxsize=65536)(_units)


def name(path: str) -> str:
    """What to call a cgroup, the same wherever it is shown: its path without the slices that its
    unit is in, which systemd's names don't need. A cgroup in no unit has its whole path, and one
    of a container what the container is called."""
    if called := containers.called(path):
        return called
    return _kept_name(path) if len(path) <= KEPT_MAX else _name(path)


def _name(path: str) -> str:
    inner = next(reversed(units(path)), None)
    if inner is None:
        return path
    start = f"{path}/".rindex(f"/{inner}/")
    around = [each for each in path[:start].split("/")[1:] if not each.endswith(".slice")]
    called = "/".join([*around, path[start + 1 :]])
    return called if UNIT.fullmatch((around or [inner])[0]) else f"/{called}"


_kept_name = functools.lru_cache(maxsize=65536)(_name)


def _is_within(path: str | None, outer: str) -> bool:
    return path is not None and (path == outer or path.startswith(outer.rstrip("/") + "/"))


def text(address: bytes) -> str:
    """An address of 128 bits as people write it."""
    if address.startswith(MAPPED):
        return socket.inet_ntop(socket.AF_INET, address[len(MAPPED) :])
    return socket.inet_ntop(socket.AF_INET6, address)


def _unmapped(address: str) -> str:
    return address.removeprefix("::ffff:") if "." in address else address
