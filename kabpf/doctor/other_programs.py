"""Programs of others on the hooks that kabpf uses, and which of them has the last word.

Of one cgroup, its own programs run first, in the order in which they were attached, then those of
the cgroup above it, and so on up to the root (cgroup_bpf_attach and compute_effective_progs in the
kernel's kernel/bpf/cgroup.c).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kabpf.doctor.findings import Findings, error, listed, note, ok, warning
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.crash_recovery import directories
from kabpf.kernel.dataplane import (
    OBSERVE_PROGRAM,
    RETROFIT_ONE_PROGRAM,
    SETSOCKOPT,
    SETSOCKOPT_PROGRAM,
    SOCK_OPS,
    SOCK_OPS_PROGRAM,
    opened_directory,
)
from kabpf.kernel.libbpf import links, programs
from kabpf.kernel.walk import Unread
from kabpf.tables import shortened

PROGRAMS_MAX = 64  # at one hook of a cgroup (BPF_CGROUP_MAX_PROGS in the kernel's bpf-cgroup.h)
CGROUPS_MAX = 10_000  # looked at; each takes some microseconds


class _Hook(NamedTuple):
    name: str
    kind: int  # enum bpf_attach_type
    pin: str  # of our link
    programs: tuple[str, ...]  # of its program, and of others of ours
    effect: str  # of one that runs after ours


HOOKS = (
    _Hook(
        "sock_ops",
        links.CGROUP_SOCK_OPS,
        SOCK_OPS,
        (SOCK_OPS_PROGRAM,),
        "may replace what kabpf's set",
    ),
    _Hook(
        "setsockopt",
        links.CGROUP_SETSOCKOPT,
        SETSOCKOPT,
        (SETSOCKOPT_PROGRAM, RETROFIT_ONE_PROGRAM, OBSERVE_PROGRAM),
        "may change what kabpf's let pass",
    ),
)


@dataclass(frozen=True)
class Attached:
    """What is attached to one hook."""

    hook: _Hook
    own: list[int]  # to the root of the tree
    takes_more: bool  # there
    order: list[int]  # in which they run there, with those of cgroups above that can't be seen
    below: dict[int, list[str]]  # cgroup paths by program
    ours: set[int]


def programs_on_hooks(tree: CgroupTree, pins: Path, unread: Unread) -> list[Attached]:
    """What is attached to the hooks, at the root of the tree and in the cgroups below, as far as
    these can be looked at."""
    below: list[dict[int, list[str]]] = [{} for _ in HOOKS]
    for cgroup, directory in itertools.islice(tree.opened(unread), CGROUPS_MAX):
        for hook, paths in zip(HOOKS, below, strict=True):
            for id in links.programs(directory, hook.kind)[0]:
                paths.setdefault(id, []).append(cgroup.path)
    with opened_directory(tree.mount) as root:
        return [
            Attached(
                hook,
                *links.programs(root, hook.kind),
                links.programs(root, hook.kind, effective=True)[0],
                paths,
                _ours(hook, pins),
            )
            for hook, paths in zip(HOOKS, below, strict=True)
        ]


def findings(tree: CgroupTree, pins: Path) -> Findings:
    """The programs of others beside kabpf's, and what comes of them."""
    unread = Unread()
    attached = programs_on_hooks(tree, pins, unread)
    if unread:
        path, error = next(iter(unread.items()))
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        yield note(f"skipped: {shortened(path)}{more}: {os.strerror(error)}", "bpftool cgroup tree")
    if len(tree.cgroups()) > CGROUPS_MAX + 1:
        yield note(f"only {CGROUPS_MAX} cgroups are checked", "bpftool cgroup tree")
    others = [each for one in attached for each in (*_refused(one, tree), *_others(one, tree))]
    yield from others or [ok("no program of others")]


def _refused(attached: Attached, tree: CgroupTree) -> Findings:
    """Programs that keep the kernel from attaching ours: BPF_F_ALLOW_MULTI is missing (bpf(2))."""
    hook = attached.hook.name
    if attached.ours & set(attached.own):
        return
    if attached.own and not attached.takes_more:
        names = listed([_name(id) for id in attached.own])
        yield error(
            f"{hook}: {names} at {tree.mount} is attached without BPF_F_ALLOW_MULTI, so that the"
            " kernel refuses kabpf's (EPERM)",
            f"have it attached with that flag; whose it is: bpftool prog show id {attached.own[0]}",
        )
    elif len(attached.own) >= PROGRAMS_MAX:
        yield error(
            f"{hook}: {len(attached.own)} programs are attached to {tree.mount}, so that the kernel"
            " refuses kabpf's (E2BIG)",
            f"have their owners attach fewer; which: bpftool cgroup show {tree.mount}",
        )
    elif above := Counter(attached.order) - Counter(attached.own):
        names = listed([_name(id) for id in above])
        yield warning(
            f"{hook}: {names} of a cgroup above may keep the kernel from attaching kabpf's (EPERM)",
            "run on the host: bpftool cgroup tree",
        )


def _others(attached: Attached, tree: CgroupTree) -> Findings:
    hook = attached.hook.name
    ours = [place for place, id in enumerate(attached.order) if id in attached.ours]
    is_below = bool(attached.ours & attached.below.keys())  # of the bcc loader
    for place, id in enumerate(attached.order if ours or attached.takes_more else ()):
        if id in attached.ours:
            continue
        where = tree.mount if id in attached.own else "a cgroup above"
        show = f"bpftool prog show id {id}"
        if _is_of_kabpf(id):
            yield warning(f"{hook}: {_name(id)} of another kabpf at {where}", show)
        elif place > ours[-1] if ours else is_below:
            effect = attached.hook.effect
            yield warning(f"{hook}: {_name(id)} at {where} runs after kabpf's, and {effect}", show)
        else:
            yield note(f"{hook}: {_name(id)} at {where} runs before kabpf's", show)
    for id, paths in attached.below.items():
        if id in attached.ours:
            continue
        whose = " of another kabpf" if _is_of_kabpf(id) else ""
        yield note(
            f"{hook}: {_name(id)}{whose} at {listed(paths)} runs before kabpf's",
            f"bpftool prog show id {id}",
        )


def _ours(hook: _Hook, pins: Path) -> set[int]:
    ids = set()
    for directory in directories(pins):
        with contextlib.suppress(RefusedError):
            ids.add(links.link_program(str(directory / hook.pin)))
        for program in hook.programs:
            with contextlib.suppress(RefusedError):
                ids.add(programs.program_id(str(directory / program)))
    return ids


def _name(id: int) -> str:
    try:
        return f"{programs.program_name(id) or 'a program'} (id {id})"
    except RefusedError:  # CAP_SYS_ADMIN is missing, or it is gone
        return f"a program (id {id})"


def _is_of_kabpf(id: int) -> bool:
    try:
        return programs.program_name(id) in (SOCK_OPS, SETSOCKOPT[:15])
    except RefusedError:
        return False
