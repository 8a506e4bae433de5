"""`log: sockets` and DD_DEBUG in a real journal."""

import json

import pytest
from harness import wait_until
from machine import KEEPALIVE

LOGGED = KEEPALIVE + "log: sockets\n"


def _events(machine, *matches):
    """The journal's entries about sockets, the oldest first."""
    command = ("journalctl", "--quiet", "--no-pager", "--output=json", *matches)
    entries = map(json.loads, machine.run(*command).splitlines())
    return [entry for entry in entries if "KABPF_EVENT" in entry]


def _wait_for_events(machine, count, *matches):
    wait_until(lambda: len(_events(machine, *matches)) >= count, f"{count} events")
    return _events(machine, *matches)


def test_events_are_among_the_lines_of_their_unit(machine, service):
    """With their fields; those of another unit are not there."""
    machine.drop_in("app.service.yaml", LOGGED)
    machine.drop_in("other.service.yaml", LOGGED)
    apps = [service("app.service"), service("other.service")]
    for app in apps:
        _, address = app.listener()
    client = apps[0].connection(address)
    events = _wait_for_events(machine, 2, "--unit=app.service")
    assert [event["KABPF_DIRECTION"] for event in events] == ["listen", "out"]
    found = {name: value for name, value in events[1].items() if name.startswith("KABPF_")}
    assert found.pop("KABPF_PID").isdecimal()  # the machine's is another one within the container
    assert found == {
        "KABPF_EVENT": "set",
        "KABPF_POLICY": "app.service",
        "KABPF_CGROUP": "/system.slice/app.service",
        "KABPF_UNIT": "app.service",
        "KABPF_COMMAND": "python3",
        "KABPF_DIRECTION": "out",
        "KABPF_LOCAL": f"127.0.0.1:{apps[0].local_port(client)}",
        "KABPF_PEER": f"127.0.0.1:{address[1]}",
        "KABPF_KEEPALIVE": "1",
        "KABPF_KEEPALIVE_OUTCOME": "set",
        "KABPF_IDLE_S": "61",
        "KABPF_IDLE_S_OUTCOME": "set",
        "KABPF_INTERVAL_S": "7",
        "KABPF_INTERVAL_S_OUTCOME": "set",
        "KABPF_PROBES": "5",
        "KABPF_PROBES_OUTCOME": "set",
    }
    assert events[1]["SYSLOG_IDENTIFIER"] == "kabpfd"
    assert events[1]["_SYSTEMD_UNIT"] == "kabpf.service"


def test_events_of_a_socket_are_among_the_lines_of_its_service(machine, inside):
    """What a socket unit accepts for a service is found by either unit, also where the two have
    different names; so it is by `monitor --unit`."""
    machine.drop_in("front.service.yaml", LOGGED)
    listen = "[Socket]\nListenStream=127.0.0.1:7000\nService=front.service\n"
    machine.write("/run/systemd/system/front-tcp.socket", listen)
    sleep = "[Service]\nExecStart=/bin/sleep infinity\n"
    machine.write("/run/systemd/system/front.service", sleep)
    reloads = machine.show("kabpf-reload.service", "ExecMainExitTimestampMonotonic")
    machine.run("systemctl", "daemon-reload")
    key = "ExecMainExitTimestampMonotonic"
    wait_until(lambda: machine.show("kabpf-reload.service", key) != reloads, "the reload")
    # It writes its heads when it hears of everything.
    follow = "timeout --signal=INT 30 kabpfctl monitor --unit front > /run/seen"
    monitor = machine.start("sh", "-c", follow)
    wait_until(lambda: machine.attempt("test", "-s", "/run/seen").returncode == 0, "the monitor")
    machine.run("systemctl", "start", "front-tcp.socket")
    client = inside()
    client.connection(("127.0.0.1", 7000))
    for unit in ("front-tcp.socket", "front.service"):
        events = _wait_for_events(machine, 2, f"--unit={unit}")
        assert [event["KABPF_DIRECTION"] for event in events] == ["listen", "in"]
        assert {event["KABPF_UNIT"] for event in events} == {"front-tcp.socket"}
    wait_until(lambda: machine.run("cat", "/run/seen").count("front-tcp.socket") == 2, "events")
    monitor.kill()
    monitor.wait()


def test_debugged_command_is_logged(machine, inside):
    """What libdontdie's DD_DEBUG asks for, under the unit in which root's command runs."""
    app = inside("env", "DD_DEBUG=1", "kabpfctl", "run", "--idle", "61", "--")
    app.pair()
    events = _wait_for_events(machine, 3, "KABPF_EVENT=set")
    assert [event["KABPF_DIRECTION"] for event in events] == ["listen", "out", "in"]
    (unit,) = {event["OBJECT_SYSTEMD_UNIT"] for event in events}
    assert unit.startswith("kabpf-run-")


def test_debugged_command_of_a_user_is_not_logged(machine):
    """The user is told so, and the command runs."""
    machine.run("useradd", "--create-home", "alice")
    uid = machine.run("id", "--user", "alice")
    machine.run("systemctl", "start", f"user@{uid}.service")
    environment = ("env", f"XDG_RUNTIME_DIR=/run/user/{uid}", "DD_DEBUG=1")
    run = ("kabpfctl", "run", "--idle", "61", "echo", "ran")
    done = machine.attempt("runuser", "--user=alice", "--", *environment, *run)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.startswith("kabpfctl: DD_DEBUG: no socket is logged: ")
    assert _events(machine) == []


@pytest.fixture
def stuck_journal(machine):
    """A journald that reads nothing, while the test runs."""
    kill = ("systemctl", "kill", "--kill-whom=main", "systemd-journald.service")
    machine.run(*kill, "--signal=STOP")
    yield
    machine.run(*kill, "--signal=CONT")


def test_daemon_waits_for_no_journal(machine, service, stuck_journal):
    """More events than the journal's socket has room for do not keep kabpfd from its work."""
    machine.drop_in("app.service.yaml", LOGGED + "mode: enforce\n")
    app = service("app.service")
    app.set_often(app.pair()[0], "idle", 15, 1500)
    machine.drop_in("app.service.yaml", KEEPALIVE)
    status = machine.show("kabpf.service", "StatusText")
    assert status.startswith("1 policy active, covering 1 of ")
