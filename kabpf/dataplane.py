"""The BPF programs and maps of kabpf: loads, pins, adopts, reads, writes and lifts them.

All state is in the pins below one directory of a BPF file system. The directory appears complete,
by one rename, and so it disappears: a process that dies meanwhile leaves the old state or the new.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kabpf import cgroups, libbpf
from kabpf.errors import RefusedError, UnsupportedError
from kabpf.plan import Actual, BirthEntry, Changes, Entry, Record, settled
from kabpf.policy import Options

PINS = Path("/sys/fs/bpf/kabpf")
OBJECT = Path(__file__).with_name("kabpf.bpf.o")
BTF = Path("/sys/kernel/btf/vmlinux")

# From kabpf.h.
POLICIES = 4096
BIRTHS = 65536
NAME = 256

MAPS = (
    "kabpf_policies", "kabpf_counters", "kabpf_cgroups", "kabpf_births", "kabpf_failures",
    "kabpf_totals", "kabpf_events",
)  # fmt: skip
# In the order in which they are attached: births are noticed before anything relies on them.
TRACERS = ("kabpf_birth", "kabpf_death", "kabpf_retrofit")
SOCK_OPS = "kabpf_sockops"

# capability.h; root has them all unless a container or a unit took some away.
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}

CLOCK_MONOTONIC_COARSE = 6


class CPolicy(ctypes.Structure):
    _fields_ = (
        ("keepalive", ctypes.c_uint32),
        ("idle_s", ctypes.c_uint32),
        ("interval_s", ctypes.c_uint32),
        ("probes", ctypes.c_uint32),
        ("user_timeout_ms", ctypes.c_uint32),
        ("name", ctypes.c_char * NAME),
        ("reserved", ctypes.c_uint32),
    )


class CCgroup(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_uint64),
        ("policy_id", ctypes.c_uint32),
        ("was_id", ctypes.c_uint32),
        ("owed", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class CStep(ctypes.Structure):
    _fields_ = (("state", ctypes.c_uint64), ("name", ctypes.c_char * NAME))


class CBirth(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_uint64),
        ("policy_id", ctypes.c_uint32),
        ("ask", ctypes.c_uint32),
    )


class CCounters(ctypes.Structure):
    _fields_ = (
        ("established", ctypes.c_uint64),
        ("listening", ctypes.c_uint64),
        ("retrofitted", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64 * 3),
    )


class CFailure(ctypes.Structure):
    _fields_ = (("policy_id", ctypes.c_uint32), ("error", ctypes.c_uint32))


class CTotals(ctypes.Structure):
    _fields_ = (
        ("build", ctypes.c_uint64),
        ("asked_in_vain", ctypes.c_uint64),
        ("unrecorded", ctypes.c_uint64),
    )


class CEvent(ctypes.Structure):
    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("parent_id", ctypes.c_uint64),
        ("name", ctypes.c_char * NAME),
    )


class Born(NamedTuple):
    """A new cgroup that the kernel could not resolve alone."""

    id: int
    parent_id: int
    name: str


@dataclass(frozen=True)
class Counters:
    """What happened under one policy since its options came into force."""

    established: int
    listening: int
    retrofitted: int
    left: int
    failed: dict[str, int]  # by the errno's name


@dataclass(frozen=True)
class Totals:
    """What went wrong in the data plane as a whole since it was loaded."""

    asked_in_vain: int
    unrecorded: int


class Dataplane:
    """An open data plane. A context manager; closing it changes nothing in the kernel.

    Raises RefusedError where the pins are damaged or come from another version of kabpf, or where
    the program is not attached to the root of the tree any more.
    """

    def __init__(self, pins: Path, tree: cgroups.CgroupTree) -> None:
        self._pins, self._tree = pins, tree
        with ExitStack() as stack:
            self._policies = stack.enter_context(self._map("kabpf_policies", 4, CPolicy))
            self._counters = stack.enter_context(self._map("kabpf_counters", 4, CCounters))
            self._cgroups = stack.enter_context(self._map("kabpf_cgroups", 8, CCgroup))
            self._births = stack.enter_context(
                self._map("kabpf_births", ctypes.sizeof(CStep), CBirth)
            )
            self._failures = stack.enter_context(
                self._map("kabpf_failures", ctypes.sizeof(CFailure), ctypes.c_uint64)
            )
            self._totals = stack.enter_context(self._map("kabpf_totals", 4, CTotals))
            if self._read_totals().build != _build():
                raise RefusedError(
                    f"{pins} comes from another version of kabpf",
                    hint="expected this one: kabpfctl apply",
                )
            self.check()
            self._stack = stack.pop_all()

    def __enter__(self) -> Dataplane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the maps; the pins keep them."""
        self._stack.close()

    def actual(self) -> Actual:
        """What is in the kernel now. Every mkdir that began before has ended, and is in it.

        Raises RefusedError where the program is not attached to the root of the tree any more.
        """
        self.check()
        return Actual(
            self.records(),
            {
                (step.state, os.fsdecode(step.name)): _birth(value)
                for key, value in self._births.items()
                for step in [CStep.from_buffer_copy(key)]
            },
            {_number(key): _entry(value) for key, value in self._cgroups.items()},
        )

    def records(self) -> dict[int, Record]:
        """The policies that are in the kernel, by their ids."""
        return {
            _number(key): _record(CPolicy.from_buffer_copy(value))
            for key, value in self._policies.items()
            if value[CPolicy.name.offset]
        }

    def entries(self, ids: Iterable[int]) -> dict[int, Entry]:
        """What the kernel has for these cgroups; those that are gone are left out."""
        found = {id: self._cgroups.look_up(_key(id, 8)) for id in ids}
        return {id: _entry(value) for id, value in found.items() if value}

    def check(self) -> None:
        """Raise RefusedError unless the program is attached to the root of the cgroup2 tree."""
        descriptor = os.open(self._tree.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            attached = libbpf.sock_ops_programs(descriptor)
        finally:
            os.close(descriptor)
        if self.identity() not in attached:
            raise RefusedError(
                f"{self._pins / SOCK_OPS} is not attached to {self._tree.mount}",
                hint="expected it there: kabpfctl apply",
            )

    def apply(self, changes: Changes, namespaces: Iterable[int]) -> None:
        """Write `changes` in their order; open sockets have their options when it returns.

        `namespaces` are descriptors of the network namespaces to look for open sockets in. What one
        cgroup or namespace refuses stops no other; all refusals are raised at the end as one
        RefusedError. A retrofit that was refused in one namespace stays owed.
        """
        refused: list[RefusedError] = []
        for id, record in changes.records.items():
            self._counters.update(_key(id), bytes(CCounters()))
            self._forget_failures(id)
            self._policies.update(_key(id), bytes(_c_policy(record)))
        for step, birth in changes.births.items():
            with _collected(refused):
                self._births.update(_step(step), bytes(CBirth(*birth)))
        for id, entry in changes.cgroups.items():
            with _collected(refused):
                self._cgroups.update(_key(id, 8), bytes(CCgroup(*entry)))
        if changes.retrofits:
            self._retrofit(changes.retrofits, namespaces, refused)
        for id in changes.stale_cgroups:
            self._cgroups.delete(_key(id, 8))
        for step in changes.stale_births:
            self._births.delete(_step(step))
        for id in changes.stale_records:
            self._policies.update(_key(id), bytes(CPolicy()))
        if refused:
            raise RefusedError("; ".join(dict.fromkeys(map(str, refused))))

    def correct(self, entries: dict[int, Entry]) -> None:
        """Write the entries of cgroups that are there still."""
        for id, entry in entries.items():
            self._cgroups.replace(_key(id, 8), bytes(CCgroup(*entry)))

    def counters(self, policy_ids: Iterable[int]) -> dict[int, Counters]:
        """What happened under these policies, by their ids."""
        failed: dict[int, dict[str, int]] = {}
        for key, value in self._failures.items():
            failure = CFailure.from_buffer_copy(key)
            name = errno.errorcode.get(failure.error, str(failure.error))
            failed.setdefault(failure.policy_id, {})[name] = _number(value)
        found = {}
        for id in policy_ids:
            raw = CCounters.from_buffer_copy(self._counters.look_up(_key(id)) or bytes(CCounters()))
            found[id] = Counters(
                raw.established, raw.listening, raw.retrofitted, raw.left, failed.get(id, {})
            )
        return found

    def totals(self) -> Totals:
        """What was lost since the data plane was loaded."""
        raw = self._read_totals()
        return Totals(raw.asked_in_vain, raw.unrecorded)

    def events(self, receive: Callable[[Born], None]) -> libbpf.RingBuffer:
        """The births that user space has to resolve, for one reader on the machine."""

        def decode(event: bytes) -> None:
            raw = CEvent.from_buffer_copy(event)
            receive(Born(raw.cgroup_id, raw.parent_id, os.fsdecode(raw.name)))

        return libbpf.RingBuffer(str(self._pins / "kabpf_events"), decode)

    def identity(self) -> int:
        """The id of the attached program: another one after the data plane was loaded anew."""
        return libbpf.link_program(str(self._pins / SOCK_OPS))

    def _map(self, name: str, key_size: int, value: Any) -> AbstractContextManager[libbpf.Map]:
        return libbpf.Map(str(self._pins / name), key_size, ctypes.sizeof(value))

    def _read_totals(self) -> CTotals:
        return CTotals.from_buffer_copy(self._totals.look_up(_key(0)) or bytes(CTotals()))

    def _forget_failures(self, policy_id: int) -> None:
        for key, _ in list(self._failures.items()):
            if CFailure.from_buffer_copy(key).policy_id == policy_id:
                self._failures.delete(key)

    def _retrofit(
        self, entries: dict[int, Entry], namespaces: Iterable[int], refused: list[RefusedError]
    ) -> None:
        refused_before = len(refused)
        for namespace in namespaces:
            with _collected(refused), libbpf.network_namespace(namespace):
                _exhaust(self._pins / "kabpf_retrofit")
        if len(refused) == refused_before:
            self.correct({id: settled(entry) for id, entry in entries.items()})


def open_or_load(pins: Path, tree: cgroups.CgroupTree) -> Dataplane:
    """Adopt the data plane that is pinned at `pins`, or load and attach it there.

    One that is damaged or comes from another version is replaced; the next reconcile covers what
    was opened meanwhile. Raises UnsupportedError where this machine can't run it, RefusedError
    where a step failed. The caller holds the lock.
    """
    _require_bpffs(pins.parent)
    for leftover in (_staging(pins), _lifted(pins)):
        _unpin(leftover)
    if pins.exists():
        try:
            return Dataplane(pins, tree)
        except RefusedError:
            lift(pins)
    _load(pins, tree)
    return Dataplane(pins, tree)


def open_if_loaded(pins: Path, tree: cgroups.CgroupTree) -> Dataplane | None:
    """The data plane pinned at `pins`, or None where there is none."""
    return Dataplane(pins, tree) if pins.exists() else None


def is_interrupted(pins: Path) -> bool:
    """Whether a process died while it loaded or lifted, and left pins that are still in force."""
    return _staging(pins).exists() or _lifted(pins).exists()


def lift(pins: Path) -> None:
    """Detach and unpin everything; sockets keep their options. The caller holds the lock."""
    if pins.exists():
        os.rename(pins, _lifted(pins))
    for leftover in (_staging(pins), _lifted(pins)):
        _unpin(leftover)


def _build() -> int:
    digest = hashlib.blake2b(OBJECT.read_bytes(), digest_size=8).digest()
    return int.from_bytes(digest, sys.byteorder)


def _staging(pins: Path) -> Path:
    return pins.with_name(f"{pins.name}-new")


def _lifted(pins: Path) -> Path:
    return pins.with_name(f"{pins.name}-old")


def _unpin(directory: Path) -> None:
    if directory.exists():
        for pin in directory.iterdir():
            pin.unlink()
        directory.rmdir()


def _load(pins: Path, tree: cgroups.CgroupTree) -> None:
    _require_btf()
    _require_capabilities()
    staging = _staging(pins)
    staging.mkdir(mode=0o700)
    try:
        _load_into(staging, tree)
    except RefusedError:
        _unpin(staging)
        raise
    os.rename(staging, pins)


def _load_into(staging: Path, tree: cgroups.CgroupTree) -> None:
    with libbpf.Object(str(OBJECT)) as programs:
        programs.set_constant(round(1 / time.clock_getres(CLOCK_MONOTONIC_COARSE)))
        try:
            programs.load()
        except RefusedError as error:
            _require_system_call(error)
            _require_features()
            raise RefusedError(
                "load the BPF programs",
                error.error,
                f"expected the kernel to take them; it says:\n{error.__cause__}",
            ) from None
        for name in MAPS:
            programs.pin_map(name, str(staging / name))
        with libbpf.Map(str(staging / "kabpf_totals"), 4, ctypes.sizeof(CTotals)) as totals:
            totals.update(_key(0), bytes(CTotals(build=_build())))
        for name in TRACERS:
            programs.attach(name, str(staging / name))
        descriptor = os.open(tree.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            programs.attach(SOCK_OPS, str(staging / SOCK_OPS), descriptor)
        finally:
            os.close(descriptor)


def _require_bpffs(directory: Path) -> None:
    mounted = [(mount.type, mount.point) for mount in cgroups.own_mounts()]
    if ("bpf", str(directory)) not in mounted:
        if not directory.is_dir():
            raise UnsupportedError(
                f"{directory} is missing, expected a kernel with BPF and all of sysfs"
                " (in a container: mount -t sysfs sysfs /sys)"
            )
        libbpf.mount_bpffs(str(directory))


def _require_btf() -> None:
    if not BTF.exists():
        raise UnsupportedError(f"{BTF} is missing, expected a kernel with CONFIG_DEBUG_INFO_BTF")


def _require_capabilities() -> None:
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    missing = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise UnsupportedError(
            f"{', '.join(missing)} missing, expected root with these capabilities"
        )


def _require_system_call(error: RefusedError) -> None:
    if error.error == errno.EPERM:
        raise UnsupportedError(
            "the kernel refuses bpf(2) to root, expected a container whose system call filter"
            " allows it (systemd-nspawn --system-call-filter=bpf) and no kernel lockdown"
        )


def _require_features() -> None:
    """Say which feature the kernel lacks, after the programs were refused."""
    struct, function = 4, 12  # BTF_KIND_STRUCT, BTF_KIND_FUNC
    # Since Linux kernel commit 3cee6fb8e69e ("bpf: tcp: Support bpf_(get|set)sockopt in bpf tcp
    # iter") (in v5.15) this function is there.
    features = {"bpf_iter_tcp_get_func_proto": function, "bpf_ringbuf": struct}
    if missing := libbpf.missing_from_btf(features):
        raise UnsupportedError(
            f"kernel {os.uname().release} is too old (it has no {', '.join(missing)}),"
            " expected Linux 5.15 or later"
        )


def _exhaust(iterator: Path) -> None:
    """Run a pinned iterator to its end. It writes nothing, so that a read ends with EAGAIN after
    every million objects (bpf_seq_read() in kernel/bpf/bpf_iter.c)."""
    descriptor = os.open(iterator, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            try:
                if not os.read(descriptor, 4096):
                    return
            except BlockingIOError:
                continue
            except OSError as error:
                raise RefusedError(f"run {iterator}", error.errno or 0) from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _collected(refused: list[RefusedError]) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        refused.append(error)


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, sys.byteorder)


def _key(number: int, size: int = 4) -> bytes:
    return number.to_bytes(size, sys.byteorder)


def _step(step: tuple[int, str]) -> bytes:
    state, name = step
    return bytes(CStep(state, os.fsencode(name)))


def _birth(value: bytes) -> BirthEntry:
    raw = CBirth.from_buffer_copy(value)
    return BirthEntry(raw.state, raw.policy_id, bool(raw.ask))


def _entry(value: bytes) -> Entry:
    raw = CCgroup.from_buffer_copy(value)
    return Entry(raw.state, raw.policy_id, raw.was_id, bool(raw.owed))


def _c_policy(record: Record) -> CPolicy:
    options = record.options
    return CPolicy(
        options.keepalive,
        options.idle_s or 0,
        options.interval_s or 0,
        options.probes or 0,
        options.user_timeout_ms or 0,
        record.name.encode(),
    )


def _record(raw: CPolicy) -> Record:
    return Record(
        raw.name.decode(),
        Options(
            bool(raw.keepalive),
            raw.idle_s or None,
            raw.interval_s or None,
            raw.probes or None,
            raw.user_timeout_ms or None,
        ),
    )
