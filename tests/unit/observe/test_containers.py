"""What people call the containers of cgroups."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from plans import container

from kabpf.containers.facts import Container
from kabpf.observe import containers, sockets

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
SCOPE = f"/machine.slice/libpod-{ID}.scope"
POD = f"/kubepods.slice/kubepods-pod7.slice/cri-containerd-{OTHER}.scope"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Container]]:
    """What engines know, by cgroup path."""
    facts: dict[str, Container] = {}
    containers._known.cache_clear()
    monkeypatch.setattr(containers, "_looked_up", lambda path, id, second: facts.get(path))
    yield facts
    containers._known.cache_clear()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (SCOPE, "orders-db"),
        (f"{SCOPE}/container", "orders-db"),
        (f"{SCOPE}/container/system.slice/nginx.service", "orders-db/system.slice/nginx.service"),
        (f"{SCOPE}/init.scope", "orders-db/init.scope"),
        (POD, "shop/web-1/main"),
        ("/system.slice/nginx.service", "nginx.service"),
        (f"/machine.slice/libpod-{OTHER}.scope", f"libpod-{OTHER}.scope"),
        (f"/machine.slice/libpod-conmon-{ID}.scope", f"libpod-conmon-{ID}.scope"),
        ("/a", "/a"),
    ],
)
def test_cgroup_of_a_container_is_called_by_its_name(
    path: str, name: str, known: dict[str, Container]
) -> None:
    """So are those below it; of a pod's with namespace and pod. Others keep their names."""
    known[SCOPE] = container({"id": ID, "name": "orders-db"})
    pod = {"namespace": "shop", "name": "web-1"}
    known[POD] = container({"id": OTHER, "name": "main", "pod": pod})
    assert sockets.name(path) == name


def test_container_without_a_name_is_called_by_its_id(known: dict[str, Container]) -> None:
    """As engines shorten it."""
    known[SCOPE] = container({"id": ID})
    assert sockets.name(SCOPE) == "0123456789ab"


def test_container_that_is_known_later_gets_its_name(
    known: dict[str, Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A monitor that saw its cgroup before does not call it by that for ever."""
    assert sockets.name(SCOPE) == f"libpod-{ID}.scope"
    known[SCOPE] = container({"id": ID, "name": "late"})
    assert sockets.name(SCOPE) == "late"
    del known[SCOPE]  # as long as the monitor runs
    assert sockets.name(SCOPE) == "late"


@pytest.mark.parametrize(
    ("text", "path", "is_meant"),
    [
        ("orders-db", SCOPE, True),
        ("orders-*", SCOPE, True),
        ("orders", SCOPE, False),
        ("0123", SCOPE, True),
        ("012", SCOPE, False),
        (ID, f"{SCOPE}/container", True),
        ("web-1", POD, True),
        ("shop/web-1", POD, True),
        ("shop/web-1/main", POD, True),
        ("main", POD, True),
        ("shop/*", POD, True),
        ("mail/*", POD, False),
        ("*", "/a", False),
        ("*", None, False),
        ("*", f"/machine.slice/libpod-{OTHER}.scope", False),
    ],
)
def test_container_is_meant_by_its_name_that_of_its_pod_or_its_id(
    text: str, path: str | None, is_meant: bool, known: dict[str, Container]
) -> None:
    """Whole or as a glob; of an id four digits are enough."""
    known[SCOPE] = container({"id": ID, "name": "orders-db"})
    pod = {"namespace": "shop", "name": "web-1"}
    known[POD] = container({"id": OTHER, "name": "main", "pod": pod})
    assert containers.is_meant(path, text) is is_meant
    assert sockets.is_inside(path, None, None, text) is is_meant


def test_engines_are_not_imported_for_other_cgroups() -> None:
    """A machine without containers pays nothing."""
    program = (
        "import sys\n"
        "from kabpf.observe import sockets\n"
        "assert sockets.name('/system.slice/a.service') == 'a.service'\n"
        f"assert sockets.name('/x/{ID}0') == '/x/{ID}0'\n"
        "print([name for name in sys.modules if name.startswith('kabpf.engines')])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
