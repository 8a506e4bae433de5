"""The example policies for a whole system and for a service that is left out, on a machine that has
them."""

import socket

import pytest
from harness import UNTOUCHED

EXAMPLES = "/usr/share/doc/kabpf/examples"
FAR = ["10.77.0.2", 7000]
COVERED = UNTOUCHED | {"keepalive": 1, "idle": 110, "interval": 20, "probes": 5}


@pytest.fixture
def far(machine, inside):
    """A peer that listens at the other end of a cable."""
    for command in (
        "netns add far",
        "link add cable type veth peer name end netns far",
        "address add 10.77.0.1/24 dev cable",
        "link set cable up",
        "-netns far address add 10.77.0.2/24 dev end",
        "-netns far link set end up",
    ):
        machine.run("ip", *command.split())
    peer = inside("ip", "netns", "exec", "far")
    peer.listen(peer.open_socket(socket.AF_INET), FAR)
    return peer


def test_examples_cover_all_but_one_service(machine, far, service, inside):
    """Every cgroup's connections have the options, open or new; those of the service that is left
    out and those over loopback have none."""
    for name in ("always-keepalive.yaml", "sensors.service.yaml"):
        machine.run("cp", f"{EXAMPLES}/{name}", "/etc/kabpf/policy.d/")
    app, sensors = service("app.service"), service("sensors.service")
    session = inside("systemd-run", "--quiet", "--scope", "--slice=user")
    peers = [app, sensors, session]
    opened = [peer.connection(FAR) for peer in peers]
    machine.run("kabpfctl", "apply")
    new = [peer.connection(FAR) for peer in peers]
    for numbers in (opened, new):
        found = [peer.options(number) for peer, number in zip(peers, numbers, strict=True)]
        assert found == [COVERED, UNTOUCHED, COVERED]
    assert [app.options(number) for number in app.pair()] == [UNTOUCHED, UNTOUCHED]
