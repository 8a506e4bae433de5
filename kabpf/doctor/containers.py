"""Checks of container engines: which are here, and what of their containers no policy reaches."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kabpf import proc
from kabpf.containers.names import of_user
from kabpf.doctor import elsewhere
from kabpf.doctor.findings import Findings, listed, note, ok, warning
from kabpf.engines.engines import Found
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import path_of_process
from kabpf.output import count
from kabpf.plan.state import Cgroup

HOOKS = (  # that podman and CRI-O look for in this order (oci-hooks(5))
    Path("/etc/containers/oci/hooks.d/kabpf.json"),
    Path("/usr/share/containers/oci/hooks.d/kabpf.json"),
)
WITH_HOOKS = ("podman", "crio")
# Programs through which containers' connections go, by the beginning of their names: the kernel has
# 15 bytes of these.
HELPERS = ("pasta", "passt", "slirp4netns", "rootlessport", "docker-proxy")


OF_USERS_MAX = 1000  # cgroups; users may make more with containers' names


class Helper(NamedTuple):
    """A process that connects in a container's place."""

    process: int
    name: str
    cgroup: str


def check(
    engines: Collection[Found],
    *,
    selects_containers: bool,
    helpers: Iterable[Helper],
    uncovered: Iterable[Cgroup],
    refusals: Iterable[str] = (),
    hooks: Iterable[Path] = HOOKS,
) -> Findings:
    """What is odd: engines that can't be read or have no hook; helpers, and containers of users, in
    cgroups that are `uncovered`; and `refusals` of what containers ask for. Without a policy that
    selects containers no engine has to be read."""
    for engine in engines:
        if engine.lacks and selects_containers:
            yield warning(f"containers of {engine.engine} are not known: {engine.lacks}", _PAGE)
    hooked = [each.engine for each in engines if each.engine in WITH_HOOKS]
    if selects_containers and hooked and not any(os.path.exists(hook) for hook in hooks):
        yield warning(
            f"no hook of kabpf's for {listed(hooked)}: containers are covered some milliseconds"
            " after they are made",
            _PAGE,
        )
    by_cgroup: dict[str, list[Helper]] = {}
    for helper in helpers:
        by_cgroup.setdefault(helper.cgroup, []).append(helper)
    found: list[Helper] = []
    of_users: list[str] = []
    for path in (cgroup.path for cgroup in uncovered):  # one at a time, as they may be long
        found += by_cgroup.get(path, ())
        if selects_containers and of_user(path) and len(of_users) < OF_USERS_MAX:
            of_users.append(path)
    for helper in found:
        yield note(
            f"{helper.name} (process {helper.process}) connects for containers, and no policy"
            f" covers its cgroup {helper.cgroup}",
            f"kabpfctl explain {helper.process}",
        )
    for each in elsewhere.of_users(of_users):
        yield note(each.text, each.advice)
    if refused := list(refusals):
        more = f", and {count(len(refused) - 1, 'other')}" if len(refused) > 1 else ""
        yield note(f"{refused[0]}{more}", _PAGE)
    names = [each.engine for each in engines]
    yield ok(f"engines: {listed(names)}" if names else "no container engine is here")


def helpers(processes: str = "/proc") -> Iterator[Helper]:
    """The helpers that run, as far as this process may see them."""
    for name in filter(str.isdecimal, os.listdir(processes)):
        try:
            command = os.fsdecode(proc.read(f"{processes}/{name}/comm").rstrip(b"\n"))
            if command.startswith(HELPERS):
                yield Helper(int(name), command, path_of_process(name))
        except (OSError, RefusedError):  # gone, or of another tree
            continue


_PAGE = "see docs/containers.md"
