"""nginx, PostgreSQL and Redis as Debian has them, each with a drop-in named after its unit."""

import socket
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from harness import wait_until
from machine import COVERED, KEEPALIVE, postgresql
from outside import connections

UPSTREAM = ("127.0.0.1", 9000)

PROXY = """
server {
    listen 127.0.0.1:8080;
    location / { proxy_pass http://127.0.0.1:9000; }
}
"""
FETCH = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080')"
LINK = "SELECT dblink_connect('host=127.0.0.1 port=9000 user=x password=x dbname=x')"


@dataclass(frozen=True)
class Server:
    """A server's unit and port, its drop-in, and a command that has it connect to UPSTREAM."""

    unit: str
    port: int
    drop_in: str
    policy: str
    connect: tuple[str, ...]


def _nginx(machine):
    machine.write("/etc/nginx/conf.d/proxy.conf", PROXY)
    fetch = ("python3", "-c", FETCH)
    return Server("nginx.service", 8080, "nginx.service.yaml", KEEPALIVE, fetch)


def _postgresql(machine):
    unit, port = postgresql(machine)
    sql = ("--command=CREATE EXTENSION dblink", f"--command={LINK}")
    link = ("runuser", "--user=postgres", "--", "psql", *sql)
    return Server(unit, port, "postgresql@.service.yaml", KEEPALIVE, link)


def _redis(machine):
    # Redis sets options of its own on what it accepts.
    policy = f"{KEEPALIVE}mode: enforce\n"
    replicate = ("redis-cli", "replicaof", *map(str, UPSTREAM))
    return Server("redis-server.service", 6379, "redis-server.service.yaml", policy, replicate)


@pytest.fixture(params=[_nginx, _postgresql, _redis], ids=lambda make: make.__name__[1:])
def server(machine, request):
    """A server that runs, and its policy."""
    server = request.param(machine)
    machine.drop_in(server.drop_in, server.policy)
    machine.run("systemctl", "start", server.unit)
    return server


@contextmanager
def _running(machine, command):
    process = machine.start(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with process:
        yield
        process.kill()


def test_connections_have_their_options(machine, server, inside):
    """What the server accepts and what it connects to have the options of its drop-in."""
    upstream, client = inside(), inside()
    upstream.listen(upstream.open_socket(socket.AF_INET), UPSTREAM)
    client.connection(("127.0.0.1", server.port))
    cgroup = machine.cgroup(server.unit)

    def options():
        found = connections(cgroup)
        accepted = [one.options for one in found if one.local[1] == server.port]
        outgoing = [one.options for one in found if one.peer == UPSTREAM]
        return accepted[:1], outgoing[:1]

    with _running(machine, server.connect):
        wait_until(lambda: all(options()), "a connection accepted and one made", 20)
        assert options() == ([COVERED], [COVERED])


@pytest.fixture
def visitor(machine, server, inside):
    """Connects to the server again and again; the list of the options that it had given what it
    accepted, as long as it lived to be looked at."""
    cgroup = machine.cgroup(server.unit)
    client, seen, end = inside(), [], threading.Event()

    def look(port):
        for _ in range(10):  # the server may be about to accept it, or to end
            held = connections(cgroup)
            if found := [one.options for one in held if one.peer == ("127.0.0.1", port)]:
                return found
        return []

    def visit():
        while not end.is_set():
            number = client.open_socket(socket.AF_INET)
            if not client.connect_error(number, ("127.0.0.1", server.port)):
                seen.extend(look(client.local_port(number)))
            else:
                end.wait(0.002)  # the processor is the server's, which starts
            client.close(number)

    thread = threading.Thread(target=visit)
    thread.start()
    yield seen
    end.set()
    thread.join()


def test_restarts_uncover_no_connection(machine, server, visitor):
    """Each connection has its options, however often the server is restarted."""
    for _ in range(5):
        before = len(visitor)
        wait_until(lambda before=before: len(visitor) > before, "another connection", 20)
        machine.run("systemctl", "restart", server.unit)
        machine.run("systemctl", "reset-failed", server.unit)  # its limit of restarts
    seen = list(visitor)  # it goes on
    assert seen == [COVERED] * len(seen)
