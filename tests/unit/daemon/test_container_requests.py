"""The socket of container engines' hooks, where it can't be made, and what it refuses."""

from __future__ import annotations

import json
import resource
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabpf.containers import names
from kabpf.daemon import container_requests, new_containers
from kabpf.daemon.container_requests import NAME, ContainerRequests
from kabpf.daemon.new_containers import NewContainers
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import Cgroup

PATH = f"/machine.slice/libpod-{'0' * 64}.scope"


class Tree(CgroupTree):
    """A tree in which each container's cgroup is there."""

    def find(self, path: str) -> Cgroup:
        assert names.identify(path)
        return Cgroup(7, 1, path)


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_requests, "_uid", lambda _: 0)


@pytest.fixture
def containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewContainers]:
    """The daemon's containers, with a socket below tmp_path."""
    monkeypatch.setattr(new_containers, "ContainerRequests", lambda: ContainerRequests(tmp_path))
    with select.epoll() as poll:
        made = NewContainers(Tree(tmp_path), poll)
        yield made
        made.close()


def asked(run: Path, request: object) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(run / NAME))
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


def heard(containers: NewContainers) -> bool:
    containers.hear()  # which accepts the connection
    return containers.hear()


def test_socket_that_can_not_be_made_keeps_nothing_awake(tmp_path: Path) -> None:
    """Where something else has its name, epoll has nothing to tell."""
    (tmp_path / NAME).mkdir()
    requests = ContainerRequests(tmp_path)
    try:
        assert select.select([requests], [], [], 0)[0] == []
    finally:
        requests.close()


def test_socket_that_was_removed_is_made_anew(containers: NewContainers, tmp_path: Path) -> None:
    """With the directory or alone; one that is there stays, and so does who waits."""
    waiting = asked(tmp_path, {"cgroup": PATH})
    containers.renew()
    assert heard(containers)
    (tmp_path / NAME).unlink()
    for _ in range(2):
        containers.renew()
        with asked(tmp_path, {"cgroup": PATH}) as late:
            assert heard(containers)
            containers.looked(containers.births(), ())
            assert late.recv(100) == b"{}\n"
    assert waiting.recv(100) == b"{}\n"
    waiting.close()
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_lack_of_descriptors_keeps_nothing_awake(tmp_path: Path) -> None:
    """Who could not be accepted is accepted with the next one."""
    requests = ContainerRequests(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with asked(tmp_path, {"cgroup": PATH}) as first:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            try:
                assert requests.receive() == []
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert select.select([requests], [], [], 0)[0] == []
            with asked(tmp_path, {"cgroup": PATH}):
                requests.receive()
                received = requests.receive()
                assert [each.cgroup for each in received] == [PATH, PATH]
                for each in received:
                    requests.answer(each)
                assert first.recv(10) == b"{}\n"
    finally:
        requests.close()


@pytest.mark.parametrize("path", ["/\ud800" + PATH, PATH + "/\udfff\ud800", "\0" + PATH, "a", 7])
def test_path_that_no_cgroup_has_is_refused(
    containers: NewContainers, tmp_path: Path, path: object
) -> None:
    """JSON has texts that are no bytes."""
    with asked(tmp_path, {"cgroup": path}) as connection:
        assert not heard(containers)
        assert list(json.loads(connection.recv(1000))) == ["error"]
