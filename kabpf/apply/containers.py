"""The containers that cgroups are of, as their engines know them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kabpf.containers.facts import Container
from kabpf.containers.names import identify, of_user
from kabpf.engines.engines import Engines
from kabpf.plan.state import Cgroup

ID_LENGTH = 64  # digits, which the name of each container's cgroup has


class Knowing(Protocol):
    """Whatever knows containers, as Engines does."""

    def facts(self, path: str, id: str) -> Container | None:
        """A container, by the path of its own cgroup and the id in that; None for an unknown
        one."""


class Containers:
    """Looks up the containers of cgroups, each cgroup's once."""

    def __init__(self, engines: Knowing | None = None) -> None:
        self._engines = engines or Engines()
        self._found: dict[int, Container | None] = {}
        # Cgroups that have a container's name, and of which no engine knows anything (yet).
        self.unknown: set[int] = set()

    def of(self, cgroups: Iterable[Cgroup]) -> dict[int, Container]:
        """The containers of these cgroups, by the cgroups' ids."""
        found: dict[int, Container] = {}
        for cgroup in cgroups:
            if cgroup.id not in self._found:
                self._found[cgroup.id] = self._look_up(cgroup)
            if container := self._found[cgroup.id]:
                found[cgroup.id] = container
        return found

    def _look_up(self, cgroup: Cgroup) -> Container | None:
        if len(cgroup.name) < ID_LENGTH:  # of most; a path may have thousands of names
            return None
        path = cgroup.path
        identity = identify(path)
        if identity is None:
            return None
        # Below a user's manager is no container that an engine of root's has made. A user may make
        # cgroups with such names without end, and hooks would wait while each is looked up.
        if (owned := of_user(path)) and owned.user:
            return None
        container = self._engines.facts(path, identity.id)
        if container is None:
            self.unknown.add(cgroup.id)
        return container
