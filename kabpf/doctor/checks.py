"""kabpfctl doctor: looks at everything that kabpf relies on, and changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kabpf import (
    cgroups,
    dataplane,
    fallback,
    files,
    fitness,
    layout,
    libbpf,
    loading,
    machine,
    neighbours,
    output,
    presence,
    reconcile,
    review,
    units,
    unsupported,
)
from kabpf.cgroups import CgroupTree
from kabpf.comparison import compare
from kabpf.dataplane import PINS, Dataplane
from kabpf.errors import KabpfError, PolicyError, RefusedError, UnsupportedError
from kabpf.findings import Finding, Findings, Grade, error, listed, note, ok, warning
from kabpf.loading import Loader
from kabpf.machine import Machine
from kabpf.policy import Policy, warnings
from kabpf.reconcile import Resolution

PINNED = {
    Loader.BCC: set(fallback.PINNED),
    Loader.LIBBPF: {
        *dataplane.MAPS,
        *dataplane.CHANNELS,
        *dataplane.TRACERS,
        dataplane.SOCK_OPS,
        dataplane.SOCK_OPS_PROGRAM,
        dataplane.SETSOCKOPT_PROGRAM,
    },
}
FULL = 0.9  # of the cgroups that there is room for


def doctor(arguments: argparse.Namespace) -> int:
    """Look at everything; exit status 1 where something is an error."""
    here = Here()
    findings = [
        (name, finding) for name, check in CHECKS.items() for finding in carried_out(check, here)
    ]
    if arguments.json:
        result = [{"check": name, **vars(finding)} for name, finding in findings]
        print(json.dumps(result, indent=2))
    else:
        rows: list[tuple[str, ...]] = []
        for name, finding in findings:
            rows.append((finding.grade, name, output.shown(finding.found)))
            if finding.advice:
                rows.append(("", "", f"  {output.shown(finding.advice)}"))
        output.print_table(("GRADE", "CHECK", "FOUND, AND WHAT TO DO"), rows)
    return 1 if any(finding.grade == Grade.ERROR for _, finding in findings) else 0


class Here:
    """What several checks look at; what keeps one of them from it is raised."""

    @cached_property
    def machine(self) -> Machine:
        return machine.look()

    @cached_property
    def tree(self) -> CgroupTree:
        return cgroups.find_tree(cgroups.own_mounts())

    @cached_property
    def read(self) -> tuple[tuple[Policy, ...], files.Cache]:
        cache: files.Cache = {}
        return files.load(files.SYSTEM, cache), cache

    @cached_property
    def resolution(self) -> Resolution:
        return reconcile.preview(self.read[0], self.tree, None)

    @contextlib.contextmanager
    def dataplane(self) -> Iterator[Dataplane | None]:
        with loading.open_if_loaded(PINS, self.tree) or contextlib.nullcontext() as loaded:
            yield loaded


class Check(NamedTuple):
    """A check, and whether it takes root."""

    run: Callable[[Here], Findings]
    needs_root: bool = False


def carried_out(check: Check, here: Here) -> Findings:
    """What a check finds. What keeps it from going on is a finding, too, and stops no other."""
    if check.needs_root and not here.machine.is_root:
        yield note("not root: not looked at")
        return
    try:
        yield from check.run(here)
    except PolicyError:
        yield note("not looked at: the policy files are wrong")
    except (UnsupportedError, ImportError) as problem:
        yield note(f"not looked at: {str(problem).partition(', expected')[0]}")
    except (RefusedError, OSError) as problem:
        yield warning(f"not looked at: {problem}")
    except Exception as problem:
        yield error(f"a bug in kabpf: {problem!r}", "please report it")


def _policy_files(here: Here) -> Findings:
    """What kabpfctl check says."""
    try:
        policies, cache = here.read
    except PolicyError as problem:
        for text in problem.findings:
            closed = text.endswith(os.strerror(errno.EACCES)) and not here.machine.is_root
            yield note(text, "sudo kabpfctl doctor") if closed else error(text, "kabpfctl check")
        return
    for text in warnings(policies):
        yield warning(text, "kabpfctl check")
    if loading.loader(PINS) == Loader.BCC:
        for text in unsupported.findings(policies):
            yield error(text, "kabpfctl check")
    count = output.count(len(policies), "policy", "policies")
    yield ok(f"{count} in {output.count(len(cache), 'file')}")


def _names(here: Here) -> Findings:
    """Which files count, and which policies."""
    yield from review.ignored(files.SYSTEM)
    yield from review.replaced(files.SYSTEM)
    yield from review.namesakes({path: file for path, (_, file) in here.read[1].items()})


def _selectors(here: Here) -> Findings:
    """What the policies select, of what is there."""
    resolution = here.resolution
    has = {
        cgroup: found.policy.name if (found := resolution.plan.cgroups[id]).policy else None
        for id, cgroup in resolution.cgroups.items()
    }
    covered = sum(1 for name in has.values() if name)
    files_of_units = {kind: units.look(where) for kind, where in units.DIRECTORIES.items()}
    yield from review.selectors(here.read[0], has, files_of_units)
    yield ok(f"{covered} of {output.count(len(has), 'cgroup')} covered")


def _fallbacks(here: Here) -> Findings:
    """What the policies leave to the system."""
    idle = here.machine.sysctls["net.ipv4.tcp_keepalive_time"]
    retries_s = fitness.retries_s(here.machine)
    yield from review.fallbacks(here.read[0], int(idle) if idle.isdecimal() else None, retries_s)


def _pins(here: Here) -> Findings:
    """Whether the data plane is in force and whole."""
    if loading.is_interrupted(PINS):
        yield warning(f"an interrupted command left pins beside {PINS}", "kabpfctl apply")
    if not PINS.exists():
        if files.paths(files.SYSTEM):
            yield warning("nothing is loaded, so that no policy is in force", "kabpfctl apply")
        else:
            yield note("nothing is loaded, and there is no policy file", "kabpfctl attach --help")
        return
    status = os.stat(PINS)
    if status.st_uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        yield error(
            f"{PINS}: uid {status.st_uid}, mode {mode:04o}, expected root's alone",
            f"rm -r {PINS} && kabpfctl apply",
        )
    names, expected = set(os.listdir(PINS)), PINNED[loading.loader(PINS)]
    if strange := sorted(names - expected - {dataplane.SETSOCKOPT, *fallback.links(PINS)}):
        where = [str(PINS / name) for name in strange]
        yield warning(f"not kabpf's: {listed(where)}", f"rm -r {where[0]}")
    try:
        with here.dataplane():
            yield from _setsockopt_link(here.tree)
            to = str(here.tree.mount)
            if loading.loader(PINS) == Loader.BCC:
                to = "the cgroups that policies name, by the bcc loader"
            yield ok(f"attached to {to}, pinned at {PINS}")
    except RefusedError as problem:
        yield _damage(here.tree, sorted(expected - names), problem)


def _setsockopt_link(tree: CgroupTree) -> Findings:
    pin = PINS / dataplane.SETSOCKOPT
    if pin.exists():
        with dataplane.opened_directory(tree.mount) as root:
            attached, _ = libbpf.programs(root, libbpf.CGROUP_SETSOCKOPT)
        if libbpf.link_program(str(pin)) not in attached:
            yield error(
                f"{pin} is not attached to {tree.mount}", "kabpfctl detach --all; kabpfctl apply"
            )


def _damage(tree: CgroupTree, missing: list[str], problem: RefusedError) -> Finding:
    if _is_another_versions():
        grade, stays = (warning, ", and stays in force") if _is_attached(tree) else (error, "")
        return grade(f"{PINS} comes from another version of kabpf{stays}", "kabpfctl apply")
    if missing:
        return error(f"{PINS} is damaged: {', '.join(missing)} missing", "kabpfctl apply")
    return error(str(problem), "kabpfctl apply")


def _is_another_versions() -> bool:
    try:
        with dataplane.open_map(PINS, "kabpf_totals") as totals:
            found = totals.look_up(layout.key(0))
    except RefusedError:
        return False
    return found is not None and layout.CTotals.from_buffer_copy(found).build != (
        loading.kind(PINS).build()
    )


def _is_attached(tree: CgroupTree) -> bool:
    if fallback.links(PINS):
        return True
    try:
        with dataplane.opened_directory(tree.mount) as root:
            return libbpf.link_program(str(PINS / dataplane.SOCK_OPS)) in libbpf.sock_ops_programs(
                root
            )
    except RefusedError:
        return False


def _in_force(here: Here) -> Findings:
    """Whether the policy files are what is in force, where the pins are whole."""
    try:
        loaded = loading.open_if_loaded(PINS, here.tree)
    except RefusedError:
        return
    if loaded is None:
        return
    with loaded:
        found = compare(here.tree, loaded)
        if found.applied and not loaded.reaches_open_sockets:
            again = reconcile.preview(here.read[0], here.tree, loaded)
            if unattached := again.changes.attachments:
                paths = [again.cgroups[id].path for id in unattached]
                yield warning(f"made since the last apply: {listed(paths)}", "kabpfctl apply")
    if found.refused:
        yield error(f"the kernel refused: {found.refused}", "kabpfctl apply")
    elif found.applied:
        yield ok("the policy files as they are now")
    elif not found.errors:
        yield warning("the policy files are not in force as they are now", "kabpfctl apply")


def _limits(here: Here) -> Findings:
    """Whether there is room for every cgroup."""
    with contextlib.suppress(RefusedError), here.dataplane() as loaded:
        if loaded and (lost := loaded.totals().unrecorded):
            yield warning(
                f"{output.count(lost, 'new cgroup')} not recorded, because there were too many",
                f"kabpfctl apply; lower {here.tree.mount}/.../cgroup.max.descendants",
            )
    count = len(here.tree.cgroups())
    text = f"{count} cgroups, room for {layout.CGROUPS}"
    if count < FULL * layout.CGROUPS:
        yield ok(text)
    else:
        yield warning(text, f"lower {here.tree.mount}/.../cgroup.max.descendants")


def _daemon(here: Here) -> Findings:
    """Whether kabpfd runs, and who waits for it."""
    if pid := presence.running():
        unit = _unit_of(pid)
        name = f"process {pid}{f' of {unit}' if unit else ''}"
        if not PINS.exists() and Path(f"/proc/{pid}/root{PINS}").exists():
            yield error(
                f"{name} has a {PINS.parent} of its own, which can't be seen here",
                f"systemctl restart {unit or 'kabpf'}",
            )
        else:
            yield ok(name)
        return
    with contextlib.suppress(KabpfError):
        if here.resolution.plan.asks:
            yield warning(
                "not running, and some new cgroups wait for it: globs within names, or too many"
                " rules",
                "systemctl start kabpf",
            )
            return
    yield note("not running: policy files that change wait for it", "systemctl start kabpf")


def _unit_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^0::.*/(.+)$", Path(f"/proc/{pid}/cgroup").read_text(), re.MULTILINE)
        return found[1] if found else ""
    return ""


def _units(_: Here) -> Findings:
    """What systemd knows of kabpf."""
    yield from units.findings()


def _neighbours(here: Here) -> Findings:
    """Programs of others on our hooks."""
    yield from neighbours.findings(neighbours.look(here.tree, PINS), here.tree)


def _of_machine(check: fitness.Check) -> Check:
    return Check(lambda here: check(here.machine))


CHECKS = {
    **{name: _of_machine(check) for name, check in fitness.CHECKS.items()},
    "neighbours": Check(_neighbours, needs_root=True),
    "pins": Check(_pins, needs_root=True),
    "policy files": Check(_policy_files),
    "file names": Check(_names),
    "selectors": Check(_selectors),
    "fallbacks": Check(_fallbacks),
    "in force": Check(_in_force, needs_root=True),
    "limits": Check(_limits, needs_root=True),
    "daemon": Check(_daemon, needs_root=True),
    "units": Check(_units),
}
