"""The checks of kabpfctl doctor, and those of pins, daemon, limits and what is active."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kabpf import output
from kabpf.apply import reconcile
from kabpf.apply.drift import compare
from kabpf.apply.reconcile import Resolution
from kabpf.doctor import elsewhere, machine, machine_checks, other_programs, policy_checks, units
from kabpf.doctor.findings import Finding, Findings, error, listed, note, ok, warning
from kabpf.doctor.machine import Machine
from kabpf.errors import KabpfError, PolicyError, RefusedError, UnsupportedError
from kabpf.kernel import abi, bcc, cgroups, dataplane, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.crash_recovery import is_interrupted
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.kernel.libbpf import links
from kabpf.kernel.loading import Loader
from kabpf.observe import sockets
from kabpf.plan.resolve import left_text
from kabpf.policy import btf_required, files
from kabpf.policy.model import Policy, warnings
from kabpf.runtime import last_good, notes, pidlock
from kabpf.runtime.locks import RUN
from kabpf.systemd import late_mounts, relations
from kabpf.systemd.units import DIRECTORIES, unit_names

PINNED = {
    Loader.BCC: set(bcc.PINNED),
    Loader.LIBBPF: {
        *dataplane.MAPS,
        *dataplane.CHANNELS,
        *dataplane.TRACERS,
        dataplane.SOCK_OPS,
        *dataplane.PROGRAMS,
    },
}
_CORRECT = "correct it, then: kabpfctl apply"
_LIMIT = "set cgroup.max.descendants (cgroups(7)) where so many are made"

FULL = 0.9  # of the cgroups that there is room for


class Here:
    """What several checks look at; what keeps one of them from it is raised."""

    @cached_property
    def machine(self) -> Machine:
        """The facts of this machine."""
        return machine.facts()

    @cached_property
    def tree(self) -> CgroupTree:
        """The cgroup2 tree."""
        return cgroups.find_tree(mountinfo.own_mounts())

    @property
    def policies(self) -> tuple[Policy, ...]:
        """What the policy files say. Raises PolicyError, as does `parsed`."""
        return self._loaded[0]

    @property
    def parsed(self) -> files.Cache:
        """The policy files, each by itself."""
        return self._loaded[1]

    @cached_property
    def resolution(self) -> Resolution:
        """What the policies come to in a kernel that has nothing yet."""
        return reconcile.preview(self.policies, self.tree, None)

    @cached_property
    def sockets(self) -> list[sockets.Socket]:
        """The TCP sockets of the machine; to others than root, those of this network namespace."""
        if not self.machine.is_root:
            return list(sockets.from_inet_diag(self.tree))
        with self.dataplane() as loaded:
            return list(sockets.all_of_machine(self.tree, loaded))

    def dataplane(self) -> AbstractContextManager[Dataplane | None]:
        """The data plane that is pinned, or None, while a block runs."""
        return loading.opened(PINS, self.tree)

    @cached_property
    def _loaded(self) -> tuple[tuple[Policy, ...], files.Cache]:
        cache: files.Cache = {}
        return files.load(files.SYSTEM, cache), cache


class Check(NamedTuple):
    """A check, and whether it needs root."""

    run: Callable[[Here], Findings]
    needs_root: bool = False


def carried_out(check: Check, here: Here) -> Findings:
    """What a check finds. What keeps it from going on is a finding, too, and stops no other."""
    if check.needs_root and not here.machine.is_root:
        yield note("skipped (needs root)")
        return
    try:
        yield from check.run(here)
    except PolicyError:
        yield note("skipped: the policy files are wrong")
    except (UnsupportedError, ImportError) as problem:
        yield note(f"skipped: {str(problem).partition(', expected')[0].partition(';')[0]}")
    except (RefusedError, OSError) as problem:
        yield warning(f"skipped: {problem}")
    except Exception as problem:
        yield error(
            f"a bug in kabpf: {problem!r}", "report it, with the output of: kabpfctl doctor --json"
        )


def _policy_files(here: Here) -> Findings:
    """What kabpfctl check says."""
    try:
        policies, parsed = here.policies, here.parsed
    except PolicyError as problem:
        for text in problem.findings:
            closed = text.endswith(os.strerror(errno.EACCES)) and not here.machine.is_root
            yield note(text, "sudo kabpfctl doctor") if closed else error(text, _CORRECT)
        return
    left = map(left_text, reconcile.left_of(policies))
    for text in (*warnings(policies), *left, *late_mounts.warnings(parsed)):
        yield warning(text, _CORRECT)
    for text in files.unwatched(files.SYSTEM):
        yield note(text)
    if loading.loader(PINS) == Loader.BCC:
        for text in btf_required.findings(policies):
            yield error(text, _CORRECT)
    count = output.count(sum(each.wishes is None for each in policies), "policy", "policies")
    yield ok(f"{count} in {output.count(len(parsed), 'file')}")


def _names(here: Here) -> Findings:
    """Which files count, and which policies."""
    yield from policy_checks.ignored(files.SYSTEM)
    yield from policy_checks.replaced(files.SYSTEM)
    yield from policy_checks.namesakes({path: file for path, (_, file) in here.parsed.items()})


def _selectors(here: Here) -> Findings:
    """What the policies select, of what is there."""
    resolution = here.resolution
    has = {
        cgroup: resolved.policy.name if (resolved := resolution.plan.cgroups[id]).policy else None
        for id, cgroup in resolution.present.items()
    }
    covered = sum(1 for name in has.values() if name)
    files_of_units = {kind: unit_names(where) for kind, where in DIRECTORIES.items()}
    policies = relations.followed(here.policies)
    yield from policy_checks.selectors(policies, has, files_of_units)
    yield ok(f"{covered} of {output.count(len(has), 'cgroup')} covered")


def _reach(here: Here) -> Findings:
    """Whether the sockets of what is selected are in its cgroups."""
    found = elsewhere.of_policies(here.policies, here.tree)
    for each in found:
        yield warning(each.text, each.advice)
    resolution = here.resolution
    managers = {
        path.removesuffix("init.scope"): (path, ports)
        for path, ports in elsewhere.managers(here.sockets).items()
    }
    own: dict[str, str | None] = {}  # the managers' policies
    inside: dict[str, set[str | None]] = {above: set() for above in managers}
    for cgroup in resolution.cgroups.values() if managers else ():
        policy = resolution.plan.cgroups[cgroup.id].policy
        path, name = cgroup.path, policy.name if policy else None
        for above in managers:
            if path == f"{above}init.scope":
                own[above] = name
            elif path.startswith(above):
                inside[above].add(name)
    for above, (path, ports) in managers.items():
        if inside[above] - {own.get(above)}:
            found.append(elsewhere.of_manager(path, ports))
            yield warning(found[-1].text, found[-1].advice)
    if not found:
        yield ok("of units that run, the policies reach the processes")


def _containers(here: Here) -> Findings:
    """Which engines are here, and what of their containers' connections no policy reaches."""
    from kabpf.doctor import containers  # here, because of the engines
    from kabpf.engines.engines import Engines

    yield from containers.check(
        Engines().found(),
        selects_containers=any(policy.is_of_containers for policy in here.policies),
        helpers=containers.helpers(),
        uncovered=(
            cgroup
            for id, cgroup in here.resolution.present.items()
            if here.resolution.plan.cgroups[id].policy is None
        ),
        refusals=here.resolution.refusals.values(),
    )


def _listeners(here: Here) -> Findings:
    """Whether the listeners that units hold have their policies."""
    with here.dataplane() as loaded:
        if not loaded or not loaded.lists_sockets:
            return
    covered = ((cgroup, policy.name) for cgroup, policy in output.covered(here.resolution))
    found = [*elsewhere.foreign_listeners(here.sockets, covered, here.tree)]
    yield from found or [ok("those of units have the policies of these")]


def _fallbacks(here: Here) -> Findings:
    """What the policies leave to the system."""
    idle = here.machine.sysctls["net.ipv4.tcp_keepalive_time"]
    retries_s = machine_checks.retries_s(here.machine)
    yield from policy_checks.fallbacks(
        here.policies, int(idle) if idle.isdecimal() else None, retries_s
    )


def _pins(here: Here) -> Findings:
    """Whether the data plane is active and whole."""
    if is_interrupted(PINS):
        yield warning(f"an interrupted command left pins beside {PINS}", "kabpfctl apply")
    if not PINS.exists():
        if files.paths(files.SYSTEM):
            yield warning("nothing is loaded: no policy is active", "kabpfctl apply")
        else:
            yield note(
                "nothing is loaded, and there is no policy file", "write one: kabpfctl edit UNIT"
            )
        return
    status = os.stat(PINS)
    if status.st_uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        yield error(
            f"{PINS}: uid {status.st_uid}, mode {mode:04o}: root alone must be able to write it",
            f"chown root: {PINS} && chmod go-w {PINS} && kabpfctl apply",
        )
    names, expected = set(os.listdir(PINS)), PINNED[loading.loader(PINS)]
    strange = sorted(names - expected - {dataplane.SETSOCKOPT, *bcc.pinned_links(PINS)})
    # Those of another version are active under the names that it gave them.
    if strange and not _is_another_versions():
        where = [str(PINS / name) for name in strange]
        yield warning(
            f"not kabpf's: {listed(where)}", f"ask whoever pinned it to move it; see: ls -l {PINS}"
        )
    try:
        with here.dataplane():
            to = str(here.tree.mount)
            if loading.loader(PINS) == Loader.BCC:
                to = "the cgroups that policies name, by the bcc loader"
            yield ok(f"attached to {to}, pinned at {PINS}")
    except RefusedError as problem:
        yield _damage(here.tree, sorted(expected - names), problem)


def _damage(tree: CgroupTree, missing: list[str], problem: RefusedError) -> Finding:
    if _is_another_versions():
        grade, stays = (warning, ", and stays active") if _is_attached(tree) else (error, "")
        return grade(f"{PINS} comes from another version of kabpf{stays}", "kabpfctl apply")
    if missing:
        return error(f"{PINS} is damaged: {', '.join(missing)} missing", "kabpfctl apply")
    return error(str(problem), "kabpfctl apply")


def _is_another_versions() -> bool:
    try:
        with dataplane.open_map(PINS, "kabpf_totals") as totals:
            raw = totals.look_up(abi.key(0))
    except RefusedError:
        return False
    return raw is not None and abi.CTotals.from_buffer_copy(raw).build != (
        loading.kind(PINS).build()
    )


def _is_attached(tree: CgroupTree) -> bool:
    if bcc.pinned_links(PINS):
        return True
    try:
        with dataplane.opened_directory(tree.mount) as root:
            return links.link_program(str(PINS / dataplane.SOCK_OPS)) in links.sock_ops_programs(
                root
            )
    except RefusedError:
        return False


def _active(here: Here) -> Findings:
    """Whether the policy files are what is active, where the pins are whole."""
    try:
        loaded = loading.open_if_loaded(PINS, here.tree)
    except RefusedError:
        return
    if loaded is None:
        return
    with loaded:
        comparison = compare(here.tree, loaded)
        if comparison.applied and not loaded.sees_births:
            again = reconcile.preview(here.policies, here.tree, loaded)
            if unattached := again.changes.attachments:
                paths = [again.cgroups[id].path for id in unattached]
                yield warning(f"made since the last apply: {listed(paths)}", "kabpfctl apply")
    if comparison.refused:
        yield error(f"the kernel refused: {comparison.refused}", "kabpfctl apply")
    elif comparison.applied:
        yield ok("the policy files as they are now")
    elif not comparison.errors:
        yield warning("the policy files changed since the last apply", "kabpfctl apply")
    else:
        since = (
            f" since {last_good.time_text(comparison.wrong_since)}"
            if comparison.wrong_since
            else ""
        )
        yield warning(
            f"the last good policies, because the policy files are wrong{since}", _CORRECT
        )


def _last_good(_: Here) -> Findings:
    """What a boot with a wrong policy file makes active."""
    try:
        kept = last_good.read()
        if kept is None:
            if files.paths(files.SYSTEM):
                yield note(
                    "no policies are kept for a boot with a wrong policy file", "kabpfctl apply"
                )
            return
        kept.snapshot()
    except KabpfError as problem:
        yield warning(
            f"no policy is active after a boot with a wrong policy file: {problem}",
            "kabpfctl apply",
        )
        return
    yield ok(f"applied at {last_good.time_text(kept.applied_at)}, for a boot with a wrong file")


def _limits(here: Here) -> Findings:
    """Whether there is room for every cgroup."""
    with contextlib.suppress(RefusedError), here.dataplane() as loaded:
        lost, since = notes.not_recorded(loaded.totals().unrecorded, RUN) if loaded else (0, 0)
        if lost:
            when = f" since {last_good.time_text(since)}" if since else ""
            yield warning(
                f"{output.count(lost, 'new cgroup')} not recorded{when}, because there were too"
                " many",
                f"{_LIMIT}; then: kabpfctl apply",
            )
    count = len(here.tree.cgroups())
    text = f"{output.count(count, 'cgroup')}, room for {abi.CGROUPS}"
    if count < FULL * abi.CGROUPS:
        yield ok(text)
    else:
        yield warning(text, _LIMIT)


def _daemon(here: Here) -> Findings:
    """Whether kabpfd runs, and what waits for it."""
    if pid := pidlock.running():
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
                "not running, and some new cgroups wait for it: containers, or others because there"
                " are too many globs or rules",
                "systemctl start kabpf",
            )
            return
    yield note("not running: policy files that change wait for it", "systemctl start kabpf")


def _unit_of(pid: int) -> str:
    with contextlib.suppress(RefusedError):
        return cgroups.path_of_process(pid).rpartition("/")[2]
    return ""


def _units(_: Here) -> Findings:
    """What systemd knows of kabpf."""
    yield from units.findings()


def _neighbours(here: Here) -> Findings:
    """Programs of others on our hooks."""
    yield from other_programs.findings(here.tree, PINS)


def _of_machine(check: machine_checks.Check) -> Check:
    return Check(lambda here: check(here.machine))


CHECKS = {
    **{name: _of_machine(check) for name, check in machine_checks.CHECKS.items()},
    "neighbours": Check(_neighbours, needs_root=True),
    "pins": Check(_pins, needs_root=True),
    "policy files": Check(_policy_files),
    "file names": Check(_names),
    "selectors": Check(_selectors),
    "reach": Check(_reach),
    "containers": Check(_containers),
    "listeners": Check(_listeners, needs_root=True),
    "fallbacks": Check(_fallbacks),
    "active": Check(_active, needs_root=True),
    "last good": Check(_last_good, needs_root=True),
    "limits": Check(_limits, needs_root=True),
    "daemon": Check(_daemon, needs_root=True),
    "units": Check(_units),
}
