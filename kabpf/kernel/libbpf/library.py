"""libbpf.so.1 and the system calls that Python lacks, by ctypes.

libbpf answers with NULL and errno, or with a negative errno (its 1.0 conventions); here every
failure is a RefusedError that names the step. The prototypes are those of libbpf 1.1.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from kabpf.errors import RefusedError, UnsupportedError

CGROUP_SOCK_OPS = 3  # enum bpf_attach_type: BPF_CGROUP_SOCK_OPS
CGROUP_SETSOCKOPT = 22  # BPF_CGROUP_SETSOCKOPT
PROG_SOCK_OPS, PROG_SOCKOPT = 13, 25  # enum bpf_prog_type: BPF_PROG_TYPE_*
CGROUP_STORAGE, SK_STORAGE = 19, 24  # enum bpf_map_type: BPF_MAP_TYPE_*
BPF_F_NO_PREALLOC, BPF_F_CLONE = 1, 1 << 9
RENAME_EXCHANGE = 2
BPF_EXIST = 2  # bpf(2): update an entry that is there
BPF_F_QUERY_EFFECTIVE = 1
BPF_F_ALLOW_MULTI = 2
# BPF_CGROUP_MAX_PROGS (linux/bpf-cgroup.h) is 64 for one cgroup; those above it come as well.
PROGRAMS_MAX = 1024
LOG_BYTES = 1 << 20  # of the verifier
CLONE_NEWNET = 0x40000000
SYS_OPENAT2 = 437  # on all architectures but Alpha
# RESOLVE_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS and _BENEATH (openat2(2))
RESOLVE_WITHIN = 0x01 | 0x02 | 0x04 | 0x08
CGROUP2_SUPER_MAGIC = 0x63677270  # statfs(2)
PERF_RECORD_SAMPLE = 9  # enum perf_event_type (linux/perf_event.h)
PRINT_WARN = 0  # enum libbpf_print_level
BATCH = 4096

_Print = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_Sample = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_Record = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

_POINTER, _INT, _TEXT, _U32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32
_U32_POINTER = ctypes.POINTER(_U32)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "bpf_object__open_file": (_POINTER, _TEXT, _POINTER),
    "bpf_object__load": (_INT, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__find_map_by_name": (_POINTER, _POINTER, _TEXT),
    "bpf_object__find_program_by_name": (_POINTER, _POINTER, _TEXT),
    "bpf_map__set_max_entries": (_INT, _POINTER, _U32),
    "bpf_map__initial_value": (_POINTER, _POINTER, ctypes.POINTER(ctypes.c_size_t)),
    "bpf_map__type": (_INT, _POINTER),
    "bpf_map__key_size": (_U32, _POINTER),
    "bpf_map__value_size": (_U32, _POINTER),
    "bpf_map__max_entries": (_U32, _POINTER),
    "bpf_map__map_flags": (_U32, _POINTER),
    "bpf_map__pin": (_INT, _POINTER, _TEXT),
    "bpf_program__attach": (_POINTER, _POINTER),
    "bpf_program__fd": (_INT, _POINTER),
    "bpf_program__pin": (_INT, _POINTER, _TEXT),
    "bpf_link__pin": (_INT, _POINTER, _TEXT),
    "bpf_link__destroy": (_INT, _POINTER),
    "bpf_link_create": (_INT, _INT, _INT, _INT, _POINTER),
    "bpf_link_update": (_INT, _INT, _INT, _POINTER),
    "bpf_obj_get": (_INT, _TEXT),
    "bpf_obj_pin": (_INT, _INT, _TEXT),
    "bpf_obj_get_info_by_fd": (_INT, _INT, _POINTER, _U32_POINTER),
    "bpf_prog_query": (_INT, _INT, _INT, _U32, _U32_POINTER, _U32_POINTER, _U32_POINTER),
    "bpf_prog_get_fd_by_id": (_INT, _U32),
    "bpf_prog_get_next_id": (_INT, _U32, _U32_POINTER),
    "bpf_map_create": (_INT, _INT, _TEXT, _U32, _U32, _U32, _POINTER),
    "bpf_btf_load": (_INT, _TEXT, ctypes.c_size_t, _POINTER),
    "bpf_prog_load": (_INT, _INT, _TEXT, _TEXT, _TEXT, ctypes.c_size_t, _POINTER),
    "bpf_map_lookup_elem": (_INT, _INT, _TEXT, _POINTER),
    "bpf_map_update_elem": (_INT, _INT, _TEXT, _TEXT, ctypes.c_uint64),
    "bpf_map_delete_elem": (_INT, _INT, _TEXT),
    "bpf_map_get_next_key": (_INT, _INT, _TEXT, _POINTER),
    "bpf_map_lookup_batch": (
        _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _U32_POINTER, _POINTER,
    ),
    "perf_buffer__new_raw": (
        _POINTER, _INT, ctypes.c_size_t, _POINTER, _Record, _POINTER, _POINTER,
    ),
    "perf_buffer__free": (None, _POINTER),
    "perf_buffer__consume": (_INT, _POINTER),
    "perf_buffer__buffer_cnt": (ctypes.c_size_t, _POINTER),
    "perf_buffer__buffer_fd": (_INT, _POINTER, ctypes.c_size_t),
    "libbpf_num_possible_cpus": (_INT,),
    "ring_buffer__new": (_POINTER, _INT, _Sample, _POINTER, _POINTER),
    "ring_buffer__free": (None, _POINTER),
    "ring_buffer__consume": (_INT, _POINTER),
    "ring_buffer__epoll_fd": (_INT, _POINTER),
    "btf__load_vmlinux_btf": (_POINTER,),
    "btf__find_by_name_kind": (ctypes.c_int32, _POINTER, _TEXT, _U32),
    "btf__free": (None, _POINTER),
    "libbpf_set_print": (_POINTER, _Print),
    "libbpf_version_string": (_TEXT,),
}  # fmt: skip


class MapDefinition(NamedTuple):
    """What a map is made by."""

    kind: int  # enum bpf_map_type
    key_size: int
    value_size: int
    entries: int = 0
    flags: int = 0


class Object:
    """An opened BPF object file with its maps and programs. A context manager."""

    def __init__(self, path: str) -> None:
        self._handle = _pointer(
            f"open {path}", _library().bpf_object__open_file(path.encode(), None)
        )

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        _library().bpf_object__close(self._handle)

    def set_constants(self, *values: int) -> None:
        """Give the object's read-only variables, a __u32 each, their values; before `load`."""
        size = ctypes.c_size_t()
        memory = _library().bpf_map__initial_value(self._map(".rodata"), ctypes.byref(size))
        raw = b"".join(value.to_bytes(4, sys.byteorder) for value in values)
        ctypes.memmove(memory, raw, len(raw))

    def set_room(self, name: str, entries: int) -> None:
        """Give a map so many entries; before `load`."""
        step = f"make room in {name}"
        _checked(step, _library().bpf_map__set_max_entries(self._map(name), entries))

    def load(self) -> None:
        """Create the maps and have the kernel verify the programs.

        The error carries libbpf's own words, the verifier's log included, as its cause.
        """
        with _log() as lines:
            error = _library().bpf_object__load(self._handle)
        if error:
            raise RefusedError("load the BPF programs", -error) from RuntimeError("".join(lines))

    def definition(self, name: str) -> MapDefinition:
        """What a map of the object is like; before `load` or after it."""
        library, map = _library(), self._map(name)
        return MapDefinition(
            library.bpf_map__type(map),
            library.bpf_map__key_size(map),
            library.bpf_map__value_size(map),
            library.bpf_map__max_entries(map),
            library.bpf_map__map_flags(map),
        )

    def pin_map(self, name: str, path: str) -> None:
        """Pin a map at `path`; after `load`."""
        fault_point(f"pin {name}")
        _checked(f"pin {path}", _library().bpf_map__pin(self._map(name), path.encode()))

    def pin_program(self, name: str, path: str) -> None:
        """Pin a program at `path`; after `load`."""
        fault_point(f"pin {name}")
        _checked(f"pin {path}", _library().bpf_program__pin(self._program(name), path.encode()))

    def attach(self, name: str, path: str) -> None:
        """Attach a program where its section says, and pin its link at `path`."""
        library = _library()
        fault_point(f"attach {name}")
        link = _pointer(f"attach {name}", library.bpf_program__attach(self._program(name)))
        try:
            fault_point(f"pin {name}")
            _checked(f"pin {path}", library.bpf_link__pin(link, path.encode()))
        finally:
            library.bpf_link__destroy(link)  # closes the descriptor; the pin keeps the link

    def descriptor(self, name: str) -> int:
        """A program's descriptor, open as long as the object is."""
        return int(_library().bpf_program__fd(self._program(name)))

    def _map(self, name: str) -> int:
        return _pointer(
            f"find map {name}",
            _library().bpf_object__find_map_by_name(self._handle, name.encode()),
        )

    def _program(self, name: str) -> int:
        return _pointer(
            f"find program {name}",
            _library().bpf_object__find_program_by_name(self._handle, name.encode()),
        )


class Map:
    """A pinned map, whose keys and values are bytes. A context manager."""

    def __init__(self, path: str, key_size: int, value_size: int) -> None:
        self._path, self._key_size, self._value_size = path, key_size, value_size
        self.name = os.path.basename(path)
        self.descriptor = _checked(f"open {path}", _library().bpf_obj_get(path.encode()))
        info = _MapInfo()
        try:
            _object_info(self.descriptor, info, path)
            if (info.key_size, info.value_size) != (key_size, value_size):
                raise RefusedError(f"{path} is another map", hint="expected kabpf's")
        except RefusedError:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> Map:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; the pin keeps the map."""
        os.close(self.descriptor)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry. One that is added or deleted meanwhile may be missing or come still."""
        room = BATCH
        position: ctypes.Array[ctypes.c_char] | None = None
        while True:
            keys = ctypes.create_string_buffer(room * self._key_size)
            values = ctypes.create_string_buffer(room * self._value_size)
            following = ctypes.create_string_buffer(max(self._key_size, 4))
            count = _U32(room)
            error = -_library().bpf_map_lookup_batch(
                self.descriptor, position, following, keys, values, ctypes.byref(count), None
            )
            if error == errno.ENOSPC:  # one bucket of a hash has more entries than there is room
                room *= 2
                continue
            if error not in (0, errno.ENOENT):
                raise RefusedError(f"read {self._path}", error)
            yield from zip(
                _slices(keys.raw, self._key_size, count.value),
                _slices(values.raw, self._value_size, count.value),
                strict=True,
            )
            if error == errno.ENOENT:
                return
            position = following

    def look_up(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        value = ctypes.create_string_buffer(self._value_size)
        error = _library().bpf_map_lookup_elem(self.descriptor, key, value)
        if error == -errno.ENOENT:
            return None
        self._check("read", error)
        return value.raw

    def all_keys(self) -> list[bytes]:
        """Every key, for a map whose entries can't be read in batches: a trie, on older kernels."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(self._key_size)
        while True:
            previous = found[-1] if found else None
            error = _library().bpf_map_get_next_key(self.descriptor, previous, following)
            if error == -errno.ENOENT:
                return found
            self._check("read", error)
            found.append(following.raw)

    def update(self, key: bytes, value: bytes) -> None:
        """Write an entry, whether there is one or not."""
        fault_point(f"write {self.name}")
        self._check("write", _library().bpf_map_update_elem(self.descriptor, key, value, 0))

    def replace(self, key: bytes, value: bytes) -> None:
        """Write an entry that is there; one that is gone stays so."""
        fault_point(f"write {self.name}")
        error = _library().bpf_map_update_elem(self.descriptor, key, value, BPF_EXIST)
        if error != -errno.ENOENT:
            self._check("write", error)

    def delete(self, key: bytes) -> None:
        """Delete an entry; one that is not there is no error."""
        fault_point(f"delete from {self.name}")
        error = _library().bpf_map_delete_elem(self.descriptor, key)
        if error != -errno.ENOENT:
            self._check("delete from", error)

    def _check(self, step: str, error: int) -> None:
        _checked(f"{step} {self._path}", error)


class RingBuffer:
    """The events of a pinned ring buffer. A context manager.

    `consume` calls `receive` with the bytes of each event that waits.
    """

    def __init__(self, path: str, receive: Callable[[bytes], None]) -> None:
        def sample(_context: int, data: int, size: int) -> int:
            receive(ctypes.string_at(data, size))
            return 0

        self._sample = _Sample(sample)
        descriptor = _checked(f"open {path}", _library().bpf_obj_get(path.encode()))
        try:
            self._handle = _pointer(
                f"read {path}",
                _library().ring_buffer__new(descriptor, self._sample, None, None),
            )
        finally:
            os.close(descriptor)

    def __enter__(self) -> RingBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; what waits, waits for the next reader."""
        _library().ring_buffer__free(self._handle)

    def fileno(self) -> int:
        """A descriptor that is readable while events wait."""
        return int(_library().ring_buffer__epoll_fd(self._handle))

    def descriptors(self) -> list[int]:
        """The same, as PerfBuffers has them."""
        return [self.fileno()]

    def consume(self) -> None:
        """Receive every event that waits, without waiting for one."""
        _checked("read events", _library().ring_buffer__consume(self._handle))


class PerfBuffers:
    """Perf events in the pinned map at `path`, one for each processor that works, from the key
    `first` on, with so many pages each; they go when this process does. A context manager.

    `consume` calls `receive` with the bytes of each event that waits.
    """

    def __init__(self, path: str, first: int, pages: int, receive: Callable[[bytes], None]) -> None:
        def record(_context: int, _cpu: int, address: int) -> int:
            header = _RecordHeader.from_address(address)
            if header.type == PERF_RECORD_SAMPLE:
                receive(ctypes.string_at(address + ctypes.sizeof(header), header.raw_size))
            return GO_ON

        self._record = _Record(record)
        attributes, options = _PerfAttributes.of_bpf(), _RawOptions(first)
        # Its end takes the events out of the map (perf_event_fd_array_release() in
        # kernel/bpf/arraymap.c), also when the process is killed.
        self._map = _checked(f"open {path}", _library().bpf_obj_get(path.encode()))
        try:
            self._handle = _pointer(
                f"read {path}",
                _library().perf_buffer__new_raw(
                    self._map,
                    pages,
                    ctypes.byref(attributes),
                    self._record,
                    None,
                    ctypes.byref(options),
                ),
            )
        except RefusedError as error:
            os.close(self._map)
            if error.error in (errno.EACCES, errno.EPERM):
                raise UnsupportedError(
                    "the kernel refuses perf_event_open(2), expected CAP_SYS_ADMIN, and in a"
                    " container a system call filter that allows it"
                ) from None
            raise

    def __enter__(self) -> PerfBuffers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the events out of the map."""
        _library().perf_buffer__free(self._handle)
        os.close(self._map)

    def descriptors(self) -> list[int]:
        """One for each processor, which is readable once after events came. So an epoll of them
        would not do for another one: the first look at it takes the news away (perf_poll() in
        kernel/events/core.c)."""
        library = _library()
        count = library.perf_buffer__buffer_cnt(self._handle)
        return [int(library.perf_buffer__buffer_fd(self._handle, each)) for each in range(count)]

    def consume(self) -> None:
        """Receive every event that waits, without waiting for one."""
        _checked("read events", _library().perf_buffer__consume(self._handle))


GO_ON = -2  # LIBBPF_PERF_EVENT_CONT


class _RecordHeader(ctypes.Structure):
    """struct perf_event_header (linux/perf_event.h), and the size of a sample."""

    _fields_ = (
        ("type", _U32),
        ("misc", ctypes.c_uint16),
        ("size", ctypes.c_uint16),
        ("raw_size", _U32),
    )


class _PerfAttributes(ctypes.Structure):
    """The beginning of struct perf_event_attr (linux/perf_event.h)."""

    _fields_ = (
        ("type", _U32),
        ("size", _U32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", _U32),
        ("bp_type", _U32),
        ("config1", ctypes.c_uint64),
    )

    @classmethod
    def of_bpf(cls) -> _PerfAttributes:
        """Of what bpf_perf_event_output() writes; each event wakes the reader."""
        software, bpf_output, sample_raw = 1, 10, 1 << 10
        size = ctypes.sizeof(cls)  # PERF_ATTR_SIZE_VER0
        return cls(software, size, bpf_output, 1, sample_raw, 0, 0, 1)


class _RawOptions(ctypes.Structure):
    """struct perf_buffer_raw_opts (bpf/libbpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("count", ctypes.c_int),
        ("cpus", _POINTER),
        ("keys", _POINTER),
    )

    def __init__(self, first: int) -> None:
        cpus = [cpu for cpu in range(processors()) if _is_online(cpu)]
        room = ctypes.c_int * len(cpus)
        self._arrays = room(*cpus), room(*(first + cpu for cpu in cpus))
        pointers = (ctypes.addressof(array) for array in self._arrays)
        super().__init__(ctypes.sizeof(type(self)), len(cpus), *pointers)


class _MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info (linux/bpf.h)."""

    _fields_ = (
        ("type", _U32),
        ("id", _U32),
        ("key_size", _U32),
        ("value_size", _U32),
    )


class _LinkInfo(ctypes.Structure):
    """The beginning of struct bpf_link_info (linux/bpf.h)."""

    _fields_ = (
        ("type", _U32),
        ("id", _U32),
        ("prog_id", _U32),
        ("cgroup_id", ctypes.c_uint64),  # of a link to a cgroup; 0 once that is removed
    )


class _MapOptions(ctypes.Structure):
    """The beginning of struct bpf_map_create_opts (bpf/bpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("btf_fd", _U32),
        ("btf_key_type_id", _U32),
        ("btf_value_type_id", _U32),
        ("btf_vmlinux_value_type_id", _U32),
        ("inner_map_fd", _U32),
        ("map_flags", _U32),
    )


class _ProgramOptions(ctypes.Structure):
    """The beginning of struct bpf_prog_load_opts (bpf/bpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("attempts", _INT),
        ("expected_attach_type", _INT),
        ("numbers", _U32 * 7),
        ("fd_array", _POINTER),
        ("func_info", _POINTER),
        ("func_info_sizes", _U32 * 2),
        ("line_info", _POINTER),
        ("line_info_sizes", _U32 * 2),
        ("log_level", _U32),
        ("log_size", _U32),
        ("log_buf", ctypes.c_char_p),
    )


class _ProgramInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info (linux/bpf.h)."""

    _fields_ = (
        ("type", _U32),
        ("id", _U32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", _U32 * 2),
        ("instructions", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", _U32),
        ("nr_map_ids", _U32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


def link_program(path: str) -> int:
    """The program id of a pinned link."""
    info = _LinkInfo()
    with _pinned(path) as descriptor:
        _object_info(descriptor, info, path)
    return int(info.prog_id)


def program_id(path: str) -> int:
    """The id of a pinned program."""
    info = _ProgramInfo()
    with _pinned(path) as descriptor:
        _object_info(descriptor, info, path)
    return int(info.id)


def link_cgroup(path: str) -> int:
    """The id of the cgroup of a pinned link; 0 where the cgroup is removed."""
    info = _LinkInfo()
    with _pinned(path) as descriptor:
        _object_info(descriptor, info, path)
    return int(info.cgroup_id)


@contextmanager
def new_map(name: str, definition: MapDefinition) -> Iterator[int]:
    """The descriptor of a new map."""
    kind, key_size, value_size, entries, flags = definition
    options = _MapOptions(ctypes.sizeof(_MapOptions), map_flags=flags)
    if kind == SK_STORAGE:  # is refused without types of its key and value
        types = _storage_types(value_size)
        options.btf_fd = _checked("load BTF", _library().bpf_btf_load(types, len(types), None))
        options.btf_key_type_id, options.btf_value_type_id = 1, 2
    try:
        descriptor = _checked(
            f"make the map {name}",
            _library().bpf_map_create(
                kind, name.encode(), key_size, value_size, entries, ctypes.byref(options)
            ),
        )
    finally:
        if options.btf_fd:
            os.close(options.btf_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def new_program(name: str, kind: int, attach_type: int, instructions: bytes) -> Iterator[int]:
    """The descriptor of a program that the kernel verified. The error carries the verifier's log as
    its cause."""
    options = _ProgramOptions(ctypes.sizeof(_ProgramOptions), expected_attach_type=attach_type)
    log = ctypes.create_string_buffer(LOG_BYTES)
    options.log_buf, options.log_size = ctypes.cast(log, ctypes.c_char_p), LOG_BYTES
    descriptor = _library().bpf_prog_load(
        kind, name.encode(), b"Dual MIT/GPL", instructions, len(instructions) // 8,
        ctypes.byref(options),
    )  # fmt: skip
    if descriptor < 0:
        cause = RuntimeError(log.value.decode(errors="replace"))
        raise RefusedError(f"load {name}", -descriptor) from cause
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pin(descriptor: int, path: str) -> None:
    """Pin a map or a program at `path`."""
    _pin(descriptor, path)


def _storage_types(value_size: int) -> bytes:
    """BTF (Documentation/bpf/btf.rst in the kernel) of an int, type 1, and an array of ints of so
    many bytes, type 2."""
    int_, array = 1 << 24, 3 << 24  # BTF_KIND_INT, BTF_KIND_ARRAY
    types = struct.pack("=IIII", 1, int_, 4, 32)
    types += struct.pack("=IIIIII", 0, array, 0, 1, 1, value_size // 4)
    strings = b"\0int\0"
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


def link_to_cgroup(program: int, cgroup: int, kind: int, path: str) -> None:
    """Attach a program to a cgroup, both given by descriptors, and pin the link at `path`."""
    step = f"attach {os.path.basename(path)}"
    fault_point(step)
    link = _checked(step, _library().bpf_link_create(program, cgroup, kind, None))
    try:
        _pin(link, path)
    finally:
        os.close(link)


def link_pinned_to_cgroup(program_path: str, cgroup: int, kind: int, path: str) -> None:
    """`link_to_cgroup` for a pinned program."""
    with _pinned(program_path) as program:
        link_to_cgroup(program, cgroup, kind, path)


def take_over_link(old_path: str, new_path: str, program: int) -> None:
    """Pin a link a second time, at `new_path`, and put `program`, a descriptor, in the place of its
    program, between two connections."""
    with _pinned(old_path) as link:
        _pin(link, new_path)
        fault_point("update the link")
        _checked("replace the program", _library().bpf_link_update(link, program, None))


@contextmanager
def _pinned(path: str) -> Iterator[int]:
    descriptor = _checked(f"open {path}", _library().bpf_obj_get(path.encode()))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pin(descriptor: int, path: str) -> None:
    fault_point(f"pin {os.path.basename(path)}")
    _checked(f"pin {path}", _library().bpf_obj_pin(descriptor, path.encode()))


def _object_info(descriptor: int, info: ctypes.Structure, path: str) -> None:
    size = _U32(ctypes.sizeof(info))
    error = _library().bpf_obj_get_info_by_fd(descriptor, ctypes.byref(info), ctypes.byref(size))
    _checked(f"look at {path}", error)


def sock_ops_programs(cgroup: int) -> list[int]:
    """The ids of the sock_ops programs attached to a cgroup's descriptor.

    The kernel takes cgroup_mutex for the answer (cgroup_bpf_query() in kernel/bpf/cgroup.c), so
    every mkdir that had begun in the tree has ended when it returns.
    """
    return programs(cgroup, CGROUP_SOCK_OPS)[0]


def programs(cgroup: int, kind: int, *, effective: bool = False) -> tuple[list[int], bool]:
    """The ids of the programs of one attach type on a cgroup's descriptor, and whether others may
    be attached beside them. With `effective` those of the cgroups above come as well, in the order
    in which they run, and the second says nothing."""
    count, flags = _U32(PROGRAMS_MAX), _U32()
    ids = (_U32 * count.value)()
    query = BPF_F_QUERY_EFFECTIVE if effective else 0
    error = _library().bpf_prog_query(
        cgroup, kind, query, ctypes.byref(flags), ids, ctypes.byref(count)
    )
    _checked("list the programs of a cgroup", error)
    return list(ids[: count.value]), bool(flags.value & BPF_F_ALLOW_MULTI)


def program_name(id: int) -> str:
    """The name of a program, of which the kernel keeps 15 characters."""
    info = _ProgramInfo()
    step = f"look at program {id}"
    program = _checked(step, _library().bpf_prog_get_fd_by_id(id))
    try:
        _object_info(program, info, f"program {id}")
    finally:
        os.close(program)
    return os.fsdecode(info.name)


def probe() -> None:
    """Ask bpf(2) for something that is allowed to CAP_SYS_ADMIN and changes nothing. Raises
    RefusedError where the system call is filtered."""
    error = _library().bpf_prog_get_next_id(0, ctypes.byref(_U32()))
    if error != -errno.ENOENT:  # no program at all
        _checked("call bpf(2)", error)


def processors() -> int:
    """How many processors the kernel may ever have."""
    return _checked("count processors", _library().libbpf_num_possible_cpus())


def _is_online(cpu: int) -> bool:
    """One that can't be taken off has no such file."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/online") as file:
            return file.read().strip() == "1"
    except FileNotFoundError:
        return os.path.isdir(f"/sys/devices/system/cpu/cpu{cpu}")


def version() -> str:
    """libbpf's version, as 1.1."""
    found: bytes = _library().libbpf_version_string()
    return found.decode().removeprefix("v")


def missing_from_btf(kinds: dict[str, int]) -> list[str]:
    """Which of these names (to their BTF_KIND) the running kernel's BTF does not have."""
    library = _library()
    btf = _pointer("read the kernel's BTF", library.btf__load_vmlinux_btf())
    try:
        return [
            name
            for name, kind in kinds.items()
            if library.btf__find_by_name_kind(btf, name.encode(), kind) < 0
        ]
    finally:
        library.btf__free(btf)


@contextmanager
def network_namespace(descriptor: int) -> Iterator[None]:
    """Run the block in a network namespace (setns(2))."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(descriptor)
        try:
            yield
        finally:
            _setns(own)
    finally:
        os.close(own)


def mount_bpffs(path: str) -> None:
    """Mount a BPF file system (mount(2)), as systemd does at boot."""
    if _libc().mount(b"bpf", path.encode(), b"bpf", 0, b"mode=700"):
        raise RefusedError(
            f"mount a BPF file system at {path}", ctypes.get_errno(), "expected one there"
        )


def exchange(one: str, other: str) -> bool:
    """Let two files or directories change their places in one step (renameat2(2)).

    False where the file system can't: bpffs since Linux kernel commit 6429e46304ac ("libfs: Support
    RENAME_EXCHANGE in simple_rename()") (in v5.17).
    """
    fault_point("exchange the pins")
    if _libc().renameat2(-1, one.encode(), -1, other.encode(), RENAME_EXCHANGE):
        if ctypes.get_errno() == errno.EINVAL:
            return False
        raise RefusedError(f"exchange {one} and {other}", ctypes.get_errno())
    return True


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_within(directory: int, path: str) -> int:
    """A descriptor, good for fstat(2), of the directory at a path below another one, to which no
    symbolic link, no mount and no ".." out of it leads (openat2(2))."""
    how = _OpenHow(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, RESOLVE_WITHIN)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    opened = _libc().syscall(SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), size)
    if opened < 0:
        raise RefusedError(f"open {path}", ctypes.get_errno())
    return int(opened)


def is_cgroup2(descriptor: int) -> bool:
    """Whether a descriptor is of a cgroup2 tree (fstatfs(2))."""
    status = ctypes.create_string_buffer(256)  # more than any struct statfs, which f_type begins
    if _libc().fstatfs(descriptor, status):
        raise RefusedError("look at a file system", ctypes.get_errno())
    return ctypes.c_long.from_buffer(status).value & 0xFFFFFFFF == CGROUP2_SUPER_MAGIC


_fault = os.environ.get("KABPF_FAULT")  # read once: 10,000 cgroups are as many steps
_faults: Counter[str] = Counter()


def fault_point(step: str) -> None:
    """Called before each step that changes the kernel's state. The tests have a process die there:
    KABPF_FAULT is the step and how often it was come to, or "trace" to print them all."""
    if not _fault:
        return
    _faults[step] += 1
    point = f"{step}, {_faults[step]}"
    if _fault == "trace":
        print(f"fault point: {point}", file=sys.stderr)
    elif _fault == point:
        os.kill(os.getpid(), signal.SIGKILL)


def _setns(descriptor: int) -> None:
    if _libc().setns(descriptor, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise RefusedError(f"enter {os.readlink(f'/proc/self/fd/{descriptor}')}", error)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise UnsupportedError(
            "libbpf.so.1 is missing, expected the package libbpf1 (Debian) or libbpf (Fedora)"
        ) from None
    for name, (result, *arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.libbpf_set_print(_printer)
    return library


_lines: list[str] = []


def _print(level: int, template: bytes, arguments: int) -> int:
    if level == PRINT_WARN:
        text = ctypes.create_string_buffer(64 * 1024)
        _libc().vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.c_void_p(arguments))
        _lines.append(text.value.decode(errors="replace"))
    return 0


_printer = _Print(_print)  # libbpf keeps the pointer


@contextmanager
def _log() -> Iterator[list[str]]:
    """Collects what libbpf says in the block; outside of one it is dropped."""
    _lines.clear()
    yield _lines


def _slices(raw: bytes, size: int, count: int) -> Iterator[bytes]:
    return (raw[start : start + size] for start in range(0, count * size, size))


def _checked(step: str, result: int) -> int:
    if result < 0:
        raise RefusedError(step, -result)
    return result


def _pointer(step: str, result: int | None) -> int:
    if not result:
        raise RefusedError(step, ctypes.get_errno())
    return result
