"""The maps and programs of kabpf that are pinned below one directory: reads and writes them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kabpf.digests import blake2b
from kabpf.errors import RefusedError, all_refusals
from kabpf.faults import fault_point
from kabpf.kernel import abi
from kabpf.kernel.abi import (
    CBirth,
    CCgroup,
    CCounters,
    CEvent,
    CFailure,
    CNetwork,
    COptions,
    CPiece,
    CPolicy,
    CPort,
    CRemoved,
    CSocket,
    CStep,
    CTotals,
)
from kabpf.kernel.cgroups import CgroupTree, Removed
from kabpf.kernel.libbpf import buffers, links, maps, programs
from kabpf.plan.state import (
    UNFINISHED,
    CgroupEntry,
    Changes,
    GlobsEntry,
    Needs,
    PolicyRecord,
)
from kabpf.policy.model import Policy

if TYPE_CHECKING:
    from kabpf.plan.desired import Actual

PINS = Path("/sys/fs/bpf/kabpf")
OBJECT = Path(__file__).parents[1] / "kabpf.bpf.o"

MAPS = {  # their keys and values
    "kabpf_policies": (4, CPolicy),
    "kabpf_counters": (4, CCounters),
    "kabpf_cgroups": (8, CCgroup),
    "kabpf_removed": (8, CRemoved),
    "kabpf_births": (ctypes.sizeof(CStep), CBirth),
    "kabpf_names": (ctypes.sizeof(CPiece), ctypes.c_uint64),
    "kabpf_digests": (4, ctypes.c_uint64),
    "kabpf_networks": (ctypes.sizeof(CNetwork), ctypes.c_uint32),
    "kabpf_ports": (ctypes.sizeof(CPort), COptions),
    "kabpf_failures": (ctypes.sizeof(CFailure), ctypes.c_uint64),
    "kabpf_totals": (4, CTotals),
}
ARRAYS = ("kabpf_policies", "kabpf_counters", "kabpf_totals")  # a slot of zeros is unused
BIRTHS = ("kabpf_births", "kabpf_names", "kabpf_digests")  # rows that go with what is in GLOBS
GLOBS = "kabpf_globs"  # can't be read back without CAP_SYS_ADMIN
UNRESOLVED = "kabpf_events"  # births that user space has to resolve
MONITORS = "kabpf_monitors"
LOG = "kabpf_log"
READERS = "kabpf_readers"
CHANNELS = (UNRESOLVED, MONITORS, LOG, READERS, GLOBS)  # maps of which nothing is kept
LISTER = "kabpf_list"
OPEN_LISTER = "kabpf_open_list"
HOLDERS = "kabpf_holders"
OWED = "kabpf_owed"
RETROFIT = "kabpf_retrofit"
# In the order in which they are attached: births are noticed before anything relies on them.
TRACERS = (
    "kabpf_cgroup_mkdir",
    "kabpf_cgroup_release",
    "kabpf_cgroup_rmdir",
    "kabpf_connection_failed",
    RETROFIT,
    LISTER,
    OPEN_LISTER,
    HOLDERS,
    OWED,
)
SOCK_OPS = "kabpf_sockops"
SOCK_OPS_PROGRAM = "kabpf_sockops_program"
SETSOCKOPT = "kabpf_setsockopt"  # the link, while there is one
SETSOCKOPT_PROGRAM = "kabpf_setsockopt_program"
RETROFIT_ONE_PROGRAM = "kabpf_retrofit_one_program"
OBSERVE_PROGRAM = "kabpf_observe_program"  # linked by monitors
PROGRAMS = (SOCK_OPS_PROGRAM, SETSOCKOPT_PROGRAM, RETROFIT_ONE_PROGRAM, OBSERVE_PROGRAM)

ATTACHED = "kabpf_attached"  # a map of the data plane without BTF alone (bcc)

CLOCK_MONOTONIC_COARSE = 6

LOOKS_MAX = 50  # in which some milliseconds without a change of a policy are found

NODES = 1 << 20  # numbers for the networks of one policy

# What a BPF iterator gathers before a read ends (bpf_seq_read() in kernel/bpf/bpf_iter.c).
ITERATOR_ROOM = 8 * os.sysconf("SC_PAGE_SIZE")

Looked = TypeVar("Looked")


class Born(NamedTuple):
    """A new cgroup that the kernel could not resolve alone."""

    id: int
    parent_id: int
    name: str


class Counters(NamedTuple):
    """What happened under one policy since its options became active."""

    established: int
    listening: int
    updated: int
    kept: int
    ignored: int
    clamped: int
    turned_off: int  # while the calls are watched
    timed_out: int
    timed_out_by_keepalive: int  # of these
    failed: dict[str, int]  # by the errno's name


class Totals(NamedTuple):
    """What went wrong in the data plane as a whole since it was loaded."""

    events_dropped: int
    unrecorded: int


def digest() -> int:
    """A digest of the programs and maps that are installed now."""
    return int.from_bytes(blake2b(OBJECT.read_bytes(), digest_size=8).digest(), sys.byteorder)


class Dataplane:
    """An open data plane. A context manager; closing it changes nothing in the kernel.

    Raises RefusedError where the pins are damaged or come from another version of kabpf; with
    `any_build` one whose maps have the same layout will do.
    """

    updates_open_sockets = True
    sees_births = True  # of cgroups, and resolves them
    reports_events = True  # of sockets
    lists_sockets = True
    needs_pins_per_cgroup = False
    digest = staticmethod(digest)
    # Of those that this process knows, although others be installed over them.
    build = staticmethod(functools.cache(digest))

    def __init__(self, pins: Path, tree: CgroupTree, *, any_build: bool = False) -> None:
        self.pins, self.tree = pins, tree
        with ExitStack() as stack:

            def opened(name: str) -> maps.Map:
                return stack.enter_context(open_map(pins, name))

            # First: another layout may lack any of the others.
            self._totals = opened("kabpf_totals")
            totals = self._read_totals()
            if totals.layout != abi.LAYOUT or (totals.build != self.build() and not any_build):
                raise RefusedError(
                    f"{pins} comes from another version of kabpf",
                    hint="try: kabpfctl apply",
                )
            self._policies = opened("kabpf_policies")
            self._counters = opened("kabpf_counters")
            self._cgroups = opened("kabpf_cgroups")
            self._removed = opened("kabpf_removed")
            self._births = opened("kabpf_births")
            self._names = opened("kabpf_names")
            self._generations = opened("kabpf_digests")
            self._networks = opened("kabpf_networks")
            self._ports = opened("kabpf_ports")
            self._failures = opened("kabpf_failures")
            self._stack = stack.pop_all()

    def __enter__(self) -> Dataplane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the maps; the pins keep them."""
        self._stack.close()

    def actual(self) -> Actual:
        """What is in the kernel now. Every mkdir that began before has ended, and is in it."""
        from kabpf.plan.desired import Actual  # here, because most commands do without

        self.attached()
        return Actual(
            self.records(),
            {abi.read_step(key): abi.read_birth(value) for key, value in self._births.items()},
            {abi.number(key): abi.read_entry(value) for key, value in self._cgroups.items()},
            self.needs(),
            names={abi.read_piece(key): abi.number(value) for key, value in self._names.items()},
            generations={
                abi.number(key): abi.number(value)
                for key, value in self._generations.items()
                if any(value)
            },
        )

    def records(self) -> dict[int, PolicyRecord]:
        """The policies that are in the kernel, by their ids."""
        return _read(self._raw_records())

    def between_changes(self, look: Callable[[dict[int, PolicyRecord]], Looked]) -> Looked:
        """What `look`, which is given the records, sees while they stay as they are: it looks again
        where a command that holds the lock changed some meanwhile, but not for ever."""
        before = self._raw_records()
        for _ in range(LOOKS_MAX):
            looked = look(_read(before))
            after = self._raw_records()
            if after == before:
                break
            before = after
        return looked

    def free_record(self) -> int | None:
        """The id that a new policy may have."""
        return next(self.free_records(), None)

    def free_records(self) -> Iterator[int]:
        """The ids that new policies may have."""
        used = self._raw_records()
        return (id for id in range(1, abi.POLICIES) if id not in used)

    def entries(self, ids: Iterable[int]) -> dict[int, CgroupEntry]:
        """What the kernel has for these cgroups; those that are gone are left out."""
        values = {id: self._cgroups.look_up(abi.key(id, 8)) for id in ids}
        return {id: abi.read_entry(value) for id, value in values.items() if value}

    def entries_with(self, policy_ids: Container[int]) -> tuple[dict[int, CgroupEntry], set[int]]:
        """The entries that have one of these policies, and the ids of all that any entry has or
        remembers. Every mkdir that began before has ended, and is in it."""
        self.attached()
        found: dict[int, CgroupEntry] = {}
        used: set[int] = set()
        is_found: dict[bytes, bool] = {}  # most of any number of entries have one of a few values
        for key, value in self._cgroups.items():
            if value not in is_found:
                ids = abi.read_policy_ids(value)
                used.update(ids)
                is_found[value] = ids[0] in policy_ids
            if is_found[value]:
                found[abi.number(key)] = abi.read_entry(value)
        return found, used

    def owes(self) -> bool:
        """Whether open sockets of a cgroup wait to be updated."""
        return any(value[CCgroup.owed.offset] for _, value in self._cgroups.items())

    def owed(self) -> dict[int, CgroupEntry]:
        """The entries of the cgroups whose open sockets wait to be updated."""
        return {
            abi.number(key): abi.read_entry(value)
            for key, value in self._cgroups.items()
            if value[CCgroup.owed.offset]
        }

    def removed(self) -> dict[int, Removed]:
        """The cgroups that are removed and have an entry still, by their ids; a parent may be one
        of them. Every rmdir that began before has ended, and is in it."""
        self.attached()
        found = (
            (abi.number(key), CRemoved.from_buffer_copy(value))
            for key, value in self._removed.items()
        )
        return {id: Removed(raw.parent_id, os.fsdecode(raw.name)) for id, raw in found}

    def policy_name(self, id: int) -> str | None:
        """The name of the policy that has this id now, or None."""
        raw = self._policies.look_up(abi.key(id)) or bytes(CPolicy())
        return CPolicy.from_buffer_copy(raw).name.decode() or None

    def usage(self) -> Counter[int]:
        """How many cgroups have each policy, by its id; those that are removed are left out."""
        removed = {key for key, _ in self._removed.items()}
        values = (value for key, value in self._cgroups.items() if key not in removed)
        return Counter(map(abi.read_policy_id, values))

    def needs(self) -> Needs:
        """What is on because a policy needs it."""
        totals = self._read_totals()
        is_needed, is_linked = bool(totals.setsockopt), self._watches_setsockopt()
        return Needs(is_linked if is_linked == is_needed else None, bool(totals.before_syn))

    def require_supported(self, policies: Iterable[Policy]) -> None:
        """Raise PolicyError, by file and line, for what policies ask of this data plane that it
        can't do."""

    def check(self) -> None:
        """Raise RefusedError unless the programs that work with these maps are attached to the
        root of the cgroup2 tree, kabpf_setsockopt where a policy needs it, and the others are
        pinned beside them."""
        there = self._pinned()
        for name in (*MAPS, *CHANNELS, *TRACERS, SOCK_OPS, *PROGRAMS):
            if name not in there:
                raise RefusedError(f"{self.pins / name} is missing", hint="try: kabpfctl apply")
        program = self.identity()
        if program not in self.attached():
            raise RefusedError(
                f"{self.pins / SOCK_OPS} is not attached to {self.tree.mount}",
                hint="try: kabpfctl apply",
            )
        if not is_linked(self.pins):
            raise RefusedError(
                f"{self.pins / SOCK_OPS} has another program",
                hint="try: kabpfctl apply",
            )
        self._check_setsockopt()

    def _pinned(self) -> set[str]:
        try:
            return set(os.listdir(self.pins))
        except FileNotFoundError:
            return set()

    def _check_setsockopt(self) -> None:
        link = self.pins / SETSOCKOPT
        if self._watches_setsockopt():
            return
        if link.exists():
            raise RefusedError(
                f"{link} is not attached to {self.tree.mount}",
                hint="try: kabpfctl apply",
            )
        # Read last: where another command does away with the link, this was cleared before.
        if self._read_totals().setsockopt:
            raise RefusedError(f"{link} is missing", hint="try: kabpfctl apply")

    def _watches_setsockopt(self) -> bool:
        """Whether the link is there, to the root, with the program that is pinned beside it."""
        link = str(self.pins / SETSOCKOPT)
        try:
            if links.link_cgroup(link) != os.stat(self.tree.mount).st_ino:
                return False  # severed: 0
            program = programs.program_id(str(self.pins / SETSOCKOPT_PROGRAM))
            return links.link_program(link) == program
        except RefusedError as error:
            if error.error == errno.ENOENT:
                return False
            raise

    def attached(self) -> list[int]:
        """The ids of the sock_ops programs of the root cgroup. Every mkdir that had begun before
        has ended when it returns."""
        with opened_directory(self.tree.mount) as cgroup:
            return links.sock_ops_programs(cgroup)

    def apply(self, changes: Changes, update: Callable[[], Set[int]] | None = None) -> None:
        """Write `changes` in their order; open sockets have their options when it returns.

        `update` runs RETROFIT where sockets of cgroups that are owed it may be, and returns the
        cgroups that stay owed; without it all do. What one cgroup refuses stops no other; all
        refusals are raised at the end as one RefusedError. A retrofit that was refused stays owed.
        Where a policy itself is refused, nothing else is written.
        """
        self._write_records(changes.records)
        if changes.needs is not None:
            self._provide(changes.needs)
        if changes.globs:
            self._write_globs(changes.globs)
        pieces = changes.names.items()
        self._names.update_all([(abi.piece(each), abi.key(id, 8)) for each, id in pieces])
        with all_refusals() as collected:
            births = [(abi.step(step), abi.birth(each)) for step, each in changes.births.items()]
            self._births.update_all(births, collected)
            cgroups = [(abi.key(id, 8), abi.entry(each)) for id, each in changes.cgroups.items()]
            self._cgroups.update_all(cgroups, collected)
            if changes.updates and update:
                with collected():
                    left = update()
                    done = changes.updates
                    self.correct({id: done[id] for id in done.keys() - left})
            self._cgroups.delete_all([abi.key(id, 8) for id in changes.stale_cgroups])
            self._births.delete_all(list(map(abi.step, changes.stale_births)))
            self._names.delete_all(list(map(abi.piece, changes.stale_names)))
            for number in changes.stale_generations:
                self._forget_globs(number)
            for id in changes.stale_records:
                self._policies.update(abi.key(id), bytes(CPolicy()))
            if changes.stale_records:
                self._forget_destinations(changes.stale_records)

    def correct(self, entries: dict[int, CgroupEntry]) -> None:
        """Write the entries of cgroups that are there still."""
        for id, entry in entries.items():
            self._cgroups.replace(abi.key(id, 8), abi.entry(entry))

    def counters(self, policy_ids: Iterable[int]) -> dict[int, Counters]:
        """What happened under these policies, by their ids."""
        failed: dict[int, dict[str, int]] = {}
        for key, value in self._failures.items():
            failure = CFailure.from_buffer_copy(key)
            name = errno.errorcode.get(failure.error, str(failure.error))
            failed.setdefault(failure.policy_id, {})[name] = abi.number(value)
        counters = {}
        for id in policy_ids:
            raw = CCounters.from_buffer_copy(
                self._counters.look_up(abi.key(id)) or bytes(CCounters())
            )
            counters[id] = Counters(
                raw.established,
                raw.listening,
                raw.updated,
                raw.kept,
                raw.ignored,
                raw.clamped,
                raw.turned_off,
                raw.timed_out,
                raw.timed_out_by_keepalive,
                failed.get(id, {}),
            )
        return counters

    def totals(self) -> Totals:
        """What went wrong since the data plane was loaded."""
        raw = self._read_totals()
        return Totals(raw.events_dropped, raw.unrecorded)

    def events(self, receive: Callable[[Born], None]) -> buffers.RingBuffer:
        """The births that user space has to resolve, for one reader on the machine."""

        def decode(event: bytes) -> None:
            raw = CEvent.from_buffer_copy(event)
            receive(Born(raw.cgroup_id, raw.parent_id, os.fsdecode(raw.name)))

        return buffers.RingBuffer(str(self.pins / UNRESOLVED), decode)

    def identity(self) -> int:
        """The id of the attached program: another one after the data plane was loaded anew."""
        return links.link_program(str(self.pins / SOCK_OPS))

    def copy_from(self, pins: Path) -> None:
        """Take over what the maps pinned at `pins` hold, which have the same layout."""
        for name in MAPS.keys() - BIRTHS:
            with open_map(pins, name) as old, open_map(self.pins, name) as new:
                for key in old.all_keys() if name == "kabpf_networks" else ():
                    new.update(key, old.look_up(key) or bytes(4))
                entries = old.items() if name != "kabpf_networks" else ()
                new.update_all([each for each in entries if name not in ARRAYS or any(each[1])])
        totals = self._read_totals()
        totals.layout, totals.build = abi.LAYOUT, self.build()
        self._totals.update(abi.key(0), bytes(totals))

    def _raw_records(self) -> dict[int, bytes]:
        used = self._policies.items(mark=CPolicy.name.offset)
        return {abi.number(key): value for key, value in used}

    def _read_totals(self) -> CTotals:
        return CTotals.from_buffer_copy(self._totals.look_up(abi.key(0)) or bytes(CTotals()))

    def _provide(self, needs: Needs) -> None:
        link = self.pins / SETSOCKOPT
        if needs.setsockopt and not self._watches_setsockopt():
            link.unlink(missing_ok=True)  # one that somebody detached
            program = str(self.pins / SETSOCKOPT_PROGRAM)
            with opened_directory(self.tree.mount) as cgroup:
                links.link_pinned_to_cgroup(program, cgroup, links.CGROUP_SETSOCKOPT, str(link))
        totals = self._read_totals()
        totals.before_syn, totals.setsockopt = needs.before_syn, bool(needs.setsockopt)
        self._totals.update(abi.key(0), bytes(totals))
        if not needs.setsockopt:
            fault_point("unlink kabpf_setsockopt")
            link.unlink(missing_ok=True)

    def _write_records(self, records: Mapping[int, PolicyRecord]) -> None:
        if not records:
            return
        self._forget_destinations(records)
        for key in self._failures.all_keys():
            if CFailure.from_buffer_copy(key).policy_id in records:
                self._failures.delete(key)
        for id, record in records.items():
            self._counters.update(abi.key(id), bytes(CCounters()))
            self._write_destinations(id, record)
            self._policies.update(abi.key(id), abi.policy(record))

    def _write_globs(self, globs: GlobsEntry) -> None:
        """A cgroup goes on by the generation that its entry's state names; none does so by this one
        yet."""
        self._generations.update(abi.key(globs.number), abi.key(UNFINISHED, 8))
        with maps.Map(str(self.pins / GLOBS), 4, 4) as all_globs:
            if globs.blocks:
                with maps.new_array(GLOBS, globs.blocks) as automaton:
                    all_globs.update(abi.key(globs.number), abi.key(automaton))
            else:
                all_globs.delete(abi.key(globs.number))
        self._generations.update(abi.key(globs.number), abi.key(globs.digest, 8))

    def _forget_globs(self, number: int) -> None:
        with maps.Map(str(self.pins / GLOBS), 4, 4) as all_globs:
            all_globs.delete(abi.key(number))
        self._generations.update(abi.key(number), bytes(8))

    def _write_destinations(self, id: int, record: PolicyRecord) -> None:
        if not record.digest:
            return
        from kabpf.policy import destinations  # here, because few policies have any

        table = destinations.table(record.destinations)
        for network, node in table.nodes.items():
            address = (ctypes.c_uint8 * 16)(*network.network_address.packed)
            key = bytes(CNetwork(32 + network.prefixlen, id, address))
            self._networks.update(key, abi.key(id * NODES + node))
        for (node, port), options in table.options.items():
            key = bytes(CPort(id * NODES + node, port))
            self._ports.update(key, bytes(abi.options(options)))

    def _forget_destinations(self, policy_ids: Container[int]) -> None:
        """Also those of a policy that an interrupted apply did not come to write."""
        for key in self._networks.all_keys():
            if CNetwork.from_buffer_copy(key).policy_id in policy_ids:
                self._networks.delete(key)
        for key in self._ports.all_keys():
            if CPort.from_buffer_copy(key).network // NODES in policy_ids:
                self._ports.delete(key)


def _read(records: dict[int, bytes]) -> dict[int, PolicyRecord]:
    return {id: abi.read_policy(raw) for id, raw in records.items()}


def jiffies() -> int:
    """How many of the kernel's jiffies a second has."""
    return round(1 / time.clock_getres(CLOCK_MONOTONIC_COARSE))


class Holder(NamedTuple):
    """A descriptor of a TCP socket, as kabpf_holder in kabpf.h says."""

    cgroup_id: int
    inode: int
    namespace: int
    process: int
    descriptor: int
    flags: int  # abi.HELD, abi.OWED


def holders(pins: Path, iterator: str = HOLDERS) -> Iterator[Holder]:
    """Which processes have TCP sockets, of which cgroups, in which network namespaces; with OWED
    each descriptor of a socket of a cgroup that is owed the update. It takes no lock of any
    socket."""
    for piece in output(pins / iterator):
        yield from itertools.starmap(Holder, abi.HOLDER.iter_unpack(piece))


@contextlib.contextmanager
def linked_for_one(pins: Path, root: Path) -> Iterator[None]:
    """Have the kernel take options of abi.LEVEL, which update one socket, in the block."""
    program = str(pins / RETROFIT_ONE_PROGRAM)
    with (
        opened_directory(root) as cgroup,
        links.linked_to_cgroup(program, cgroup, links.CGROUP_SETSOCKOPT),
    ):
        yield


def sockets(raw: bytes) -> Iterable[CSocket]:
    """What LISTER wrote."""
    return (CSocket * (len(raw) // ctypes.sizeof(CSocket))).from_buffer_copy(raw)


def open_sockets(pins: Path) -> Iterable[CSocket]:
    """What OPEN_LISTER writes for each descriptor that a process has of a socket; no two alike, as
    it may have any number of one."""
    distinct: dict[bytes, None] = {}
    for piece in output(pins / OPEN_LISTER):
        distinct.update(dict.fromkeys(raw for (raw,) in _SOCKET.iter_unpack(piece)))
    return sockets(b"".join(distinct))


_SOCKET = struct.Struct(f"{ctypes.sizeof(CSocket)}s")


def is_by_bcc(pins: Path) -> bool:
    """Whether what is pinned there is the data plane without BTF."""
    return os.path.exists(pins / ATTACHED)


def is_linked(pins: Path) -> bool:
    """Whether the link pinned there has the program pinned there, which works with the maps beside
    it: in every version."""
    program = programs.program_id(str(pins / SOCK_OPS_PROGRAM))
    return links.link_program(str(pins / SOCK_OPS)) == program


def open_map(pins: Path, name: str) -> maps.Map:
    """One of the pinned maps. Raises RefusedError where it has another layout."""
    if not (pins / name).exists():
        raise RefusedError(f"{pins / name} is missing", hint="try: kabpfctl apply")
    key_size, value = MAPS[name]
    return maps.Map(str(pins / name), key_size, ctypes.sizeof(value))


@contextlib.contextmanager
def opened_directory(path: Path) -> Iterator[int]:
    """The descriptor of a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def output(iterator: Path) -> Iterator[bytes]:
    """Run a pinned iterator to its end; what it writes."""
    try:
        descriptor = os.open(iterator, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # another command has unloaded it
        raise RefusedError(f"run {iterator}", error.errno or 0) from None
    try:
        while True:
            try:
                if not (piece := os.read(descriptor, ITERATOR_ROOM)):
                    return
                yield piece
            except BlockingIOError:  # a million objects walked, and nothing written (same place)
                continue
            except OSError as error:
                raise RefusedError(f"run {iterator}", error.errno or 0) from None
    finally:
        os.close(descriptor)
