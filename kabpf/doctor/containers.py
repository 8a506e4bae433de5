"""Checks of container engines: which are here, and what of their containers no policy reaches."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kabpf import proc
from kabpf.doctor import elsewhere
from kabpf.doctor.findings import Findings, listed, note, ok, warning
from kabpf.engines.engines import Found
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import path_of_process
from kabpf.output import count

HOOKS = (  # that podman and CRI-O look for in this order (oci-hooks(5))
    Path("/etc/containers/oci/hooks.d/kabpf.json"),
    Path("/usr/share/containers/oci/hooks.d/kabpf.json"),
)
WITH_HOOKS = ("podman", "crio")
# Programs through which containers' connections go, by the beginning of their names: the kernel has
# 15 bytes of these.
HELPERS = ("pasta", "passt", "slirp4netns", "rootlessport", "docker-proxy")


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
    present: Iterable[str],
    covered: Collection[str],
    refusals: Iterable[str] = (),
    hooks: Iterable[Path] = HOOKS,
) -> Findings:
    """What is odd: engines that can't be read or have no hook; helpers, and containers of users, in
    cgroups that are `present` and not among those `covered`; and `refusals` of what containers ask
    for. Without a policy that selects containers no engine has to be read."""
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
    for helper in helpers:
        if helper.cgroup not in covered:
            yield note(
                f"{helper.name} (process {helper.process}) connects for containers, and no policy"
                f" covers its cgroup {helper.cgroup}",
                f"kabpfctl explain {helper.process}",
            )
    if selects_containers:
        for found in elsewhere.of_users(path for path in present if path not in covered):
            yield note(found.text, found.advice)
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
