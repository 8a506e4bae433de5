"""Of which cgroups the engines are asked, and how often."""

from __future__ import annotations

from kabpf.apply.containers import Containers
from kabpf.containers.facts import Container
from kabpf.plan.state import Cgroup

ID = "0" * 64


class Knowing:
    """An engine that knows every container, and notes what it is asked."""

    def __init__(self, *, nothing: bool = False) -> None:
        self.asked: list[str] = []
        self._nothing = nothing

    def facts(self, path: str, id: str) -> Container | None:
        self.asked.append(path)
        return None if self._nothing else Container(id, "docker", "web", "")


def test_container_is_asked_for_once() -> None:
    """Also where nothing is known of it, until the next look at all cgroups."""
    for engines in (Knowing(), Knowing(nothing=True)):
        containers = Containers(engines)
        cgroups = [Cgroup(1, 0, "/"), Cgroup(2, 1, f"/docker-{ID}.scope"), Cgroup(3, 1, f"/x{ID}")]
        known = [set(containers.of(cgroups)) for _ in range(2)]
        assert engines.asked == [f"/docker-{ID}.scope"]
        assert (known, containers.unknown) in (([{2}, {2}], set()), ([set(), set()], {2}))


def test_cgroups_of_users_ask_no_engine() -> None:
    """A user may make cgroups with the names of containers without end; root's manager is none."""
    engines = Knowing()
    containers = Containers(engines)
    manager = "/user.slice/user-1000.slice/user@1000.service"
    paths = [f"{manager}/{name}" for name in (f"docker-{ID}.scope", ID, f"a/libpod-{ID}")]
    assert containers.of([Cgroup(7 + n, 1, path) for n, path in enumerate(paths)]) == {}
    assert engines.asked == [] and not containers.unknown
    roots = manager.replace("1000", "0")
    assert set(containers.of([Cgroup(20, 1, f"{roots}/docker-{ID}.scope")])) == {20}
