"""Links of programs to cgroups, and which programs a cgroup has."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kabpf.faults import fault_point
from kabpf.kernel.libbpf.library import U32, checked, libbpf, object_info, pin, pinned

CGROUP_SOCK_OPS = 3  # enum bpf_attach_type: BPF_CGROUP_SOCK_OPS
CGROUP_SETSOCKOPT = 22  # BPF_CGROUP_SETSOCKOPT
BPF_F_QUERY_EFFECTIVE = 1
BPF_F_ALLOW_MULTI = 2

# BPF_CGROUP_MAX_PROGS (linux/bpf-cgroup.h) is 64 for one cgroup; those above it come as well.
PROGRAMS_MAX = 1024


class _LinkInfo(ctypes.Structure):
    """The beginning of struct bpf_link_info (linux/bpf.h)."""

    _fields_ = (
        ("type", U32),
        ("id", U32),
        ("prog_id", U32),
        ("cgroup_id", ctypes.c_uint64),  # of a link to a cgroup; 0 once that is removed
    )


def link_program(path: str) -> int:
    """The program id of a pinned link."""
    info = _LinkInfo()
    with pinned(path) as descriptor:
        object_info(descriptor, info, path)
    return int(info.prog_id)


def link_cgroup(path: str) -> int:
    """The id of the cgroup of a pinned link; 0 where the cgroup is removed."""
    info = _LinkInfo()
    with pinned(path) as descriptor:
        object_info(descriptor, info, path)
    return int(info.cgroup_id)


def link_to_cgroup(program: int, cgroup: int, kind: int, path: str) -> None:
    """Attach a program to a cgroup, both given by descriptors, and pin the link at `path`."""
    step = f"attach {os.path.basename(path)}"
    fault_point(step)
    link = checked(step, libbpf().bpf_link_create(program, cgroup, kind, None))
    try:
        pin(link, path)
    finally:
        os.close(link)


def link_pinned_to_cgroup(program_path: str, cgroup: int, kind: int, path: str) -> None:
    """`link_to_cgroup` for a pinned program."""
    with pinned(program_path) as program:
        link_to_cgroup(program, cgroup, kind, path)


def new_link(program_path: str, cgroup: int, kind: int) -> int:
    """Attach a pinned program to a cgroup's descriptor; the link's descriptor, with the last of
    which it ends."""
    step = f"attach {os.path.basename(program_path)}"
    with pinned(program_path) as program:
        return checked(step, libbpf().bpf_link_create(program, cgroup, kind, None))


def link_id(link: int) -> int:
    """The id of a link, given by its descriptor."""
    return int(_info(link).id)


def shared_link(id: int, program_id: int) -> int | None:
    """Another descriptor of the link with this id, that another process may have, or None where it
    has ended, has another program, or is attached no more. Needs CAP_SYS_ADMIN."""
    link = libbpf().bpf_link_get_fd_by_id(id)
    if link == -errno.ENOENT:
        return None
    checked("open the link of another monitor", link)
    info = _info(link)
    if info.prog_id == program_id and info.cgroup_id:
        return int(link)
    os.close(link)
    return None


def _info(link: int) -> _LinkInfo:
    info = _LinkInfo()
    object_info(link, info, "a link")
    return info


@contextmanager
def linked_to_cgroup(program_path: str, cgroup: int, kind: int) -> Iterator[None]:
    """Attach a pinned program to a cgroup's descriptor until the block, or the process, ends."""
    link = new_link(program_path, cgroup, kind)
    try:
        yield
    finally:
        os.close(link)


def take_over_link(old_path: str, new_path: str, program: int) -> None:
    """Pin a link a second time, at `new_path`, and put `program`, a descriptor, in the place of its
    program, between two connections."""
    with pinned(old_path) as link:
        pin(link, new_path)
        fault_point("update the link")
        checked("replace the program", libbpf().bpf_link_update(link, program, None))


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
    count, flags = U32(PROGRAMS_MAX), U32()
    ids = (U32 * count.value)()
    query = BPF_F_QUERY_EFFECTIVE if effective else 0
    error = libbpf().bpf_prog_query(
        cgroup, kind, query, ctypes.byref(flags), ids, ctypes.byref(count)
    )
    checked("list the programs of a cgroup", error)
    return list(ids[: count.value]), bool(flags.value & BPF_F_ALLOW_MULTI)
