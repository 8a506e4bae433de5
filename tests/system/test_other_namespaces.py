"""What kabpfd alone can't do: cgroups named by a glob, sockets of other network namespaces."""

import pytest
from harness import UNTOUCHED, wait_until
from machine import COVERED, KEEPALIVE

WORKERS = f'select: [{{unit: "worker-*.service"}}]\n{KEEPALIVE}'


@pytest.fixture
def networks(machine):
    """systemd-run's options for services in the machine's network namespace, in one that systemd
    makes, and in one that `ip netns` made."""
    machine.run("ip", "netns", "add", "apart")
    machine.run("ip", "-n", "apart", "link", "set", "lo", "up")
    return (), ("--property=PrivateNetwork=yes",), ("-pNetworkNamespacePath=/run/netns/apart",)


def test_open_connections_are_covered(machine, service, networks):
    """A policy reaches the connections that are open already, in whichever namespace."""
    apps = [service(f"app-{n}.service", *options) for n, options in enumerate(networks)]
    ends = [(app, end) for app in apps for end in app.pair()]
    assert [app.options(end) for app, end in ends] == [UNTOUCHED] * 6
    units = ", ".join(f"{{unit: app-{n}.service}}" for n, _ in enumerate(apps))
    machine.drop_in("apps.yaml", f"select: [{units}]\n{KEEPALIVE}")
    assert [app.options(end) for app, end in ends] == [COVERED] * 6


def test_namespace_that_only_a_socket_holds_is_reached(machine, service):
    """A policy reaches a socket whose network namespace no process and no mount has."""
    app = service("app.service")
    number = app.listener_in_new_namespace()
    machine.drop_in("app.service.yaml", KEEPALIVE)
    assert app.options(number) == COVERED


def test_new_cgroup_of_a_glob_is_covered(machine, service, networks):
    """The connections that a new cgroup had opened before kabpfd resolved it get their options."""
    machine.drop_in("workers.yaml", WORKERS)
    for n, options in enumerate(networks):
        worker = service(f"worker-{n}.service", *options)
        for end in worker.pair():
            wait_until(lambda worker=worker, end=end: worker.options(end) == COVERED, "the options")


def test_glob_is_resolved_after_a_kill(machine, service):
    """Cgroups born while no kabpfd ran are covered by the next one."""
    machine.drop_in("workers.yaml", WORKERS)
    machine.write("/run/systemd/system/kabpf.service.d/late.conf", "[Service]\nRestartSec=3s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "kill", "--signal=KILL", "kabpf.service")
    worker = service("worker-1.service")
    ends = worker.pair()
    for end in ends:
        wait_until(lambda end=end: worker.options(end) == COVERED, "the options", 20)
