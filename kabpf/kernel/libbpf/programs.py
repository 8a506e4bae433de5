"""Programs: those that are pinned or loaded, and new ones."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kabpf.errors import BpfError
from kabpf.kernel.libbpf.library import INT, POINTER, U32, checked, libbpf, object_info, pinned

PROG_SOCK_OPS, PROG_SOCKOPT = 13, 25  # enum bpf_prog_type: BPF_PROG_TYPE_*
LOG_BYTES = 1 << 20  # of the verifier


class _ProgramOptions(ctypes.Structure):
    """The beginning of struct bpf_prog_load_opts (bpf/bpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("attempts", INT),
        ("expected_attach_type", INT),
        ("numbers", U32 * 7),
        ("fd_array", POINTER),
        ("func_info", POINTER),
        ("func_info_sizes", U32 * 2),
        ("line_info", POINTER),
        ("line_info_sizes", U32 * 2),
        ("log_level", U32),
        ("log_size", U32),
        ("log_buf", ctypes.c_char_p),
    )


class _ProgramInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info (linux/bpf.h)."""

    _fields_ = (
        ("type", U32),
        ("id", U32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", U32 * 2),
        ("instructions", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", U32),
        ("nr_map_ids", U32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


def program_id(path: str) -> int:
    """The id of a pinned program."""
    info = _ProgramInfo()
    with pinned(path) as descriptor:
        object_info(descriptor, info, path)
    return int(info.id)


@contextmanager
def new_program(name: str, kind: int, attach_type: int, instructions: bytes) -> Iterator[int]:
    """The descriptor of a program that the kernel verified. The error carries the verifier's log as
    its cause."""
    options = _ProgramOptions(ctypes.sizeof(_ProgramOptions), expected_attach_type=attach_type)
    log = ctypes.create_string_buffer(LOG_BYTES)
    options.log_buf, options.log_size = ctypes.cast(log, ctypes.c_char_p), LOG_BYTES
    descriptor = libbpf().bpf_prog_load(
        kind, name.encode(), b"Dual MIT/GPL", instructions, len(instructions) // 8,
        ctypes.byref(options),
    )  # fmt: skip
    if descriptor < 0:
        cause = RuntimeError(log.value.decode(errors="replace"))
        raise BpfError(f"load {name}", -descriptor) from cause
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def program_name(id: int) -> str:
    """The name of a program, of which the kernel keeps 15 characters."""
    info = _ProgramInfo()
    step = f"look at program {id}"
    program = checked(step, libbpf().bpf_prog_get_fd_by_id(id))
    try:
        object_info(program, info, f"program {id}")
    finally:
        os.close(program)
    return os.fsdecode(info.name)
