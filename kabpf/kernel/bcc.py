"""The data plane for kernels without BTF: the same maps, and an attachment for each cgroup that has
a policy of its own."""

from __future__ import annotations

import functools
import os
import struct
import sys
from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kabpf.digests import blake2b
from kabpf.errors import BpfError, RefusedError, UnsupportedError, all_refusals
from kabpf.faults import fault_point
from kabpf.kernel import abi, bcc_compile, dataplane
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import (
    ATTACHED,
    MAPS,
    SETSOCKOPT_PROGRAM,
    SOCK_OPS_PROGRAM,
    UNRESOLVED,
    Dataplane,
)
from kabpf.kernel.libbpf import library, links, objects, programs
from kabpf.kernel.libbpf.maps import (
    BPF_F_CLONE,
    BPF_F_NO_PREALLOC,
    CGROUP_STORAGE,
    SK_STORAGE,
    Map,
    MapDefinition,
    new_map,
)
from kabpf.plan.state import Changes
from kabpf.policy import btf_required
from kabpf.policy.model import Policy

if TYPE_CHECKING:
    from kabpf.plan.desired import Actual

KNOWN = "kabpf_known"
PINNED = (*MAPS, UNRESOLVED, ATTACHED, KNOWN, SOCK_OPS_PROGRAM, SETSOCKOPT_PROGRAM)

# struct bpf_insn (linux/bpf.h): code, destination and source register, offset, number.
_INSTRUCTION = struct.Struct("=BBhi")
LD_IMM64 = 0x18  # BPF_LD | BPF_IMM | BPF_DW
BPF_PSEUDO_MAP_FD = 1  # as its source register

_ATTACHED = struct.Struct("=QQ")  # struct attached in fallback.bpf.c: the cgroup's id, nested
OWN_MAPS = {
    ATTACHED: MapDefinition(CGROUP_STORAGE, 8, _ATTACHED.size),
    KNOWN: MapDefinition(SK_STORAGE, 4, 40, flags=BPF_F_NO_PREALLOC | BPF_F_CLONE),
}

_MAPS = (*OWN_MAPS, *MAPS, UNRESOLVED)


class _Hook(NamedTuple):
    """Where a program goes, and the pin of its link to a cgroup."""

    program: str  # its name, in C
    pin: str
    program_kind: int
    attach_type: int

    def link(self, pins: Path, cgroup_id: int) -> Path:
        return pins / f"{self.program}-{cgroup_id}"


# In this order: what an application sets is written down before anything relies on it.
_HOOKS = (
    _Hook("kabpf_setsockopt", SETSOCKOPT_PROGRAM, programs.PROG_SOCKOPT, links.CGROUP_SETSOCKOPT),
    _Hook("kabpf_sockops", SOCK_OPS_PROGRAM, programs.PROG_SOCK_OPS, links.CGROUP_SOCK_OPS),
)


def digest() -> int:
    """A digest of the sources that are installed now, and of the maps that come with them."""
    digest = blake2b(dataplane.OBJECT.read_bytes(), digest_size=8)
    for path in sorted(bcc_compile.SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), sys.byteorder)


class BccDataplane(Dataplane):
    """An open data plane whose programs bcc compiled. A context manager, as Dataplane is.

    It reaches new sockets of cgroups that policies name by their paths, and what is below. A cgroup
    that is removed takes its attachment with it; one made at its place has none until the next
    reconcile.
    """

    updates_open_sockets = False
    sees_births = False
    reports_events = False
    lists_sockets = False
    needs_pins_per_cgroup = True
    digest = staticmethod(digest)
    build = staticmethod(functools.cache(digest))

    def __init__(self, pins: Path, tree: CgroupTree, *, any_build: bool = False) -> None:
        super().__init__(pins, tree, any_build=any_build)
        try:
            self._attached = Map(str(pins / ATTACHED), 8, _ATTACHED.size)
        except RefusedError:
            self.close()
            raise
        self._stack.callback(self._attached.close)

    def actual(self) -> Actual:
        """What is in the kernel now."""
        from dataclasses import replace  # here, because it takes 5 ms

        return replace(super().actual(), attachments=self._attachments())

    def require_supported(self, policies: Iterable[Policy]) -> None:
        """Raise PolicyError, by file and line, for what needs BTF."""
        btf_required.require(policies)

    def check(self) -> None:
        """Raise RefusedError unless the programs and maps are there. Attachments that are not, are
        put there by the next reconcile."""
        for name in PINNED:
            if not (self.pins / name).exists():
                raise RefusedError(f"{self.pins / name} is missing", hint="try: kabpfctl apply")

    def apply(self, changes: Changes, update: Callable[[], Set[int]] | None = None) -> None:
        """Write `changes` in their order. What one cgroup refuses stops no other; all refusals are
        raised at the end as one RefusedError."""
        with all_refusals() as collected:
            with collected():
                super().apply(changes)
            cgroups = {each.id: each for each in self.tree.cgroups()}
            for id, nested in changes.attachments.items():
                if id in cgroups:
                    with collected():
                        self._attach(id, cgroups[id].path, nested)
            for id in changes.stale_attachments:
                for hook in reversed(_HOOKS):
                    fault_point("detach")
                    hook.link(self.pins, id).unlink(missing_ok=True)

    def identity(self) -> int:
        """The id of the program: another one after the data plane was loaded anew."""
        return programs.program_id(str(self.pins / SOCK_OPS_PROGRAM))

    def _attach(self, id: int, path: str, nested: bool) -> None:
        directory = Path(self.tree.directory(path))
        try:
            with dataplane.opened_directory(directory) as cgroup:
                if os.fstat(cgroup).st_ino == id:
                    for hook in _HOOKS:
                        if not self._is_linked(hook, id):
                            self._link(hook, id, path, cgroup)
                    self._attached.update(abi.key(id, 8), _ATTACHED.pack(id, nested))
        except FileNotFoundError:
            return
        except RefusedError:
            if directory.exists():
                raise

    def _link(self, hook: _Hook, id: int, path: str, cgroup: int) -> None:
        link = hook.link(self.pins, id)
        link.unlink(missing_ok=True)  # one that somebody detached
        try:
            links.link_pinned_to_cgroup(
                str(self.pins / hook.pin), cgroup, hook.attach_type, str(link)
            )
        except RefusedError as error:
            hint = "another program may keep it out; try: kabpfctl doctor"
            raise BpfError(f"attach {hook.program} to {path}", error.error, hint) from None

    def _is_linked(self, hook: _Hook, id: int) -> bool:
        try:
            return links.link_cgroup(str(hook.link(self.pins, id))) == id
        except RefusedError:
            return False

    def _attachments(self) -> dict[int, bool | None]:
        return {id: self._attachment(id) for id in pinned_links(self.pins).values()}

    def _attachment(self, id: int) -> bool | None:
        if not all(self._is_linked(hook, id) for hook in _HOOKS):
            return None
        written, nested = _ATTACHED.unpack(
            self._attached.look_up(abi.key(id, 8)) or bytes(_ATTACHED.size)
        )
        return bool(nested) if written == id else None


def compiled() -> dict[str, bytes]:
    """The instructions of the programs, by name. Raises what bcc_compile.programs() raises."""
    return bcc_compile.programs(_MAPS, digest())


def require_compiler() -> None:
    """Raise UnsupportedError where the programs are not compiled, and bcc can't do it here."""
    lack = bcc_compile.missing()
    if lack and not bcc_compile.is_kept(_MAPS, digest()):
        raise UnsupportedError(str(lack))


def load(pins: Path) -> None:
    """Compile the programs, load them, and pin them and their maps at `pins`.

    Raises UnsupportedError where bcc does not compile them, RefusedError where a step was refused.
    """
    with ExitStack() as stack:
        definitions = dict(OWN_MAPS)
        with objects.Object(str(dataplane.OBJECT)) as main:  # opened alone, which needs no BTF
            definitions |= {name: main.definition(name) for name in (*MAPS, UNRESOLVED)}
        maps = {name: stack.enter_context(new_map(name, definitions[name])) for name in _MAPS}
        code = compiled()
        for name, descriptor in maps.items():
            library.pin(descriptor, str(pins / name))
        for hook in _HOOKS:
            placed = _with_descriptors(code[hook.program], tuple(maps.values()))
            try:
                program = stack.enter_context(
                    programs.new_program(hook.program, hook.program_kind, hook.attach_type, placed)
                )
            except RefusedError:
                bcc_compile.forget()
                raise
            library.pin(program, str(pins / hook.pin))


def _with_descriptors(instructions: bytes, maps: tuple[int, ...]) -> bytes:
    """The instructions with each map's descriptor in the place of its index."""
    placed = bytearray(instructions)
    for start in range(0, len(placed), _INSTRUCTION.size):
        code, registers, offset, place = _INSTRUCTION.unpack_from(placed, start)
        source = registers >> 4 if sys.byteorder == "little" else registers & 15  # bit fields
        if code == LD_IMM64 and source == BPF_PSEUDO_MAP_FD:
            _INSTRUCTION.pack_into(placed, start, code, registers, offset, maps[place])
    return bytes(placed)


def pinned_links(pins: Path) -> dict[str, int]:
    """The pins of links to cgroups, and the cgroups' ids."""
    cgroup_ids = {}
    for pin in os.listdir(pins):
        program, _, number = pin.rpartition("-")
        if number.isdecimal() and program in (hook.program for hook in _HOOKS):
            cgroup_ids[pin] = int(number)
    return cgroup_ids
