"""Sockets and processes that systemd makes for others: activation, scopes, users' units."""

import json

import pytest
from harness import wait_until
from machine import COVERED, KEEPALIVE
from outside import connections

# Accepts on the socket that systemd hands over, and keeps what it accepts.
ACCEPTING = """
import socket
listener, kept = socket.socket(fileno=3), []
while True:
    kept.append(listener.accept())
"""

SOCKET = "[Socket]\nListenStream=127.0.0.1:7000\nAccept={accept}\n"
SERVICE = "[Service]\nExecStart={command}\nStandardInput={input}\n"


@pytest.fixture
def socket_unit(machine):
    """Starts app.socket, which is activated at port 7000."""

    def start(service, accept, command, input):
        machine.write("/run/systemd/system/app.socket", SOCKET.format(accept=accept))
        text = SERVICE.format(command=command, input=input)
        machine.write(f"/run/systemd/system/{service}", text)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "app.socket")

    return start


def _wait_for_accepted(machine, count, slice="system.slice"):
    """What port 7000 has accepted, by whichever process below the slice, once it is so many: from
    one look, as systemd's processes pass sockets on until they execute the service."""
    accepted = []

    def look():
        found = connections(machine.cgroups / slice)
        accepted[:] = [one.options for one in found if one.local[1] == 7000]
        return len(accepted) == count

    wait_until(look, "the accepted connections")
    return accepted


@pytest.mark.parametrize("policy_first", [True, False])
def test_activated_service_has_its_options(machine, inside, socket_unit, policy_first):
    """With Accept=no systemd makes the listener, in the socket's cgroup; a policy for the service
    covers what that accepts, also from a listener that was there first."""
    machine.write("/opt/accepting", ACCEPTING)
    if policy_first:
        machine.drop_in("app.service.yaml", KEEPALIVE)
    socket_unit("app.service", "no", "/usr/bin/python3 /opt/accepting", "null")
    if not policy_first:
        machine.drop_in("app.service.yaml", KEEPALIVE)
    client = inside()
    client.connection(("127.0.0.1", 7000))
    assert _wait_for_accepted(machine, 1) == [COVERED]


@pytest.mark.parametrize("policy_first", [True, False])
@pytest.mark.parametrize(
    ("socket_says", "service_says"),
    [("Service=front.service\n", ""), ("", "Sockets=front-tcp.socket\n")],
    ids=["Service=", "Sockets="],
)
def test_activated_service_has_its_options_from_a_socket_of_another_name(
    machine, inside, policy_first, socket_says, service_says
):
    """A policy for the service covers what front-tcp.socket accepts for it, also where systemd
    learns of the two after kabpf has its policy; `explain` says why."""
    machine.write("/opt/accepting", ACCEPTING)
    if policy_first:
        machine.drop_in("front.service.yaml", KEEPALIVE)
    listen = f"[Socket]\nListenStream=127.0.0.1:7000\n{socket_says}"
    machine.write("/etc/systemd/system/front-tcp.socket", listen)
    run = f"[Service]\nExecStart=/usr/bin/python3 /opt/accepting\n{service_says}"
    machine.write("/usr/local/lib/systemd/system/front.service", run)
    # systemd starts no socket without a service, be it another one than the socket is for.
    machine.write("/run/systemd/system/front-tcp.service", "[Service]\nExecStart=/bin/true\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "front-tcp.socket" if socket_says else "front.service")
    if not policy_first:
        machine.drop_in("front.service.yaml", KEEPALIVE)
    client = inside()
    client.connection(("127.0.0.1", 7000))
    wait_until(lambda: _wait_for_accepted(machine, 1) == [COVERED], "the options")
    said = machine.run("kabpfctl", "explain", "front")
    assert "unit front.service" in said and "as one of its sockets" in said
    for unit in ("front.service", "front"):
        listed = machine.run("kabpfctl", "sockets", "--json", "--unit", unit)
        found = [(one["state"], one["cgroup"]) for one in json.loads(listed)["sockets"]]
        inside_socket = "/system.slice/front-tcp.socket"
        assert sorted(found) == [("established", inside_socket), ("listen", inside_socket)]


@pytest.mark.parametrize("drop_in", ["app.socket.yaml", "app@.service.yaml"])
def test_service_for_each_connection_has_its_options(machine, inside, socket_unit, drop_in):
    """With Accept=yes systemd accepts and starts an instance for each connection; a policy for the
    socket covers it, and one for the instances."""
    machine.drop_in(drop_in, KEEPALIVE)
    socket_unit("app@.service", "yes", "/usr/bin/sleep infinity", "socket")
    client = inside()
    for _ in range(3):
        client.connection(("127.0.0.1", 7000))
    accepted = _wait_for_accepted(machine, 3, "system.slice/system-app.slice")
    assert accepted == [COVERED] * 3


def test_scope_has_its_options(machine, inside):
    """A command under `systemd-run --scope` is covered from its first instruction."""
    machine.drop_in("app.scope.yaml", KEEPALIVE)
    _, address = inside().listener()
    client = inside("systemd-run", "--quiet", "--scope", "--unit=app")
    assert client.options(client.connection(address)) == COVERED


@pytest.fixture
def as_user(machine, inside):
    """Starts a peer as a unit of an unprivileged user's manager, which runs without a login."""
    machine.run("useradd", "--create-home", "alice")
    machine.run("loginctl", "enable-linger", "alice")
    uid = machine.run("id", "--user", "alice")
    bus = f"XDG_RUNTIME_DIR=/run/user/{uid}"
    up = ("systemctl", "is-active", f"user@{uid}.service")
    wait_until(lambda: machine.attempt(*up).returncode == 0, "the user's manager", 20)
    return lambda *options: inside(
        *("runuser", "--user=alice", "--", "env", bus, "systemd-run", "--user", "--quiet"), *options
    )


@pytest.mark.parametrize("how", [("--pipe", "--unit=app.service"), ("--scope", "--unit=app.scope")])
def test_unit_of_a_user_has_its_options(machine, inside, as_user, how):
    """A `user_unit:` selector covers the unit of an unprivileged user's manager."""
    unit = how[1].removeprefix("--unit=")
    machine.drop_in("users.yaml", f"select: [{{user_unit: {unit}}}]\n{KEEPALIVE}")
    _, address = inside().listener()
    client = as_user(*how)
    assert client.options(client.connection(address)) == COVERED


def test_unit_selector_covers_no_process_of_a_like_name_elsewhere(machine, inside, service):
    """A unit whose name only begins alike is not covered."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    _, address = inside().listener()
    client = service("app-2.service")
    assert client.options(client.connection(address))["keepalive"] == 0
