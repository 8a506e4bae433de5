"""libbpf.so.1 by ctypes: its prototypes, its errors, and calls that have no module of their own.

libbpf answers with NULL and errno, or with a negative errno (its 1.0 conventions); here every
failure is a BpfError that names the step. The prototypes are those of libbpf 1.1.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kabpf.errors import LIMITS, BpfError, KabpfError, LimitError, UnsupportedError
from kabpf.faults import fault_point
from kabpf.kernel.syscalls import libc

PRINT_WARN = 0  # enum libbpf_print_level

_Print = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SampleCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
RecordCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

POINTER, INT, _TEXT, U32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32
_U32_POINTER = ctypes.POINTER(U32)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "bpf_object__open_file": (POINTER, _TEXT, POINTER),
    "bpf_object__load": (INT, POINTER),
    "bpf_object__close": (None, POINTER),
    "bpf_object__find_map_by_name": (POINTER, POINTER, _TEXT),
    "bpf_object__find_program_by_name": (POINTER, POINTER, _TEXT),
    "bpf_map__set_max_entries": (INT, POINTER, U32),
    "bpf_map__initial_value": (POINTER, POINTER, ctypes.POINTER(ctypes.c_size_t)),
    "bpf_map__type": (INT, POINTER),
    "bpf_map__key_size": (U32, POINTER),
    "bpf_map__value_size": (U32, POINTER),
    "bpf_map__max_entries": (U32, POINTER),
    "bpf_map__map_flags": (U32, POINTER),
    "bpf_map__pin": (INT, POINTER, _TEXT),
    "bpf_program__attach": (POINTER, POINTER),
    "bpf_program__fd": (INT, POINTER),
    "bpf_program__pin": (INT, POINTER, _TEXT),
    "bpf_link__pin": (INT, POINTER, _TEXT),
    "bpf_link__destroy": (INT, POINTER),
    "bpf_link_create": (INT, INT, INT, INT, POINTER),
    "bpf_link_update": (INT, INT, INT, POINTER),
    "bpf_link_get_fd_by_id": (INT, U32),
    "bpf_obj_get": (INT, _TEXT),
    "bpf_obj_pin": (INT, INT, _TEXT),
    "bpf_obj_get_info_by_fd": (INT, INT, POINTER, _U32_POINTER),
    "bpf_prog_query": (INT, INT, INT, U32, _U32_POINTER, _U32_POINTER, _U32_POINTER),
    "bpf_prog_get_fd_by_id": (INT, U32),
    "bpf_prog_get_next_id": (INT, U32, _U32_POINTER),
    "bpf_map_create": (INT, INT, _TEXT, U32, U32, U32, POINTER),
    "bpf_btf_load": (INT, _TEXT, ctypes.c_size_t, POINTER),
    "bpf_prog_load": (INT, INT, _TEXT, _TEXT, _TEXT, ctypes.c_size_t, POINTER),
    "bpf_map_lookup_elem": (INT, INT, _TEXT, POINTER),
    "bpf_map_update_elem": (INT, INT, _TEXT, _TEXT, ctypes.c_uint64),
    "bpf_map_delete_elem": (INT, INT, _TEXT),
    "bpf_map_get_next_key": (INT, INT, _TEXT, POINTER),
    "bpf_map_lookup_batch": (
        INT, INT, POINTER, POINTER, POINTER, POINTER, _U32_POINTER, POINTER,
    ),
    "bpf_map_update_batch": (INT, INT, _TEXT, _TEXT, _U32_POINTER, POINTER),
    "bpf_map_delete_batch": (INT, INT, _TEXT, _U32_POINTER, POINTER),
    "perf_buffer__new_raw": (
        POINTER, INT, ctypes.c_size_t, POINTER, RecordCallback, POINTER, POINTER,
    ),
    "perf_buffer__free": (None, POINTER),
    "perf_buffer__consume": (INT, POINTER),
    "perf_buffer__buffer_cnt": (ctypes.c_size_t, POINTER),
    "perf_buffer__buffer_fd": (INT, POINTER, ctypes.c_size_t),
    "libbpf_num_possible_cpus": (INT,),
    "ring_buffer__new": (POINTER, INT, SampleCallback, POINTER, POINTER),
    "ring_buffer__free": (None, POINTER),
    "ring_buffer__consume": (INT, POINTER),
    "ring_buffer__epoll_fd": (INT, POINTER),
    "btf__load_vmlinux_btf": (POINTER,),
    "btf__find_by_name_kind": (ctypes.c_int32, POINTER, _TEXT, U32),
    "btf__free": (None, POINTER),
    "libbpf_set_print": (POINTER, _Print),
    "libbpf_version_string": (_TEXT,),
}  # fmt: skip


@contextmanager
def pinned(path: str) -> Iterator[int]:
    """The descriptor of what is pinned at `path`."""
    descriptor = checked(f"open {path}", libbpf().bpf_obj_get(path.encode()))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pin(descriptor: int, path: str) -> None:
    """Pin a map, a program or a link at `path`."""
    fault_point(f"pin {os.path.basename(path)}")
    checked(f"pin {path}", libbpf().bpf_obj_pin(descriptor, path.encode()))


def object_info(descriptor: int, info: ctypes.Structure, path: str) -> None:
    """Fill in what the kernel says of a map, a program or a link; `path` names it in errors."""
    size = U32(ctypes.sizeof(info))
    error = libbpf().bpf_obj_get_info_by_fd(descriptor, ctypes.byref(info), ctypes.byref(size))
    checked(f"look at {path}", error)


def probe() -> None:
    """Ask bpf(2) for something that is allowed to CAP_SYS_ADMIN and changes nothing. Raises
    RefusedError where the system call is filtered."""
    error = libbpf().bpf_prog_get_next_id(0, ctypes.byref(U32()))
    if error != -errno.ENOENT:  # no program at all
        checked("call bpf(2)", error)


def version() -> str:
    """libbpf's version, as 1.1."""
    raw: bytes = libbpf().libbpf_version_string()
    return raw.decode().removeprefix("v")


def missing_from_btf(kinds: dict[str, int]) -> list[str]:
    """Which of these names (to their BTF_KIND) the running kernel's BTF does not have."""
    library = libbpf()
    btf = pointer("read the kernel's BTF", library.btf__load_vmlinux_btf())
    try:
        return [
            name
            for name, kind in kinds.items()
            if library.btf__find_by_name_kind(btf, name.encode(), kind) < 0
        ]
    finally:
        library.btf__free(btf)


@functools.cache
def libbpf() -> ctypes.CDLL:
    """The library. Raises UnsupportedError where it is not installed."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise UnsupportedError(
            "libbpf.so.1 is missing; install libbpf1 (Debian) or libbpf (Fedora)"
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
        libc().vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.c_void_p(arguments))
        _lines.append(text.value.decode(errors="replace"))
    return 0


_printer = _Print(_print)  # libbpf keeps the pointer


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collects what libbpf says in the block; outside of one it is dropped."""
    _lines.clear()
    yield _lines


def checked(step: str, result: int) -> int:
    """The result of a call. Raises BpfError where it is a negative errno, LimitError where it is
    one of LIMITS."""
    if result < 0:
        raise _error(step, -result)
    return result


def pointer(step: str, result: int | None) -> int:
    """The pointer that a call gave. Raises as `checked`, with errno, where it is NULL."""
    if not result:
        raise _error(step, ctypes.get_errno())
    return result


def _error(step: str, error: int) -> KabpfError:
    return LimitError(step, error) if error in LIMITS else BpfError(step, error)
