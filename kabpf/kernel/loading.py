"""Puts the data plane into the kernel, replaces it by another version's, and takes it out.

It is built and pinned beside what is there, and published by a rename (crash_recovery).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from kabpf.errors import BpfError, KabpfError, RefusedError, UnsupportedError
from kabpf.faults import fault_point
from kabpf.kernel import abi, capabilities, dataplane, syscalls
from kabpf.kernel.abi import LAYOUT, CConstants, CTotals
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.crash_recovery import (
    WRITABLE,
    complete,
    is_active,
    publish,
    rename,
    staging_of,
    unloading_of,
    unpin,
)
from kabpf.kernel.dataplane import (
    CHANNELS,
    MAPS,
    OBJECT,
    PROGRAMS,
    SOCK_OPS,
    TRACERS,
    Dataplane,
)
from kabpf.kernel.libbpf import buffers, library, links, objects
from kabpf.kernel.mountinfo import own_mounts

BTF = Path("/sys/kernel/btf/vmlinux")


class Loader(StrEnum):
    """How programs come into the kernel: libbpf fits those of the build to it by its BTF, or bcc
    compiles others here."""

    LIBBPF = "libbpf"
    BCC = "bcc"


class Fill(Protocol):
    """Writes the maps of a data plane before any connection is measured by them; `takes_over`
    where it takes the place of one that is attached."""

    def __call__(self, fresh: Dataplane, *, takes_over: bool) -> None: ...


def loader(pins: Path) -> Loader:
    """The loader where none is asked for: that of what is pinned; else bcc where the kernel has no
    BTF."""
    if os.path.exists(pins):
        return Loader.BCC if dataplane.is_by_bcc(pins) else Loader.LIBBPF
    return Loader.LIBBPF if BTF.exists() else Loader.BCC


def open_or_load(pins: Path, tree: CgroupTree, loader: Loader, fill: Fill) -> Dataplane:
    """Adopt the data plane that is pinned at `pins`, or load, fill and attach it there.

    One that another version of kabpf or another loader left, or whose maps are damaged, is
    replaced: after `fill` the program in the link is exchanged. Where `fill` is refused, the old
    one stays active. Raises UnsupportedError where this machine can't run it, RefusedError where
    a step failed. The caller holds the lock.
    """
    _require_bpffs(pins.parent)
    complete(pins)
    if dataplane.is_by_bcc(pins) == (loader == Loader.BCC):
        with contextlib.suppress(RefusedError):
            if loaded := open_if_loaded(pins, tree):
                return loaded
    _load(pins, tree, loader, fill)
    return _kind(loader)(pins, tree)


def open_if_loaded(pins: Path, tree: CgroupTree) -> Dataplane | None:
    """The data plane pinned at `pins`, or None where there is none."""
    if not pins.exists():
        return None
    loaded = kind(pins)(pins, tree)
    try:
        loaded.check()
    except RefusedError:
        loaded.close()
        raise
    return loaded


@contextlib.contextmanager
def opened(pins: Path, tree: CgroupTree) -> Iterator[Dataplane | None]:
    """The data plane that `open_if_loaded` opens, or None; it is closed at the block's end."""
    with open_if_loaded(pins, tree) or contextlib.nullcontext() as loaded:
        yield loaded


def kind(pins: Path) -> type[Dataplane]:
    """The class of the data plane that is pinned at `pins`, or would be loaded there."""
    return _kind(loader(pins))


def _kind(loader: Loader) -> type[Dataplane]:
    if loader == Loader.LIBBPF:
        return Dataplane
    from kabpf.kernel.bcc import BccDataplane  # here, because most machines do without

    return BccDataplane


def unload(pins: Path) -> None:
    """Detach and unpin everything that `complete` has left; sockets keep their options. The caller
    holds the lock."""
    if pins.exists():
        fault_point("rename the pins")
        rename(pins, unloading_of(pins))
        unpin(unloading_of(pins))


def _load(pins: Path, tree: CgroupTree, loader: Loader, fill: Fill) -> None:
    """Build beside, attach, and publish by a rename."""
    if loader == Loader.BCC:
        require_compiler()
    else:
        _require_btf()
    _require_capabilities()
    _require_own(_kind(loader))
    staging = staging_of(pins)
    fault_point("make the pins' directory")
    try:
        staging.mkdir(mode=0o700)
    except OSError as error:
        raise RefusedError(f"make {staging}", error.errno or 0, WRITABLE) from None
    try:
        if loader == Loader.BCC:
            _load_by_bcc(pins, tree, fill)
        else:
            with objects.Object(str(OBJECT)) as programs:
                _load_into(staging, programs)
                _attach(pins, tree, programs, fill)
    except KabpfError:
        if not is_active(staging):
            unpin(staging)
        raise
    publish(pins)


def _load_by_bcc(pins: Path, tree: CgroupTree, fill: Fill) -> None:
    """What is there goes on working beside it until it is published."""
    from kabpf.kernel import bcc

    staging = staging_of(pins)
    try:
        bcc.load(staging)
    except RefusedError as error:
        require_system_call(error)
        raise _explained(error) if error.__cause__ else error from None
    _mark(staging, bcc.BccDataplane.build())
    takes_over = pins.exists()
    with bcc.BccDataplane(staging, tree) as fresh:
        if takes_over and _has_our_layout(pins, tree):
            fresh.copy_from(pins)
        fill(fresh, takes_over=takes_over)


def _mark(pins: Path, build: int) -> None:
    with dataplane.open_map(pins, "kabpf_totals") as totals:
        totals.update(bytes(4), bytes(CTotals(layout=LAYOUT, build=build)))


def prepare(programs: objects.Object) -> None:
    """Fit an opened object to this machine, before `load`."""
    processors = buffers.processors()
    programs.set_constants(bytes(CConstants(hz=dataplane.jiffies(), processors=processors)))
    programs.set_room(dataplane.MONITORS, abi.MONITORS * processors)


def _load_into(staging: Path, programs: objects.Object) -> None:
    prepare(programs)
    try:
        programs.load()
    except RefusedError as error:
        require_system_call(error)
        _require_features()
        raise _explained(error) from None
    for name in (*MAPS, *CHANNELS):
        programs.pin_map(name, str(staging / name))
    for name in PROGRAMS:
        programs.pin_program(name.removesuffix("_program"), str(staging / name))
    _mark(staging, Dataplane.build())
    for name in TRACERS:
        programs.attach(name, str(staging / name))


def _attach(pins: Path, tree: CgroupTree, programs: objects.Object, fill: Fill) -> None:
    staging, program = staging_of(pins), programs.descriptor(SOCK_OPS)
    link = str(staging / SOCK_OPS)
    with Dataplane(staging, tree) as fresh:
        exchanges = _is_attached(pins, fresh)
        takes_over = exchanges or dataplane.is_by_bcc(pins)
        if takes_over and _has_our_layout(pins, tree):
            fresh.copy_from(pins)
        fill(fresh, takes_over=takes_over)
    if exchanges:
        links.take_over_link(str(pins / SOCK_OPS), link, program)
        return
    with dataplane.opened_directory(tree.mount) as cgroup:
        links.link_to_cgroup(program, cgroup, links.CGROUP_SOCK_OPS, link)


def _is_attached(pins: Path, fresh: Dataplane) -> bool:
    try:
        return links.link_program(str(pins / SOCK_OPS)) in fresh.attached()
    except RefusedError:
        return False


def _has_our_layout(pins: Path, tree: CgroupTree) -> bool:
    try:
        Dataplane(pins, tree, any_build=True).close()
    except RefusedError:
        return False
    return True


def _require_bpffs(directory: Path) -> None:
    mounted = [(mount.type, mount.point) for mount in own_mounts()]
    if ("bpf", str(directory)) not in mounted:
        if not directory.is_dir():
            raise UnsupportedError(
                f"{directory} is missing: the kernel lacks BPF, or sysfs is not mounted;"
                " try: mount -t sysfs sysfs /sys"
            )
        _require_capabilities()  # without which a mount is of no use
        syscalls.mount_bpffs(str(directory))


def _require_btf() -> None:
    if not BTF.exists():
        raise UnsupportedError(
            f"{BTF} is missing; boot a kernel with CONFIG_DEBUG_INFO_BTF, or use --loader bcc"
        )


def require_compiler() -> None:
    """Raise UnsupportedError where bcc can't compile here."""
    from kabpf.kernel import bcc

    try:
        bcc.require_compiler()
    except UnsupportedError as problem:
        if BTF.exists():
            raise
        raise UnsupportedError(
            f"{BTF} is missing; boot a kernel with CONFIG_DEBUG_INFO_BTF;"
            f" for the bcc loader, which does without, {problem}"
        ) from None


def _require_capabilities() -> None:
    if missing := capabilities.missing(capabilities.DATAPLANE):
        raise UnsupportedError(
            f"{', '.join(missing)} missing; run it as root with these capabilities"
        )


def _require_own(kind: type[Dataplane]) -> None:
    if kind.digest() != kind.build():
        raise RefusedError(f"{OBJECT} was upgraded", hint="try: systemctl restart kabpf")


def _explained(error: RefusedError) -> BpfError:
    return BpfError(
        "load the BPF programs",
        error.error,
        f"the kernel says:\n{error.__cause__}",
    )


def require_system_call(error: RefusedError) -> None:
    """Raise UnsupportedError, which says what it means, where root was refused bpf(2)."""
    if error.error == errno.EPERM:
        raise UnsupportedError(
            "the kernel refuses bpf(2) to root: let the container's system call filter allow it"
            " (systemd-nspawn --system-call-filter=bpf), or boot without kernel lockdown"
        )


def missing_features() -> list[str]:
    """What the kernel's BTF lacks of what the programs need. Raises RefusedError where it can't be
    read."""
    struct, function = 4, 12  # BTF_KIND_STRUCT, BTF_KIND_FUNC
    # Since Linux kernel commit 3cee6fb8e69e ("bpf: tcp: Support bpf_(get|set)sockopt in bpf tcp
    # iter") (in v5.15) this function is there.
    features = {"bpf_iter_tcp_get_func_proto": function, "bpf_ringbuf": struct}
    return library.missing_from_btf(features)


def _require_features() -> None:
    """Say which feature the kernel lacks, after the programs were refused."""
    if missing := missing_features():
        raise UnsupportedError(
            f"kernel {os.uname().release} is too old (it has no {', '.join(missing)}),"
            " expected Linux 5.15 or later"
        )
