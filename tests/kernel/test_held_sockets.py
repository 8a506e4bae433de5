"""Sockets that a process holds for as long as it likes, and namespaces that only sockets hold."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from harness import PATIENCE, PINS, WATCHED, cgroup_root, path_of, wait_until

from kabpf.apply import one_by_one
from kabpf.kernel import abi, dataplane

# An older kabpf on the machine would wait for these sockets.
pytestmark = pytest.mark.alone

SOON_S = 2  # for a command to end, beside what it takes anyway


def visitors(namespace: str) -> set[int]:
    """Processes that wait for a socket's lock in a network namespace."""
    inode, found = inode_of(namespace), set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(directory / "ns/net").st_ino == inode and (
                b"lock_sock" in (directory / "wchan").read_bytes()
            ):
                found.add(int(directory.name))
    return found


def inode_of(namespace: str) -> int:
    return os.stat(f"/run/netns/{namespace}").st_ino


def timed(kabpfctl, *arguments):
    began = time.monotonic()
    done = kabpfctl(*arguments)
    assert time.monotonic() - began < (1 + SOON_S) * PATIENCE
    return done


@pytest.fixture
def place(make_cgroup, write_policy):
    """A cgroup, and a function that writes its policy with another idle time."""
    cgroup = make_cgroup("covered")

    def write(idle: int) -> None:
        write_policy(
            "a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: {idle}}}\n"
        )

    return cgroup, write


def test_held_socket_stops_no_apply(place, other_cgroup, peer, kabpfctl, hold, make_namespace):
    """Where a process holds a socket, apply ends soon and says who does it; that socket alone waits
    for its update; the lock is free; and once the socket is let go of, the next apply does it."""
    cgroup, write = place
    held_in, free = make_namespace(), make_namespace()
    client, elsewhere = peer(cgroup, held_in), peer(cgroup, free)
    _, address = peer(other_cgroup, held_in).listener()
    number = client.connection(address)
    _, there = peer(other_cgroup, free).listener()
    other = elsewhere.connection(there)
    holder = hold(cgroup, held_in)
    write(61)
    done = timed(kabpfctl, "apply")
    assert done.stderr.startswith(
        f"kabpfctl: open sockets in network namespace {inode_of(held_in)} are not updated yet: "
    )
    assert f"process {holder.process.pid} holds a socket there" in done.stderr
    assert elsewhere.options(other)["idle"] == 61
    assert client.options(number)["idle"] == 61
    assert client.options(client.connection(address))["idle"] == 61
    assert "not updated yet" in kabpfctl("status", "--json").stdout
    with open("/run/kabpf/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.idle()
    assert kabpfctl("apply").stderr == ""
    assert holder.idle() == 61


def test_somebody_elses_held_socket_leaves_nothing_owed(
    place, other_cgroup, peer, kabpfctl, hold, namespace
):
    """A process of a cgroup without a policy holds a socket: all that the policy concerns is
    updated."""
    cgroup, write = place
    client = peer(cgroup, namespace)
    _, address = peer(other_cgroup, namespace).listener()
    number = client.connection(address)
    hold(other_cgroup, namespace)
    write(61)
    assert "updated only where a process has a descriptor" in timed(kabpfctl, "apply").stderr
    kabpfctl("verify")
    assert client.options(number)["idle"] == 61
    client.set_option(number, "idle", 15)
    assert kabpfctl("apply").stderr == ""
    assert client.options(number)["idle"] == 15


def test_what_nobody_has_accepted_yet_stays_owed(
    place, other_cgroup, peer, kabpfctl, hold, namespace
):
    """A connection in a listener's queue has no descriptor; it is updated when it is accepted."""
    cgroup, write = place
    server, client = peer(cgroup, namespace), peer(other_cgroup, namespace)
    listener, address = server.listener()
    client.connection(address)
    hold(other_cgroup, namespace)
    write(61)
    assert "not updated yet" in timed(kabpfctl, "apply").stderr
    accepted = server.accept(listener)
    kabpfctl("apply")
    assert server.options(accepted)["idle"] == 61


def test_socket_that_is_held_a_moment_later_stops_no_other(
    place, peer, kabpfctl, hold, namespace, write_policy, monkeypatch
):
    """The process that comes to wait for a socket which was free before is left behind, and another
    one updates the rest."""
    cgroup, _ = place
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]"
    write_policy("a.yaml", f"{select}\nmode: override\nkeepalive: {{idle: 61}}\n")
    clients = [peer(cgroup, namespace) for _ in range(2)]
    _, address = peer(None, namespace).listener()
    numbers = [client.connection(address) for client in clients]
    holder = hold(cgroup, namespace)
    assert "not updated yet" in timed(kabpfctl, "apply").stderr
    for client, number in zip(clients, numbers, strict=True):
        client.set_option(number, "idle", 15)
    seen = dataplane.holders
    monkeypatch.setattr(
        dataplane,
        "holders",
        lambda *given: (one._replace(flags=one.flags & ~abi.HELD) for one in seen(*given)),
    )
    left = one_by_one.update(PINS, cgroup_root(), {inode_of(namespace)})
    assert {one.process for one in left} == {holder.process.pid}
    assert [
        client.options(number)["idle"] for client, number in zip(clients, numbers, strict=True)
    ] == [61, 61]


KEEPALIVE = "{idle: 61, interval: 11, probes: 5, user_timeout: 90s}"
RANGES = "{idle: 40..50, interval: 5..9, probes: 3..6, user_timeout: 30s..60s}"


@pytest.mark.parametrize(
    "policy",
    [
        f"keepalive: {KEEPALIVE}",
        f"mode: override\nkeepalive: {KEEPALIVE}",
        f"mode: enforce\nkeepalive: {KEEPALIVE}",
        "mode: enforce\nkeepalive: off",
        f"keepalive: {RANGES}",
        f"direction: in\nloopback: true\nkeepalive: {KEEPALIVE}",
        f"loopback: false\nkeepalive: {KEEPALIVE}",
        "keepalive: {idle: 1000, jitter: 0%}\ndestinations: [{to: 127.0.0.0/8, idle: 77}]",
    ],
)
def test_one_socket_is_updated_as_the_iterator_would(
    place, other_cgroup, peer, kabpfctl, hold, make_namespace, write_policy, policy
):
    """Where a socket is held, the others come to what they do elsewhere: with values of a former
    policy and of the application, connected, accepted and listening."""
    cgroup, write = place
    write(60)
    kabpfctl("apply")
    held_in, free = make_namespace(), make_namespace()
    found = []
    for namespace in (held_in, free):
        one = peer(cgroup, namespace)
        listener, address = one.listener()
        sockets = [listener]
        for setting in ({}, {"idle": 45}, {"idle": 10, "probes": 2}, {"keepalive": 0}):
            sockets += [one.connection(address), one.accept(listener)]
            for number in sockets[-2:]:
                for name, value in setting.items():
                    one.set_option(number, name, value)
        found.append((one, sockets))
    hold(other_cgroup, held_in)
    path = path_of(cgroup)
    write_policy("a.yaml", f"select: [{{cgroup: {path}}}]\n{policy}\n")
    assert "updated only where" in timed(kabpfctl, "apply").stderr
    seen = [[one.options(number) for number in sockets] for one, sockets in found]
    assert seen[0] == seen[1]
    assert seen[0] != [one for one in seen[0] if one["idle"] in (60, 7200)]


def test_at_most_one_visitor_waits_in_a_namespace(
    place, other_cgroup, peer, kabpfctl, hold, namespace
):
    """However often policies change, one process waits for a held socket, and it ends with it."""
    cgroup, write = place
    client = peer(cgroup, namespace)
    _, address = peer(other_cgroup, namespace).listener()
    client.connection(address)
    holder = hold(cgroup, namespace)
    waiting = set()
    for idle in (61, 62, 63):
        write(idle)
        assert "not updated yet" in timed(kabpfctl, "apply").stderr
        waiting |= visitors(namespace)
    assert len(waiting) == 1
    (visitor,) = waiting
    # It keeps nothing that others wait for.
    assert {os.readlink(f) for f in Path(f"/proc/{visitor}/fd").glob("[012]")} == {os.devnull}
    assert "/run/kabpf/lock" not in {os.readlink(f) for f in Path(f"/proc/{visitor}/fd").iterdir()}
    holder.let_go()
    wait_until(lambda: visitors(namespace) == set(), "the visitor's end")


def test_other_cgroups_are_not_owed_more(place, other_cgroup, peer, kabpfctl, hold, namespace):
    """A cgroup without a socket in the namespace that could not be updated is done with."""
    cgroup, write = place
    hold(other_cgroup, namespace)
    write(61)
    kabpfctl("apply")
    assert json.loads(kabpfctl("status", "--json").stdout)["refused"] == ""
    client = peer(cgroup)
    _, address = peer().listener()
    number = client.connection(address)
    client.set_option(number, "idle", 15)
    assert kabpfctl("apply").stderr == ""
    assert client.options(number)["idle"] == 15


def test_list_has_what_processes_have_open(other_cgroup, peer, kabpfctl, hold, namespace):
    """Beside a held socket the others of its namespace are listed, once each, and the held one."""
    kabpfctl("apply")
    client = peer(other_cgroup, namespace)
    _, address = peer(other_cgroup, namespace).listener()
    number = client.connection(address)
    client.set_option(number, "keepalive", 1)
    hold(other_cgroup, namespace)
    done = timed(kabpfctl, "sockets", "--json", "--cgroup", path_of(other_cgroup))
    found = [one for one in json.loads(done.stdout)["sockets"] if one["keepalive"]]
    assert [one["peer"]["port"] for one in found] == [address[1]]
    assert f"network namespace {inode_of(namespace)}: a socket there is held" in done.stderr


def test_daemon_tries_again(place, kabpfd, hold, namespace):
    """kabpfd says what waits, answers its watchdog, and updates the socket when it can."""
    cgroup, write = place
    holder = hold(cgroup, namespace)
    write(61)
    daemon = kabpfd(*WATCHED)
    assert "not updated yet" in daemon.wait_for("WATCHDOG=1")
    holder.idle()
    while "not updated yet" in daemon.wait_for("WATCHDOG=1"):
        pass
    assert holder.idle() == 61


def test_daemon_tries_again_without_the_lock(place, peer, kabpfd, hold, namespace, write_policy):
    """While another command has the lock, it updates whatever is not held."""
    cgroup, _ = place
    write_policy(
        "a.yaml",
        f"select: [{{cgroup: {path_of(cgroup)}}}]\nmode: override\nkeepalive: {{idle: 61}}\n",
    )
    client = peer(cgroup, namespace)
    _, address = peer(None, namespace).listener()
    number = client.connection(address)
    hold(cgroup, namespace)
    daemon = kabpfd(*WATCHED)
    assert "not updated yet" in daemon.wait_for("WATCHDOG=1")
    with open("/run/kabpf/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client.set_option(number, "idle", 15)
        wait_until(lambda: client.options(number)["idle"] == 61, "the update")


def test_namespace_that_only_a_socket_holds_is_updated_and_listed(
    place, other_cgroup, peer, kabpfctl
):
    """A namespace without a process, a mount or a name, which a socket alone keeps."""
    cgroup, write = place
    client = peer(cgroup)
    number = client.listener_in_new_namespace()
    write(61)
    kabpfctl("apply")
    assert client.options(number)["idle"] == 61
    listed = json.loads(kabpfctl("sockets", "--json", "--cgroup", path_of(cgroup)).stdout)
    namespaces = {one["network_namespace"] for one in listed["sockets"]}
    assert namespaces and os.stat("/proc/self/ns/net").st_ino not in namespaces
