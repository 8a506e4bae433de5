"""The layout of the maps' keys and values, as kabpf.h has it, and what they mean in Python."""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from typing import Any, NamedTuple

from kabpf.plan.births import BLOCK_CELLS
from kabpf.plan.names import PIECE, Piece
from kabpf.plan.state import BirthEntry, CgroupEntry, PolicyRecord
from kabpf.policy.model import OPTIONS, Direction, Mode, Options, Range

LAYOUT = 10
POLICIES = 4096
CGROUPS = 65536
BIRTHS = 65536
NAME = 256
FORMER = 4
MONITORS, LOGGER = 8, 0
NEVER = 0xFFFFFFFF

OUTCOME_BITS, SET, KEPT = 10, 1023, 1022
NEW, OPEN, IGNORED, CLAMPED, TIMED_OUT, CALLED, TURNED_OFF = range(7)

MODES = {Mode.FILL: 0, Mode.OVERRIDE: 1, Mode.ENFORCE: 2}
OUT, IN, LOOPBACK, PLAIN, LISTENERS, EXISTING, LOG = 1, 2, 4, 8, 16, 32, 64
DIRECTIONS = {Direction.OUT: OUT, Direction.IN: IN, Direction.BOTH: OUT | IN}


class CConstants(ctypes.Structure):
    _fields_ = (("hz", ctypes.c_uint32), ("processors", ctypes.c_uint32))


class CRange(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint32), ("high", ctypes.c_uint32))


class COptions(ctypes.Structure):
    _fields_ = (
        ("keepalive", ctypes.c_uint32),
        ("jitter_percent", ctypes.c_uint32),
        ("idle_s", CRange),
        ("interval_s", CRange),
        ("probes", CRange),
        ("user_timeout_ms", CRange),
        ("syn_retries", ctypes.c_uint32),
        ("connect_timeout_ms", ctypes.c_uint32),
    )


class CPolicy(ctypes.Structure):
    _fields_ = (
        ("options", COptions),
        ("mode", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("destinations", ctypes.c_uint64),
        ("name", ctypes.c_char * NAME),
    )


class CNetwork(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_uint32),
        ("policy_id", ctypes.c_uint32),
        ("address", ctypes.c_uint8 * 16),
    )


class CPort(ctypes.Structure):
    _fields_ = (("network", ctypes.c_uint32), ("port", ctypes.c_uint32))


class CCgroup(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_uint64),
        ("policy_id", ctypes.c_uint32),
        ("owed", ctypes.c_uint8),
        ("succeeds", ctypes.c_uint8),
        ("forgot", ctypes.c_uint8),
        ("contained", ctypes.c_uint8),
        ("was_id", ctypes.c_uint32 * FORMER),
    )


class CPiece(ctypes.Structure):
    _fields_ = (("above", ctypes.c_uint64), ("text", ctypes.c_char * PIECE))


class CBlock(ctypes.Structure):
    _fields_ = (("cells", ctypes.c_uint16 * BLOCK_CELLS),)


class CGlobsHead(ctypes.Structure):
    _fields_ = (
        ("classes", ctypes.c_uint8 * 256),
        ("shift", ctypes.c_uint16),
        ("first", ctypes.c_uint16),
    )


class CStep(ctypes.Structure):
    _fields_ = (("state", ctypes.c_uint64), ("name", ctypes.c_uint64))


class CBirth(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_uint64),
        ("policy_id", ctypes.c_uint32),
        ("ask", ctypes.c_uint32),
        ("strength", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class CCounters(ctypes.Structure):
    _fields_ = (
        ("established", ctypes.c_uint64),
        ("listening", ctypes.c_uint64),
        ("updated", ctypes.c_uint64),
        ("kept", ctypes.c_uint64),
        ("ignored", ctypes.c_uint64),
        ("clamped", ctypes.c_uint64),
        ("turned_off", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("timed_out", ctypes.c_uint64),
        ("timed_out_by_keepalive", ctypes.c_uint64),
    )


class CFailure(ctypes.Structure):
    _fields_ = (("policy_id", ctypes.c_uint32), ("error", ctypes.c_uint32))


class CTotals(ctypes.Structure):
    _fields_ = (
        ("layout", ctypes.c_uint32),
        ("before_syn", ctypes.c_uint16),
        ("setsockopt", ctypes.c_uint16),
        ("build", ctypes.c_uint64),
        ("events_dropped", ctypes.c_uint64),
        ("unrecorded", ctypes.c_uint64),
    )


class CRemoved(ctypes.Structure):
    _fields_ = (("parent_id", ctypes.c_uint64), ("name", ctypes.c_char * NAME))


class CEvent(ctypes.Structure):
    _fields_ = (
        ("time_ns", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("parent_id", ctypes.c_uint64),
        ("name", ctypes.c_char * NAME),
    )


class CSocket(ctypes.Structure):
    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("namespace", ctypes.c_uint32),
        ("policy_id", ctypes.c_uint32),
        ("local", ctypes.c_uint8 * 16),
        ("remote", ctypes.c_uint8 * 16),
        ("local_port", ctypes.c_uint16),
        ("remote_port", ctypes.c_uint16),
        ("family", ctypes.c_uint16),
        ("state", ctypes.c_uint8),
        ("keepalive", ctypes.c_uint8),
        ("idle_s", ctypes.c_uint32),
        ("interval_s", ctypes.c_uint32),
        ("probes", ctypes.c_uint32),
        ("user_timeout_ms", ctypes.c_uint32),
        ("next_probe_ms", ctypes.c_uint32),
        ("by", ctypes.c_uint8 * 8),
        ("reserved", ctypes.c_uint32),
    )


class CHolder(ctypes.Structure):
    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("namespace", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("descriptor", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class CReport(ctypes.Structure):
    _fields_ = (
        ("time_ns", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("outcomes", ctypes.c_uint64),
        ("policy_id", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("command", ctypes.c_char * 16),
        ("local", ctypes.c_uint8 * 16),
        ("remote", ctypes.c_uint8 * 16),
        ("local_port", ctypes.c_uint16),
        ("remote_port", ctypes.c_uint16),
        ("namespace", ctypes.c_uint32),
        ("family", ctypes.c_uint16),
        ("what", ctypes.c_uint8),
        ("direction", ctypes.c_uint8),
        ("keepalive", ctypes.c_uint32),
        ("idle_s", ctypes.c_uint32),
        ("interval_s", ctypes.c_uint32),
        ("probes", ctypes.c_uint32),
        ("user_timeout_ms", ctypes.c_uint32),
        ("option", ctypes.c_uint32),
        ("asked", ctypes.c_uint32),
        ("reason", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("silent_ms", ctypes.c_uint32),
        ("sent", ctypes.c_uint32),
        ("closed_ms", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class Report(NamedTuple):
    """A kabpf_report, as kabpf.h says."""

    time_ns: int
    cgroup_id: int
    outcomes: int
    policy_id: int
    pid: int
    command: bytes
    local: bytes
    remote: bytes
    local_port: int
    remote_port: int
    namespace: int
    family: int
    what: int
    direction: int
    keepalive: int
    idle_s: int
    interval_s: int
    probes: int
    user_timeout_ms: int
    option: int
    asked: int
    reason: int
    error: int
    silent_ms: int
    sent: int
    closed_ms: int
    reserved: int


class SocketRecord(NamedTuple):
    """A kabpf_socket, as kabpf.h says, without what is not its options or its ends."""

    namespace: int
    local: bytes
    remote: bytes
    local_port: int
    remote_port: int
    keepalive: int
    idle_s: int
    interval_s: int
    by: bytes


_SOCKET = struct.Struct("=8xI4x16s16sHH3xBII12x8s4x")


def read_socket(raw: CSocket) -> SocketRecord:
    """What SocketRecord has, in a fifth of the time."""
    return SocketRecord._make(_SOCKET.unpack_from(raw))


# A busy machine has 20,000 of them a second, and a ctypes structure takes ten times longer.
_REPORT = struct.Struct("=QQQII16s16s16sHHIHBB13I")
REPORT_SIZE = _REPORT.size


def read_report(raw: bytes) -> Report | CEvent:
    """The report or the birth in the bytes that a monitor receives, which the kernel has padded."""
    if len(raw) >= ctypes.sizeof(CEvent):
        return CEvent.from_buffer_copy(raw)
    return Report._make(_REPORT.unpack_from(raw))


def read_outcomes(outcomes: int) -> tuple[int, ...]:
    """Each option's outcome: an errno, SET, KEPT, or 0."""
    mask = (1 << OUTCOME_BITS) - 1
    return tuple(outcomes >> place * OUTCOME_BITS & mask for place in range(6))


def number(raw: bytes) -> int:
    """A number as a map has it."""
    return int.from_bytes(raw, sys.byteorder)


def key(number: int, size: int = 4) -> bytes:
    """A number as a map's key or value of so many bytes."""
    return number.to_bytes(size, sys.byteorder)


HOLDER = struct.Struct("=QQIIII")  # CHolder
HELD, OWED = 1, 2  # its flags: KABPF_HELD and so on
LEVEL = 0x6B61  # KABPF_LEVEL

_STEP = struct.Struct("=QQ")
_BIRTH = struct.Struct("=QIII4x")
_PIECE = struct.Struct(f"=Q{PIECE}s")


def step(step: tuple[int, int]) -> bytes:
    """A key of kabpf_births."""
    return _STEP.pack(*step)


def read_step(raw: bytes) -> tuple[int, int]:
    """The step of a key of kabpf_births."""
    state, name = _STEP.unpack(raw)
    return state, name


def piece(piece: Piece) -> bytes:
    """A key of kabpf_names."""
    return _PIECE.pack(*piece)


def read_piece(raw: bytes) -> Piece:
    """The piece of a key of kabpf_names."""
    above, text = _PIECE.unpack(raw)
    return above, text.rstrip(b"\0")


def birth(birth: BirthEntry) -> bytes:
    """A value of kabpf_births."""
    return _BIRTH.pack(*birth)


def read_birth(raw: bytes) -> BirthEntry:
    """A value of kabpf_births."""
    state, policy_id, ask, strength = _BIRTH.unpack(raw)
    return BirthEntry(state, policy_id, bool(ask), strength)


def entry(entry: CgroupEntry) -> bytes:
    """A value of kabpf_cgroups."""
    flags = entry.owed, entry.succeeds, entry.forgot, entry.contained
    was = (*entry.was, *[0] * (FORMER - len(entry.was)))
    return _CGROUP.pack(entry.state, entry.policy_id, *flags, *was)


_POLICY_ID = struct.Struct("=I")
_CGROUP = struct.Struct(f"=QI????{FORMER}I")
_POLICY_IDS = struct.Struct(f"=8xI4x{FORMER}I")


# Most of any number of cgroups have one of a few values, in which nothing is of one cgroup alone.
@functools.lru_cache(maxsize=1024)
def read_entry(raw: bytes) -> CgroupEntry:
    """The entry in a value of kabpf_cgroups."""
    state, policy_id, owed, succeeds, forgot, contained, *was = _CGROUP.unpack(raw)
    former = tuple(filter(None, was))
    return CgroupEntry(state, policy_id, owed, former, succeeds, forgot, contained)


def read_policy_id(raw: bytes) -> int:
    """The policy's id alone; a third of `read_entry`'s time."""
    return int(_POLICY_ID.unpack_from(raw, CCgroup.policy_id.offset)[0])


def read_policy_ids(raw: bytes) -> tuple[int, ...]:
    """The policy's id, and those of former ones, of which 0 is none."""
    return _POLICY_IDS.unpack(raw)


def options(options: Options) -> COptions:
    """Options as the kernel has them."""
    given = COptions(keepalive=options.keepalive)
    for row in OPTIONS:
        if value := getattr(options, row.field):
            setattr(given, row.field, CRange(*value) if row.is_range else value)
    return given


def policy(record: PolicyRecord) -> bytes:
    """A value of kabpf_policies."""
    flags = DIRECTIONS[record.direction]
    flags |= LOOPBACK if record.loopback else 0
    flags |= EXISTING if record.existing else 0
    flags |= PLAIN if record.is_plain else 0
    flags |= LOG if record.log else 0
    # What a listener has, every socket has that it accepts.
    if flags & IN and record.loopback and not record.digest and not record.options.jitter_percent:
        flags |= LISTENERS if record.options.keepalive or record.mode != Mode.FILL else 0
    mode = MODES[record.mode]
    return bytes(CPolicy(options(record.options), mode, flags, record.digest, record.name.encode()))


def read_policy(raw: bytes) -> PolicyRecord:
    """The record in a value of kabpf_policies, without its destinations."""
    value = CPolicy.from_buffer_copy(raw)
    return PolicyRecord(
        value.name.decode(),
        _read_options(raw[CPolicy.options.offset :][: CPolicy.options.size]),
        _MODES[value.mode],
        _DIRECTIONS[value.flags & (OUT | IN)],
        bool(value.flags & LOOPBACK),
        bool(value.flags & EXISTING),
        bool(value.flags & LOG),
        value.destinations,
    )


_MODES = {number: mode for mode, number in MODES.items()}
_DIRECTIONS = {bits: direction for direction, bits in DIRECTIONS.items()}


@functools.lru_cache(maxsize=POLICIES)  # a reload reads those of each policy several times
def _read_options(raw: bytes) -> Options:
    options = COptions.from_buffer_copy(raw)
    given: dict[str, Any] = {}
    for row in OPTIONS:
        value = getattr(options, row.field)
        if row.is_range:
            value = Range(value.low, value.high) if value.high else None
        if value:  # 0 is none
            given[row.field] = value
    return Options(bool(options.keepalive), **given)
