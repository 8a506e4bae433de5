"""Units whose sockets are in other cgroups than their own: what is said of them."""

import json
import os
from pathlib import Path

import pytest
from container_engines import OPTIONS
from harness import wait_until
from machine import KEEPALIVE

ACCEPTING = """
import socket
listener, kept = socket.socket(fileno=3), []
while True:
    kept.append(listener.accept())
"""
SLEEP = "[Service]\nExecStart={command}\n{more}"


def _warnings(machine, check="reach"):
    found = json.loads(machine.attempt("kabpfctl", "doctor", "--json").stdout)["findings"]
    return [(each["found"], each["fix"]) for each in found if each["check"] == check]


@pytest.fixture
def alice(machine):
    """An unprivileged user; the id."""
    machine.run("useradd", "--create-home", "alice")
    return machine.run("id", "--user", "alice")


MOVED = (
    ("/bin/su - alice -c 'sleep infinity'", ""),
    ("/bin/su alice -c 'sleep infinity'", ""),
    ("/sbin/runuser -l alice -c 'sleep infinity'", ""),
    ("/bin/sleep infinity", "User=alice\nPAMName=login\n"),
)


def test_unit_that_pam_moves_is_told(machine, alice):
    """Its processes are in the scope of a session: doctor, check and explain say so, and what to
    select; explain of such a process names the unit."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    session = f"/user.slice/user-{alice}.slice/session-"
    for command, more in MOVED:
        unit = SLEEP.format(command=command, more=more)
        machine.write("/run/systemd/system/app.service", unit)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", "app.service")
        main = machine.show("app.service", "MainPID")
        where = ("sed", "-n", "s/^0:://p", f"/proc/{main}/cgroup")
        wait_until(lambda where=where: machine.run(*where).startswith(session), "the session")
        said = f"app.service is active, but its main process {main} is in {session}"
        ((text, advice),) = _warnings(machine)
        assert text.startswith(said)
        assert f"select unit: user-{alice}.slice" in advice
        assert f"warning: {said}" in machine.attempt("kabpfctl", "check").stderr
        assert said in machine.run("kabpfctl", "explain", main)


@pytest.mark.parametrize("machine", [OPTIONS], indirect=True, ids=["keyrings"])
def test_unit_whose_containers_are_elsewhere_is_told(machine):
    """In its cgroup is podman alone; what to change, and what to select."""
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/var/lib/containers")
    machine.drop_in("app.service.yaml", KEEPALIVE)
    command = "/usr/bin/podman run --network=none --privileged --pids-limit=0 --rootfs /:O sleep 99"
    machine.write("/run/systemd/system/app.service", SLEEP.format(command=command, more=""))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "app.service")
    wait_until(lambda: [*machine.cgroups.glob("machine.slice/libpod-*.scope")], "the container")
    ((text, advice),) = _warnings(machine)
    assert text.startswith("app.service ")
    assert text.endswith("whose containers are in cgroups of their own")
    assert advice == (
        "add --cgroups=split to podman run, or select cgroup: /machine.slice/libpod-*.scope"
    )
    assert f"warning: {text}" in machine.attempt("kabpfctl", "check").stderr
    assert text in machine.run("kabpfctl", "explain", "app.service")


def test_unit_that_stays_is_not_told(machine, alice):
    """One with User=, and one that drops its rights by setpriv."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    command = "/usr/bin/setpriv --reuid=alice --clear-groups sleep infinity"
    machine.write("/run/systemd/system/app.service", SLEEP.format(command=command, more=""))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "app.service")
    assert [advice for _, advice in _warnings(machine)] == [""]


def test_listener_of_a_users_manager_is_told(machine, inside, alice):
    """A user's manager makes the listeners of its socket units in its own cgroup, which no
    `user_unit:` reaches; the selector that is named does."""
    machine.write("/opt/accepting", ACCEPTING)
    run = "[Service]\nExecStart=/usr/bin/python3 /opt/accepting\n"
    machine.write("/etc/systemd/user/web.service", run)
    listen = "[Socket]\nListenStream=127.0.0.1:7001\n[Install]\nWantedBy=sockets.target\n"
    machine.write("/etc/systemd/user/web.socket", listen)
    machine.run("systemctl", "--global", "enable", "web.socket")
    machine.drop_in("users.yaml", f"select: [{{user_unit: web.service}}]\n{KEEPALIVE}")
    machine.run("systemctl", "start", f"user@{alice}.service")
    client = inside()
    client.connection(("127.0.0.1", 7001))
    manager = f"/user.slice/user-{alice}.slice/user@{alice}.service/init.scope"
    wait_until(lambda: "web.service" in "".join(map(str, _named(machine))), "the service")
    ((text, advice),) = _warnings(machine)
    assert text.startswith(f"{manager} has the listeners of its manager's socket units (port 7001)")
    assert advice == f"select cgroup: {manager}"
    explained = machine.run("kabpfctl", "explain", "web.service")
    assert text in explained
    assert advice in explained
    main = machine.run("pgrep", "--full", "--exact", "/usr/bin/python3 /opt/accepting")
    called = manager.rpartition(".slice/")[2]
    assert f"  {called}  127.0.0.1:7001" in machine.run("kabpfctl", "explain", main)
    machine.drop_in("managers.yaml", f'select: [{{cgroup: "{manager}"}}]\n{KEEPALIVE}')
    assert all(one["keepalive"] for one in _sockets(machine, manager))


def _sockets(machine, cgroup):
    listed = machine.run("kabpfctl", "sockets", "--json", "--cgroup", cgroup)
    return json.loads(listed)["sockets"]


def _named(machine):
    return (machine.cgroups / "user.slice").rglob("web.service")


def test_unit_of_a_systemd_in_a_container_is_told(machine):
    """podman boots a systemd whose units have cgroups of their own; both selectors that explain
    names reach one."""
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/var/lib/containers")
    machine.run(
        *("podman", "run", "--detach", "--name=box", "--systemd=always", "--network=none"),
        *("--privileged", "--pids-limit=0", "--rootfs", "/:O"),
        *("/sbin/init", "systemd.unit=basic.target"),
    )
    journal = "systemd-journald.service"

    def found():
        walked = os.walk(machine.cgroups / "machine.slice")  # past what goes meanwhile
        return [Path(top) for top, _, _ in walked if top.endswith(f"system.slice/{journal}")]

    wait_until(found, "the container's systemd", 60)
    path = f"/{found()[0].relative_to(machine.cgroups)}"
    payload = path.removesuffix(f"/system.slice/{journal}")
    explained = machine.run("kabpfctl", "explain", path)
    assert f"  of the systemd in container {payload}" in explained
    assert f"  unit: {journal} selects it, and others of that name" in explained
    assert f"  cgroup: {path} selects it alone" in explained
    for selector in (f"unit: {journal}", f'cgroup: "{path}"'):
        machine.drop_in("box.yaml", f"select: [{{{selector}}}]\n{KEEPALIVE}")
        assert "policy box," in machine.run("kabpfctl", "explain", path)
