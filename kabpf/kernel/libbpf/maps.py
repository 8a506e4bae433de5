"""Maps: those that are pinned, and new ones."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from kabpf.errors import RefusedError
from kabpf.faults import fault_point
from kabpf.kernel.libbpf.library import U32, checked, libbpf, object_info

ARRAY, CGROUP_STORAGE, SK_STORAGE = 2, 19, 24  # enum bpf_map_type: BPF_MAP_TYPE_*
BPF_F_NO_PREALLOC, BPF_F_CLONE, BPF_F_INNER_MAP = 1, 1 << 9, 1 << 12
BPF_EXIST = 2  # bpf(2): update an entry that is there
BATCH = 4096


class MapDefinition(NamedTuple):
    """What a map is made with: its type, the bytes of a key and of a value, room, flags."""

    kind: int  # enum bpf_map_type
    key_size: int
    value_size: int
    entries: int = 0
    flags: int = 0


class Map:
    """A pinned map, whose keys and values are bytes. A context manager."""

    def __init__(self, path: str, key_size: int, value_size: int) -> None:
        self._path, self._key_size, self._value_size = path, key_size, value_size
        self.name = os.path.basename(path)
        self.descriptor = checked(f"open {path}", libbpf().bpf_obj_get(path.encode()))
        info = _MapInfo()
        try:
            object_info(self.descriptor, info, path)
            if (info.key_size, info.value_size) != (key_size, value_size):
                raise RefusedError(f"{path} is not kabpf's map")
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

    def items(self, mark: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Every entry. One that is added or deleted meanwhile may be missing or come still. With
        `mark` those alone whose value is not 0 at that byte, as an array has every slot."""
        room = BATCH
        position: ctypes.Array[ctypes.c_char] | None = None
        while True:
            keys = ctypes.create_string_buffer(room * self._key_size)
            values = ctypes.create_string_buffer(room * self._value_size)
            following = ctypes.create_string_buffer(max(self._key_size, 4))
            count = U32(room)
            error = -libbpf().bpf_map_lookup_batch(
                self.descriptor, position, following, keys, values, ctypes.byref(count), None
            )
            if error == errno.ENOSPC:  # one bucket of a hash has more entries than there is room
                room *= 2
                continue
            if error not in (0, errno.ENOENT):
                raise RefusedError(f"read {self._path}", error)
            some_keys, some_values = keys.raw, values.raw
            places: Iterable[int] = range(count.value)
            if mark is not None:
                places = itertools.compress(places, some_values[mark :: self._value_size])
            for place in places:
                key, value = place * self._key_size, place * self._value_size
                yield (
                    some_keys[key : key + self._key_size],
                    some_values[value : value + self._value_size],
                )
            if error == errno.ENOENT:
                return
            position = following

    def look_up(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        value = ctypes.create_string_buffer(self._value_size)
        error = libbpf().bpf_map_lookup_elem(self.descriptor, key, value)
        if error == -errno.ENOENT:
            return None
        self._check("read", error)
        return value.raw

    def all_keys(self) -> list[bytes]:
        """Every key, for a map whose entries can't be read in batches: a trie, on older kernels."""
        keys: list[bytes] = []
        following = ctypes.create_string_buffer(self._key_size)
        while True:
            previous = keys[-1] if keys else None
            error = libbpf().bpf_map_get_next_key(self.descriptor, previous, following)
            if error == -errno.ENOENT:
                return keys
            self._check("read", error)
            keys.append(following.raw)

    def update(self, key: bytes, value: bytes) -> None:
        """Write an entry, whether there is one or not."""
        fault_point(f"write {self.name}")
        self._check("write", libbpf().bpf_map_update_elem(self.descriptor, key, value, 0))

    def update_all(
        self,
        entries: Sequence[tuple[bytes, bytes]],
        collected: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Write entries in their order, whether they are there or not: together, which takes a
        tenth of the time; from one on that the kernel refuses each by itself, in `collected`."""
        if not entries:
            return
        fault_point(f"write {self.name}")
        keys, values = (b"".join(each) for each in zip(*entries, strict=True))
        count = U32(len(entries))
        error = libbpf().bpf_map_update_batch(
            self.descriptor, keys, values, ctypes.byref(count), None
        )
        if not error:
            return
        # Where the kernel refused the call as a whole, the count stays as it was.
        written = count.value if count.value < len(entries) else 0
        for key, value in entries[written:]:
            with collected():
                self.update(key, value)

    def delete_all(self, keys: Sequence[bytes]) -> None:
        """Delete entries; one that is not there is no error."""
        while keys:
            fault_point(f"delete from {self.name}")
            count = U32(len(keys))
            error = libbpf().bpf_map_delete_batch(
                self.descriptor, b"".join(keys), ctypes.byref(count), None
            )
            if error != -errno.ENOENT:
                self._check("delete from", error)
                return
            keys = keys[count.value + 1 :]

    def replace(self, key: bytes, value: bytes) -> None:
        """Write an entry that is there; one that is gone stays so."""
        fault_point(f"write {self.name}")
        error = libbpf().bpf_map_update_elem(self.descriptor, key, value, BPF_EXIST)
        if error != -errno.ENOENT:
            self._check("write", error)

    def delete(self, key: bytes) -> None:
        """Delete an entry; one that is not there is no error."""
        fault_point(f"delete from {self.name}")
        error = libbpf().bpf_map_delete_elem(self.descriptor, key)
        if error != -errno.ENOENT:
            self._check("delete from", error)

    def _check(self, step: str, error: int) -> None:
        checked(f"{step} {self._path}", error)


class _MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info (linux/bpf.h)."""

    _fields_ = (
        ("type", U32),
        ("id", U32),
        ("key_size", U32),
        ("value_size", U32),
    )


class _MapOptions(ctypes.Structure):
    """The beginning of struct bpf_map_create_opts (bpf/bpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("btf_fd", U32),
        ("btf_key_type_id", U32),
        ("btf_value_type_id", U32),
        ("btf_vmlinux_value_type_id", U32),
        ("inner_map_fd", U32),
        ("map_flags", U32),
    )


@contextmanager
def new_map(name: str, definition: MapDefinition) -> Iterator[int]:
    """The descriptor of a new map."""
    kind, key_size, value_size, entries, flags = definition
    options = _MapOptions(ctypes.sizeof(_MapOptions), map_flags=flags)
    if kind == SK_STORAGE:  # is refused without types of its key and value
        types = _storage_types(value_size)
        options.btf_fd = checked("load BTF", libbpf().bpf_btf_load(types, len(types), None))
        options.btf_key_type_id, options.btf_value_type_id = 1, 2
    try:
        descriptor = checked(
            f"make the map {name}",
            libbpf().bpf_map_create(
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
def new_array(name: str, values: Sequence[bytes]) -> Iterator[int]:
    """The descriptor of a new array of these values, for a map of such arrays."""
    definition = MapDefinition(ARRAY, 4, len(values[0]), len(values), BPF_F_INNER_MAP)
    with new_map(name, definition) as descriptor:
        for number, value in enumerate(values):
            key = number.to_bytes(4, sys.byteorder)
            error = libbpf().bpf_map_update_elem(descriptor, key, value, 0)
            checked(f"write {name}", error)
        yield descriptor


def _storage_types(value_size: int) -> bytes:
    """BTF (Documentation/bpf/btf.rst in the kernel) of an int, type 1, and an array of ints of so
    many bytes, type 2."""
    int_, array = 1 << 24, 3 << 24  # BTF_KIND_INT, BTF_KIND_ARRAY
    types = struct.pack("=IIII", 1, int_, 4, 32)
    types += struct.pack("=IIIIII", 0, array, 0, 1, 1, value_size // 4)
    strings = b"\0int\0"
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings
