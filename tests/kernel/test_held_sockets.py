"""Sockets that a process holds for as long as it likes, and namespaces that only sockets hold."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, PROGRAMS, WATCHED, entering, path_of, wait_until

# An older kabpf on the machine would wait for these sockets.
pytestmark = [pytest.mark.core, pytest.mark.alone]

SOON_S = 2  # for a command to end, beside what it takes anyway


class HeldSocket:
    """A process that holds a socket's lock in a network namespace, and nothing else of it."""

    def __init__(self, cgroup: Path, namespace: str) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-I", PROGRAMS / "holder.py"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=entering(cgroup),
        )
        assert self.process.stdout
        said = self.process.stdout.readline()
        if said.startswith("userfaultfd: "):
            self.let_go()
            pytest.skip(f"this kernel has no userfaultfd(2) (CONFIG_USERFAULTFD): {said.strip()}")
        assert said == "held\n"

    def let_go(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hold(make_cgroup: Callable[[str], Path]) -> Iterator[Callable[[Path, str], HeldSocket]]:
    """Holds sockets; when the test dies, the end of their standard input lets go of them."""
    held: list[HeldSocket] = []

    def start(cgroup: Path, namespace: str) -> HeldSocket:
        held.append(HeldSocket(cgroup, namespace))
        return held[-1]

    yield start
    for each in held:
        each.let_go()


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
    """Where a process holds a socket, apply ends soon and says who does it; new connections and
    other namespaces have the policy; the lock is free; and once the socket is let go of, the next
    apply does the rest."""
    cgroup, write = place
    held_in, free = make_namespace(), make_namespace()
    client, elsewhere = peer(cgroup, held_in), peer(cgroup, free)
    _, address = peer(other_cgroup, held_in).listener()
    number = client.connection(address)
    _, there = peer(other_cgroup, free).listener()
    other = elsewhere.connection(there)
    holder = hold(other_cgroup, held_in)
    write(61)
    done = timed(kabpfctl, "apply")
    assert done.stderr.startswith(
        f"kabpfctl: open sockets in network namespace {inode_of(held_in)} are not updated yet: "
    )
    assert f"process {holder.process.pid} holds a socket there" in done.stderr
    assert elsewhere.options(other)["idle"] == 61
    assert client.options(client.connection(address))["idle"] == 61
    assert "not updated yet" in kabpfctl("status", "--json").stdout
    with open("/run/kabpf/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.let_go()
    assert kabpfctl("apply").stderr == ""
    assert client.options(number)["idle"] == 61


@pytest.mark.slow
def test_at_most_one_visitor_waits_in_a_namespace(
    place, other_cgroup, peer, kabpfctl, hold, namespace
):
    """However often policies change, one process waits for a held socket, and it ends with it."""
    cgroup, write = place
    client = peer(cgroup, namespace)
    _, address = peer(other_cgroup, namespace).listener()
    client.connection(address)
    holder = hold(other_cgroup, namespace)
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


@pytest.mark.slow
def test_other_cgroups_are_not_owed_more(place, other_cgroup, peer, kabpfctl, hold, namespace):
    """A cgroup without a socket in the namespace that could not be updated is done with."""
    cgroup, write = place
    hold(other_cgroup, namespace)
    write(61)
    kabpfctl("apply")
    assert json.loads(kabpfctl("status", "--json").stdout)["refused"] != ""
    client = peer(cgroup)
    _, address = peer().listener()
    number = client.connection(address)
    client.set_option(number, "idle", 15)
    assert kabpfctl("apply").stderr == ""
    assert client.options(number)["idle"] == 15


@pytest.mark.slow
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


@pytest.mark.slow
def test_daemon_tries_again(place, other_cgroup, peer, kabpfd, hold, namespace):
    """kabpfd says what waits, answers its watchdog, and updates the sockets when it can."""
    cgroup, write = place
    client = peer(cgroup, namespace)
    _, address = peer(other_cgroup, namespace).listener()
    number = client.connection(address)
    holder = hold(other_cgroup, namespace)
    write(61)
    daemon = kabpfd(*WATCHED)
    assert "not updated yet" in daemon.wait_for("WATCHDOG=1")
    holder.let_go()
    while "not updated yet" in daemon.wait_for("WATCHDOG=1"):
        pass
    assert client.options(number)["idle"] == 61


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
