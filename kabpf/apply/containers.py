"""The containers that cgroups are of, as their engines know them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kabpf.containers.facts import Container
from kabpf.containers.names import enclosing, identify, of_user
from kabpf.engines.engines import Engines
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import Cgroup

ID_LENGTH = 64  # digits, which the name of each container's cgroup has


class Knowing(Protocol):
    """Whatever knows containers, as Engines does."""

    def facts(self, path: str, id: str) -> Container | None:
        """A container, by the path of its own cgroup and the id in that; None for an unknown
        one. Raises TimeoutError where the time for a look is used up."""


class Containers:
    """Looks up the containers of cgroups, each cgroup's once."""

    def __init__(self, tree: CgroupTree, engines: Knowing | None = None) -> None:
        self._tree = tree
        self._engines = engines or Engines()
        self._found: dict[int, Container | None] = {}
        # Cgroups that have a container's name, and of which no engine knows anything (yet).
        self.unknown: set[int] = set()
        # Of these, the ones that no engine was asked about, for lack of time.
        self.unread: set[int] = set()

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
        if self._is_of_strangers(path):
            return None
        try:
            container = self._engines.facts(path, identity.id)
        except TimeoutError:
            self.unread.add(cgroup.id)
            container = None
        if container is None:
            self.unknown.add(cgroup.id)
        return container

    def _is_of_strangers(self, path: str) -> bool:
        """Whether no engine of root's has made this cgroup. Who may make cgroups may make them with
        such names without end, and hooks would wait while each is looked up again and again."""
        if owned := of_user(path):  # below a user's manager
            return owned.user != 0
        above = path.rpartition("/")[0]
        # Or it was made by what runs in a container, or in a directory that was given away.
        return enclosing(above) is not None or self._tree.owner(above) not in (0, None)
