"""Of which cgroups the engines are asked, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabpf.apply.containers import Containers
from kabpf.containers.facts import Container
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import Cgroup

ID = "0" * 64


class Tree(CgroupTree):
    """One in which directories below /given were given to a user."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))

    def owner(self, path: str) -> int | None:
        return 4242 if path.startswith("/given") else 0


class Knowing:
    """An engine that knows every container, and notes what it is asked."""

    def __init__(self, *, nothing: bool = False, most: int = 1000) -> None:
        self.asked: list[str] = []
        self._nothing, self._most = nothing, most

    def facts(self, path: str, id: str) -> Container | None:
        if len(self.asked) >= self._most:
            raise TimeoutError
        self.asked.append(path)
        return None if self._nothing else Container(id, "docker", "web", "")


def test_container_is_asked_for_once() -> None:
    """Also where nothing is known of it, until the next look at all cgroups."""
    for engines in (Knowing(), Knowing(nothing=True)):
        containers = Containers(Tree(), engines)
        cgroups = [Cgroup(1, 0, "/"), Cgroup(2, 1, f"/docker-{ID}.scope"), Cgroup(3, 1, f"/x{ID}")]
        known = [set(containers.of(cgroups)) for _ in range(2)]
        assert engines.asked == [f"/docker-{ID}.scope"]
        assert (known, containers.unknown) in (([{2}, {2}], set()), ([set(), set()], {2}))


def test_cgroups_of_users_ask_no_engine() -> None:
    """A user may make cgroups with the names of containers without end; root's manager is none."""
    engines = Knowing()
    containers = Containers(Tree(), engines)
    manager = "/user.slice/user-1000.slice/user@1000.service"
    paths = [f"{manager}/{name}" for name in (f"docker-{ID}.scope", ID, f"a/libpod-{ID}")]
    assert containers.of([Cgroup(7 + n, 1, path) for n, path in enumerate(paths)]) == {}
    assert engines.asked == [] and not containers.unknown
    roots = manager.replace("1000", "0")
    assert set(containers.of([Cgroup(20, 1, f"{roots}/docker-{ID}.scope")])) == {20}


@pytest.mark.parametrize("above", ["/given", "/given/in", f"/docker-{'1' * 64}.scope", f"/{ID}/in"])
def test_cgroups_that_were_given_away_ask_no_engine(above: str) -> None:
    """Nor do those inside of a container, where somebody may make cgroups, too."""
    engines = Knowing()
    containers = Containers(Tree(), engines)
    assert containers.of([Cgroup(7, 1, f"{above}/docker-{ID}.scope")]) == {}
    assert engines.asked == [] and not containers.unknown


def test_containers_that_there_is_no_time_for_are_noted() -> None:
    """They may be looked at again as those that no engine knows."""
    containers = Containers(Tree(), Knowing(most=1))
    cgroups = [Cgroup(n, 1, f"/docker-{str(n) * 64}.scope") for n in (2, 3, 4)]
    assert set(containers.of(cgroups)) == {2}
    assert containers.unread == containers.unknown == {3, 4}
