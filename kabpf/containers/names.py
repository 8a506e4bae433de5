"""Which container a cgroup is of, by its path alone.

A path is a claim: whoever may make cgroups gives them such names too. The engine's files say
whether it is true (kabpf.engines).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# An engine's id: 64 hexadecimal digits in podman (containers/storage, stringid.GenerateRandomID()),
# Docker (moby, pkg/stringid), CRI-O (the same storage) and containerd's CRI (util.GenerateID()).
_ID = "([0-9a-f]{64})"

# The last name of the path, and whose it is. Those of systemd's driver end with ".scope", those of
# the cgroupfs driver do not. Not among them are the scopes of conmon (libpod-conmon-ID.scope,
# crio-conmon-ID.scope) and the slices of pods, which are no containers.
_NAMES = (
    # podman: getOCICgroupPath() of libpod/container_internal_linux.go; "payload" with
    # --cgroups=split, as quadlet has it.
    ("podman", re.compile(rf"libpod-{_ID}(?:\.scope)?|libpod-payload-{_ID}")),
    # Docker: moby, daemon/oci_linux.go, WithCgroups(): scopePrefix := "docker".
    ("docker", re.compile(rf"docker-{_ID}\.scope")),
    # containerd: pkg/cri/server/helpers.go, getCgroupsPath(); nerdctl has the same with its name.
    ("containerd", re.compile(rf"(?:cri-containerd|nerdctl)-{_ID}\.scope")),
    # CRI-O: internal/config/cgmgr, CrioPrefix.
    ("crio", re.compile(rf"crio-{_ID}(?:\.scope)?")),
)
_BARE = re.compile(_ID)
# What any of them has, and few other paths; it is looked for from one slash to the next.
_ANY = re.compile(f"/[a-z-]{{0,16}}{_ID}")
# Of users' managers: systemd makes these cgroups, and users what is below.
_OF_USER = re.compile(r"(/user\.slice/user-[0-9]+\.slice/user@([0-9]+)\.service)/.+")


@dataclass(frozen=True)
class Identity:
    """A container that a path claims to be of."""

    engine_hint: str | None  # one of facts.ENGINES; None where the path does not tell
    id: str


@dataclass(frozen=True)
class OfUser:
    """A container of a user that a path claims to be of or in."""

    user: int  # the user's id
    manager: str  # the path of their manager's cgroup
    path: str  # of the container's own cgroup
    identity: Identity


def identify(path: str) -> Identity | None:
    """The container whose own cgroup has this path. None for any other cgroup, also for those that
    are inside a container's: they have what that has."""
    above, _, name = path.rpartition("/")
    if len(name) < 64:
        return None
    for engine, pattern in _NAMES:
        if found := pattern.fullmatch(name):
            return Identity(engine, found[found.lastindex or 0])
    if _BARE.fullmatch(name):
        # The cgroupfs driver of Docker, nerdctl, and of containerd and Docker below kubelet.
        return Identity("docker" if above.endswith("/docker") else None, name)
    return None


def enclosing(path: str) -> tuple[str, Identity] | None:
    """The innermost container that a cgroup is or is inside of, with the container's own path.
    (crun puts processes into a cgroup `container` of the scope.)"""
    if not _ANY.search(path):
        return None
    while path:
        if identity := identify(path):
            return path, identity
        path = path.rpartition("/")[0]
    return None


def of_user(path: str) -> OfUser | None:
    """The innermost container of a user that a cgroup is or is inside of. Its engine keeps its
    files in the user's home."""
    match = _OF_USER.fullmatch(path)
    found = enclosing(path) if match else None
    if match is None or found is None:
        return None
    return OfUser(int(match[2]), match[1], *found)
