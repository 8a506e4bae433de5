"""What netlink tells of sockets and addresses, held against sockets of our own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from kabpf.errors import RefusedError
from kabpf.kernel import inet_diag
from kabpf.observe.sockets import LISTED, STATES

FAMILIES = {"ipv4": (socket.AF_INET, "127.0.0.1"), "ipv6": (socket.AF_INET6, "::1")}


def read(*, with_times: bool = True) -> inet_diag.Listed:
    try:
        return inet_diag.listed(b"".join(inet_diag.output(LISTED, with_times=with_times)))
    except RefusedError as error:
        pytest.skip(str(error))


@pytest.fixture(params=FAMILIES)
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection's both ends, of which the client has keepalive."""
    family, host = FAMILIES[request.param]
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(str(error))
        listener.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.setsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE, 600)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"question")
            accepted.recv(100)
            accepted.sendall(b"answer")
            client.recv(100)
            yield client, accepted


def record(of: socket.socket, listed: inet_diag.Listed) -> inet_diag.Record:
    local, peer = of.getsockname()[1], of.getpeername()[1]
    (found,) = (one for one in listed.records if (one.local_port, one.peer_port) == (local, peer))
    return found


def test_socket_is_as_its_owner_knows_it(ends: tuple[socket.socket, socket.socket]) -> None:
    """Both ends, the state, the timer of keepalive, and since when it is silent."""
    client = record(ends[0], read())
    host = client.local.removeprefix(inet_diag.MAPPED)
    assert host == socket.inet_pton(ends[0].family, ends[0].getsockname()[0])
    assert client.local == client.peer
    assert STATES[client.state] == "established"
    assert (client.timer, client.tries, client.has_owner) == (2, 0, 1)
    assert 500_000 < client.expires_ms <= 600_000 * 9 / 8
    assert client.silence_ms < 60_000
    accepted = record(ends[1], read())
    assert (accepted.timer, accepted.expires_ms) == (0, 0)


@pytest.mark.parametrize("ends", ["ipv4"], indirect=True)
def test_times_need_not_be_asked_for(ends: tuple[socket.socket, socket.socket]) -> None:
    """Without them no socket's lock is taken, and the silence is unknown."""
    client = record(ends[0], read(with_times=False))
    assert client.silence_ms == inet_diag.UNKNOWN
    assert client.cgroup_id == record(ends[0], read()).cgroup_id != 0


def test_namespace_is_told_of_as_well() -> None:
    """Its sysctl and its addresses with their networks, loopback's among them."""
    listed = read()
    with open("/proc/sys/net/ipv4/tcp_keepalive_time") as sysctl:
        assert listed.system_idle_s == int(sysctl.read())
    loopback = inet_diag.MAPPED + socket.inet_aton("127.0.0.1")
    if os.path.exists("/sys/class/net/lo"):
        assert inet_diag.Network(104, loopback, True) in listed.networks
