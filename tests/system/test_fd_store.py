"""A listener in systemd's file descriptor store, which outlives the cgroup that it was made in."""

import json
import re

import pytest
from machine import KEEPALIVE

# Listens anew where the store is empty. Asked for a value, it sets idle to that on its listener and
# on what it has accepted, and answers with the options of both.
STORING = """
import array, json, os, socket

OPTIONS = {"keepalive": (1, 9), "idle": (6, 4), "interval": (6, 5), "probes": (6, 6)}

def options(one):
    return {name: one.getsockopt(*option) for name, option in OPTIONS.items()}

def notify(text, *descriptors):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        address = os.environ["NOTIFY_SOCKET"]
        channel.sendmsg([text], [rights] if descriptors else [], 0, address)

if os.environ.get("LISTEN_FDS"):
    listener = socket.socket(fileno=3)
else:
    listener = socket.create_server(("127.0.0.1", 7001))
    notify(b"FDSTORE=1", listener.fileno())
notify(b"READY=1")
while True:
    accepted, _ = listener.accept()
    before = [options(listener), options(accepted)]
    idle = int(accepted.recv(16))
    for one in (listener, accepted):
        one.setsockopt(6, 4, idle)
    answer = before + [options(listener), options(accepted)]
    accepted.sendall(json.dumps(answer).encode() + b"\\n")
    kept = accepted
"""
UNIT = "[Service]\nType=notify\nFileDescriptorStoreMax=4\nExecStart=/usr/bin/python3 /opt/storing\n"
ASKING = """
import socket, sys
with socket.create_connection(("127.0.0.1", 7001)) as one:
    one.sendall(sys.argv[1].encode())
    print(one.makefile().readline())
"""
OFF = {"keepalive": 0, "idle": 7200, "interval": 75, "probes": 9}
GIVEN = {"keepalive": 1, "idle": 61, "interval": 7, "probes": 5}


@pytest.fixture
def ask(machine):
    """Has the service set idle on its listener and what it accepts; the options of both before, and
    after."""
    machine.write("/opt/storing", STORING)
    machine.write("/opt/asking", ASKING)
    machine.write("/run/systemd/system/app.service", UNIT)
    machine.run("systemctl", "daemon-reload")

    def ask(idle):
        return json.loads(machine.run("python3", "/opt/asking", str(idle)))

    return ask


def _restart(machine):
    """Restarts the service, whose cgroup is another one then."""
    before = machine.cgroup("app.service").stat().st_ino
    machine.run("systemctl", "restart", "app.service")
    assert machine.cgroup("app.service").stat().st_ino != before


def _checked(machine, check):
    found = json.loads(machine.attempt("kabpfctl", "doctor", "--json").stdout)["findings"]
    return [
        (each["status"], each["found"], each["fix"]) for each in found if each["check"] == check
    ]


def test_listener_in_the_store_has_every_later_policy(machine, ask):
    """The unit's policy reaches it and what it accepts after its cgroup was removed: as it was, as
    it is changed, under `enforce`, in a range, and when there is none; all commands say so."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("systemctl", "start", "app.service")
    _restart(machine)
    assert ask(61) == [GIVEN] * 4
    _every_command_says_so(machine)
    machine.drop_in("app.service.yaml", KEEPALIVE.replace("61", "62"))
    changed = GIVEN | {"idle": 62}
    assert ask(15) == [changed, changed, GIVEN | {"idle": 15}, GIVEN | {"idle": 15}]
    machine.drop_in("app.service.yaml", f"mode: enforce\n{KEEPALIVE}")
    assert ask(15) == [GIVEN] * 4
    _restart(machine)
    machine.drop_in("app.service.yaml", KEEPALIVE.replace("61", "20s..100s"))
    clamped = GIVEN | {"idle": 20}
    before = ask(15)
    assert before[2:] == [clamped, clamped]
    assert all(20 <= each["idle"] <= 100 for each in before)
    assert ask(50)[2:] == [GIVEN | {"idle": 50}] * 2


def _every_command_says_so(machine):
    main = machine.show("app.service", "MainPID")
    listed = machine.run("kabpfctl", "sockets", "--json", "--unit", "app.service")
    (listener,) = (each for each in json.loads(listed)["sockets"] if each["state"] == "listen")
    assert listener["removed"]
    assert listener["cgroup"] == "/system.slice/app.service"
    assert listener["policy"] == "app.service"
    assert {listener["set_by"][key] for key in ("idle_s", "interval_s", "probes")} == {"policy"}
    shown = machine.run("kabpfctl", "sockets")
    assert re.search(r"^app.service \(removed\) .* 61s/7s/5 .* app.service$", shown, re.MULTILINE)
    explained = machine.run("kabpfctl", "explain", main)
    held = r"  app.service \(removed\)  127.0.0.1:7001  \* +listen +app.service"
    assert re.search(held, explained)
    assert [grade for grade, *_ in _checked(machine, "listeners")] == ["ok"]
    assert [grade for grade, *_ in _checked(machine, "reach")] == ["ok"]
    assert "  1 removed cgroup still has open sockets\n" in machine.run("kabpfctl", "status")
    machine.run("kabpfctl", "verify")


def test_listener_whose_cgroup_was_removed_before_kabpf_ran_is_told(machine, ask):
    """No policy reaches it: doctor has port and process, and the advice mends it. In a container
    the cgroup may as well be outside."""
    machine.run("systemctl", "stop", "kabpf.service")
    machine.run("systemctl", "start", "app.service")
    _restart(machine)
    machine.run("systemctl", "start", "kabpf.service")
    machine.drop_in("app.service.yaml", KEEPALIVE)
    assert ask(7200)[:2] == [OFF] * 2
    main = machine.show("app.service", "MainPID")
    ((grade, found, advice),) = _checked(machine, "listeners")
    assert grade == "warning"
    assert f"process {main} listens at port 7001 for an unknown cgroup" in found
    shown = machine.run("kabpfctl", "sockets")
    assert re.search(r"^\? +127.0.0.1:7001 .* off ", shown, re.MULTILINE)
    machine.run("sh", "-c", advice)
    assert ask(61) == [GIVEN] * 4
    assert [grade for grade, *_ in _checked(machine, "listeners")] == ["ok"]
