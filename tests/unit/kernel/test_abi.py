"""What the BPF object, its header and the Python side say of the same bytes."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kabpf.kernel import abi, bcc, dataplane
from kabpf.observe import events, sockets
from kabpf.plan import births, names, patterns
from kabpf.plan.state import FORMER_MAX

HEADER = (Path(__file__).parents[3] / "bpf/kabpf.h").read_text()
BPFTOOL = shutil.which("bpftool", path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin")))

MIRRORS = {
    "kabpf_constants": abi.CConstants,
    "kabpf_range": abi.CRange,
    "kabpf_options": abi.COptions,
    "kabpf_policy": abi.CPolicy,
    "kabpf_network": abi.CNetwork,
    "kabpf_port": abi.CPort,
    "kabpf_cgroup": abi.CCgroup,
    "kabpf_piece": abi.CPiece,
    "kabpf_block": abi.CBlock,
    "kabpf_globs_head": abi.CGlobsHead,
    "kabpf_removed": abi.CRemoved,
    "kabpf_step": abi.CStep,
    "kabpf_birth": abi.CBirth,
    "kabpf_counters": abi.CCounters,
    "kabpf_failure": abi.CFailure,
    "kabpf_totals": abi.CTotals,
    "kabpf_event": abi.CEvent,
    "kabpf_socket": abi.CSocket,
    "kabpf_holder": abi.CHolder,
    "kabpf_report": abi.CReport,
}
# BTF has what maps, constants and arguments of programs lead to; an event and a report go through a
# ring buffer, a socket and a holder through the output of an iterator; of a map within a map there
# is the size.
OUTSIDE = (
    *("kabpf_event", "kabpf_socket", "kabpf_holder", "kabpf_report"),
    *("kabpf_block", "kabpf_globs_head"),
)
IN_BTF = [name for name in MIRRORS if name not in OUTSIDE]

HASH, ARRAY, PERF_EVENT_ARRAY, TRIE, RINGBUF = 1, 2, 4, 11, 27  # enum bpf_map_type
NO_PREALLOC = 1  # BPF_F_NO_PREALLOC


def number_of(names: dict[int, str], name: str) -> int:
    return next(number for number, each in names.items() if each == name)


def test_report_is_read_as_it_is_laid_out() -> None:
    """The quick reader of reports has the members of the struct, at the same places."""
    raw = bytes(range(abi.REPORT_SIZE))
    struct = abi.CReport.from_buffer_copy(raw)
    report = abi.read_report(raw + bytes(4))
    assert isinstance(report, abi.Report)
    assert ctypes.sizeof(abi.CReport) == abi.REPORT_SIZE
    assert report._fields == tuple(name for name, _ in abi.CReport._fields_)
    for name in report._fields:
        value = getattr(struct, name)
        assert getattr(report, name) == (value if isinstance(value, int) else bytes(value))


needs_bpftool = pytest.mark.skipif(BPFTOOL is None, reason="it needs bpftool to read BTF")


@pytest.mark.parametrize("name", MIRRORS)
def test_mirror_has_the_members_of_the_header(name: str) -> None:
    """Each struct of kabpf.h is mirrored member by member, at the same offsets."""
    assert members(MIRRORS[name]) == members(declared(name))


def test_every_struct_of_the_header_has_a_mirror() -> None:
    """kabpf.h has no struct that Python does not know, and the other way round."""
    assert set(re.findall(r"^struct (\w+) \{", HEADER, re.MULTILINE)) == MIRRORS.keys()


@pytest.mark.parametrize("name", MIRRORS)
def test_struct_has_no_hidden_padding(name: str) -> None:
    """The members fill the struct, so that two writers of the same values write the same bytes."""
    sizes = [size for _, size in members(MIRRORS[name]).values()]
    assert sum(sizes) == ctypes.sizeof(MIRRORS[name])


@needs_bpftool
@pytest.mark.parametrize("name", IN_BTF)
def test_mirror_has_the_members_of_the_object(name: str) -> None:
    """Each struct has the size, members and offsets that the compiler gave it."""
    (struct,) = (each for each in btf() if (each["kind"], each["name"]) == ("STRUCT", name))
    found = {
        member["name"]: (member["bits_offset"] // 8, size_of(member["type_id"]))
        for member in struct["members"]
    }
    assert (found, struct["size"]) == (members(MIRRORS[name]), ctypes.sizeof(MIRRORS[name]))


@needs_bpftool
@pytest.mark.parametrize(
    ("name", "kind", "key", "value", "entries", "flags"),
    [
        ("kabpf_policies", ARRAY, 4, abi.CPolicy, abi.POLICIES, 0),
        ("kabpf_counters", ARRAY, 4, abi.CCounters, abi.POLICIES, 0),
        ("kabpf_cgroups", HASH, 8, abi.CCgroup, 65536, NO_PREALLOC),
        ("kabpf_networks", TRIE, abi.CNetwork, 4, 65536, NO_PREALLOC),
        ("kabpf_ports", HASH, abi.CPort, abi.COptions, 65536, NO_PREALLOC),
        ("kabpf_births", HASH, abi.CStep, abi.CBirth, 2 * abi.BIRTHS, NO_PREALLOC),
        ("kabpf_names", HASH, abi.CPiece, 8, abi.BIRTHS, NO_PREALLOC),
        ("kabpf_digests", ARRAY, 4, 8, births.GENERATIONS, 0),
        ("kabpf_failures", HASH, abi.CFailure, 8, 1024, NO_PREALLOC),
        ("kabpf_totals", ARRAY, 4, abi.CTotals, 1, 0),
        ("kabpf_events", RINGBUF, 0, 0, 262144, 0),
        ("kabpf_log", RINGBUF, 0, 0, 262144, 0),
        ("kabpf_monitors", PERF_EVENT_ARRAY, 4, 4, abi.MONITORS, 0),
        ("kabpf_readers", ARRAY, 4, 8, 2 + abi.MONITORS, 0),
    ],
)
def test_map_is_declared_as_python_opens_it(
    name: str, kind: int, key: Any, value: Any, entries: int, flags: int
) -> None:
    """Each map has the type, key size, value size, room and flags that Python relies on."""
    found = maps()[name]
    sizes = [size if isinstance(size, int) else ctypes.sizeof(size) for size in (key, value)]
    assert found == {
        "type": kind,
        "key": sizes[0],
        "value": sizes[1],
        "max_entries": entries,
        "map_flags": flags,
    }


def test_fallback_declares_what_python_makes_room_for() -> None:
    """The structs that only fallback.bpf.c has are as long as their maps' values."""
    source = (Path(__file__).parents[3] / "bpf/fallback.bpf.c").read_text()
    for name, made in (("attached", dataplane.ATTACHED), ("known", bcc.KNOWN)):
        (struct,) = re.findall(rf"^struct {name} \{{$(.*?)^}};", source, re.MULTILINE | re.DOTALL)
        bits = map(int, re.findall(r"^\t__u(\d+) ", struct, re.MULTILINE))
        assert sum(bits) == 8 * bcc.OWN_MAPS[made].value_size


@needs_bpftool
def test_python_pins_every_map_and_attaches_every_program() -> None:
    """What the object has is what the data plane pins, but for what the programs alone need."""
    programs = {each["name"] for each in btf() if each["kind"] == "FUNC"}
    assert maps().keys() == {
        *(*dataplane.MAPS, *dataplane.CHANNELS),
        *("kabpf_told", "kabpf_connecting", "kabpf_copies", "kabpf_log_parts"),
    }
    assert programs == {
        *dataplane.TRACERS,
        *(name.removesuffix("_program") for name in dataplane.PROGRAMS),
        "kabpf_tell_new",
        "kabpf_tell_set",
        "find_options",
        "kabpf_either",
        "kabpf_end_connect_timeout",
        "kabpf_forget_removed",
        "forget_this",
    }


def test_names_are_told_apart_in_the_kernel() -> None:
    """Names start with kabpf_. Those of maps fit into the 15 characters of the kernel; programs are
    called as what they see, and differ in those 15."""
    maps = [*dataplane.MAPS, *dataplane.CHANNELS]
    programs = [*dataplane.TRACERS, *dataplane.PROGRAMS]
    assert [name for name in maps if not re.fullmatch("kabpf_.{1,9}", name)] == []
    assert [name for name in programs if not name.startswith("kabpf_")] == []
    assert len({name[:15] for name in programs}) == len(programs)


@needs_bpftool
def test_constants_are_all_that_is_read_only() -> None:
    """Python writes the read-only data of the object as one struct, and nothing is beside it."""
    (data,) = (each for each in btf() if each["name"] == ".rodata")
    (place,) = data["vars"]
    struct = types()[place["type_id"]]
    while struct["kind"] != "STRUCT":  # a variable, and const, and volatile
        struct = types()[struct["type_id"]]
    assert (struct["name"], place["offset"]) == ("kabpf_constants", 0)
    assert place["size"] == ctypes.sizeof(abi.CConstants)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KABPF_POLICIES", abi.POLICIES),
        ("KABPF_CGROUPS", abi.CGROUPS),
        ("KABPF_BIRTHS", abi.BIRTHS),
        ("KABPF_NAME", abi.NAME),
        ("KABPF_PIECE", names.PIECE),
        ("KABPF_CELLS", births.BLOCK_CELLS),
        ("KABPF_GENERATIONS", births.GENERATIONS),
        ("KABPF_LAYOUT", abi.LAYOUT),
        ("KABPF_FORMER", abi.FORMER),
        ("KABPF_FORMER", FORMER_MAX),
        ("KABPF_OUT", abi.OUT),
        ("KABPF_IN", abi.IN),
        ("KABPF_LOOPBACK", abi.LOOPBACK),
        ("KABPF_PLAIN", abi.PLAIN),
        ("KABPF_LISTENERS", abi.LISTENERS),
        ("KABPF_EXISTING", abi.EXISTING),
        ("KABPF_LOG", abi.LOG),
        ("KABPF_OUTCOME_BITS", abi.OUTCOME_BITS),
        ("KABPF_SET", abi.SET),
        ("KABPF_KEPT", abi.KEPT),
        ("KABPF_NEW", abi.NEW),
        ("KABPF_OPEN", abi.OPEN),
        ("KABPF_IGNORED", abi.IGNORED),
        ("KABPF_CLAMPED", abi.CLAMPED),
        ("KABPF_TIMED_OUT", abi.TIMED_OUT),
        ("KABPF_CALLED", abi.CALLED),
        ("KABPF_MONITORS", abi.MONITORS),
        ("KABPF_LOGGER", abi.LOGGER),
        ("KABPF_KEEPALIVE", number_of(events.REASONS, "keepalive")),
        ("KABPF_USER_TIMEOUT", number_of(events.REASONS, "user timeout")),
        ("KABPF_RETRANSMISSION", number_of(events.REASONS, "retransmissions")),
        ("KABPF_ZERO_WINDOW", number_of(events.REASONS, "zero window")),
        ("KABPF_STATE_UNKNOWN", births.UNKNOWN),
        ("KABPF_STATE_ANYWHERE", births.ANYWHERE),
        ("KABPF_PATHS", patterns.PATHS),
        ("KABPF_NEVER", abi.NEVER),
        ("KABPF_BY_SYSTEM", sockets.SETTERS.index("system")),
        ("KABPF_BY_APPLICATION", sockets.SETTERS.index("application")),
        ("KABPF_BY_POLICY", sockets.SETTERS.index("policy")),
        ("KABPF_BY_FORMER", sockets.SETTERS.index("former policy")),
        ("KABPF_BY_UNKNOWN", sockets.SETTERS.index("unknown")),
    ],
)
def test_constant_is_that_of_the_header(name: str, value: int) -> None:
    """Numbers that both sides know are equal."""
    assert constant(name) == value


def constant(name: str) -> int:
    (value,) = re.findall(rf"^#define {name} (\w+)(?: /\*.*)?$", HEADER, re.MULTILINE)
    return int(value, 0)


def declared(name: str) -> type[ctypes.Structure]:
    """The struct of the header, laid out as C would lay it out."""
    kinds: dict[str, Any] = {
        "__u8": ctypes.c_uint8, "__u16": ctypes.c_uint16, "__u32": ctypes.c_uint32,
        "__u64": ctypes.c_uint64, "char": ctypes.c_char,
    }  # fmt: skip
    (body,) = re.findall(rf"^struct {name} \{{\n(.*?)^\}};$", HEADER, re.MULTILINE | re.DOTALL)
    kinds |= {
        f"struct {inner}": declared(inner) for inner in re.findall(r"^\tstruct (\w+)", body, re.M)
    }
    members = re.findall(
        r"^\t((?:struct )?\w+) (\w+)(?:\[(\w+)\])?;(?: /\*.*)?$", body, re.MULTILINE
    )
    assert len(members) == body.count(";\n") + body.count("; /*")
    counts = [
        constant(count) if count.startswith("K") else int(count or 1) for *_, count in members
    ]
    fields = [
        (member, kinds[kind] * count if count > 1 else kinds[kind])
        for (kind, member, _), count in zip(members, counts, strict=True)
    ]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def members(struct: type[ctypes.Structure]) -> dict[str, tuple[int, int]]:
    """(offset, size) by member, in their order."""
    fields = [(name, getattr(struct, name)) for name, *_ in struct._fields_]
    return {name: (field.offset, field.size) for name, field in fields}


@functools.cache
def btf() -> list[dict[str, Any]]:
    command = [str(BPFTOOL), "--json", "btf", "dump", "file", str(dataplane.OBJECT)]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(output)["types"]
    return found


def types() -> dict[int, dict[str, Any]]:
    return {each["id"]: each for each in btf()}


def maps() -> dict[str, dict[str, int]]:
    """The map definitions: libbpf's macros put a number into the length of an array that a member
    points to, and a type behind a pointer."""
    known = types()
    (section,) = (each for each in btf() if each["name"] == ".maps")
    found = {}
    for place in section["vars"]:
        variable = known[place["type_id"]]
        definition = dict.fromkeys(("key", "value", "map_flags"), 0)
        for member in known[variable["type_id"]]["members"]:
            if member["name"] == "values":  # what a map's own maps are like
                continue
            target = known[known[member["type_id"]]["type_id"]]
            is_type = member["name"] in ("key", "value")
            size = size_of(target["id"]) if is_type else target["nr_elems"]
            definition[member["name"]] = size
        found[variable["name"]] = definition
    return found


def size_of(id: int) -> int:
    found = types()[id]
    if found["kind"] == "ARRAY":
        return int(found["nr_elems"]) * size_of(found["type_id"])
    return int(found["size"]) if "size" in found else size_of(found["type_id"])
