"""Which sockets get the options of a policy, and which do not."""

import functools
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from harness import UNTOUCHED, entering, multipath_connection, set_sysctl
from outside import established

pytestmark = [pytest.mark.core, pytest.mark.loaders(way="open")]

POLICY = ("--idle", 61, "--interval", 11, "--probes", 5, "--user-timeout", "90s")
COVERED = {"keepalive": 1, "idle": 61, "interval": 11, "probes": 5, "user_timeout": 90000}
PLAIN = socket.SOCK_STREAM
NONBLOCKING = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


@pytest.fixture
def covered(cgroup, kabpfctl):
    """A cgroup with a policy."""
    kabpfctl("attach", "--cgroup", cgroup, *POLICY)
    return cgroup


@pytest.mark.parametrize("kind", [PLAIN, NONBLOCKING], ids=["blocking", "nonblocking"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_outgoing_connection_is_covered(covered, peer, family, kind):
    """A connection that a covered process opens has the options when connect() returns."""
    server, client = peer(), peer(covered)
    _, address = server.listener(family)
    number = client.open_socket(family, kind)
    client.connect(number, address)
    assert client.options(number) == COVERED


@pytest.mark.parametrize("kind", [PLAIN, NONBLOCKING], ids=["blocking", "nonblocking"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_accepted_connection_is_covered(covered, peer, family, kind):
    """A connection that a covered process accepts has the options; the other end has none."""
    server, client = peer(covered), peer()
    listener, address = server.listener(family, kind)
    outgoing = client.connection(address, family)
    assert server.options(server.accept(listener)) == COVERED
    assert client.options(outgoing) == UNTOUCHED


def test_connection_from_ipv4_to_an_ipv6_listener_is_covered(covered, peer):
    """An IPv4 connection accepted by a dual-stack listener is covered."""
    server, client = peer(covered), peer()
    listener = server.open_socket(socket.AF_INET6)
    _, port = server.listen(listener, ["::", 0])
    client.connection(["127.0.0.1", port])
    assert server.options(server.accept(listener)) == COVERED


def test_listener_is_covered(covered, peer):
    """A listener has the options itself, so that accepted sockets inherit them."""
    server = peer(covered)
    listener, _ = server.listener()
    assert server.options(listener) == COVERED


def test_listener_inherited_from_an_uncovered_process_is_judged_by_its_own_cgroup(covered, peer):
    """A socket belongs to the cgroup in which it was made, wherever it is used later."""
    server, client = peer(), peer()
    listener, address = server.listener()
    (covered / "cgroup.procs").write_text(str(server.process.pid))
    client.connection(address)
    assert server.options(server.accept(listener)) == UNTOUCHED


def test_forked_child_is_covered(covered, peer):
    """A connection opened by a child of a covered process is covered."""
    server, client = peer(), peer(covered)
    _, address = server.listener()
    assert client.in_child(address) == COVERED


@pytest.mark.parametrize(
    "flags",
    [(), ("-static",), ("-static", "-DRAW")],
    ids=["dynamic", "static", "static with raw system calls"],
)
def test_compiled_program_is_covered(covered, peer, compiled, flags):
    """Programs that LD_PRELOAD can't reach are covered like any other."""
    assert _run(compiled("connect.c", *flags), covered, peer) == COVERED | {"euid": 0}


def test_set_user_id_program_is_covered(covered, peer, compiled):
    """A set-user-ID program is covered, though the loader would ignore LD_PRELOAD for it."""
    program = compiled("connect.c", "-static")
    # A temporary directory may be mounted nosuid, and belongs to root alone.
    installed = Path(f"/usr/local/bin/kabpf-test-{os.getpid()}")
    try:
        installed.write_bytes(program.read_bytes())
        os.chown(installed, 65534, -1)
        installed.chmod(0o4755)
        assert _run(installed, covered, peer, user=65533) == COVERED | {"euid": 65534}
    finally:
        installed.unlink()


@pytest.mark.parametrize("way", ["new", "open"])
def test_multipath_tcp_subflow_is_covered(cgroup, peer, kabpfctl, namespace, way):
    """The subflow of an MPTCP connection has its keepalive timer armed with the policy's idle, also
    where it was open before."""
    attach = functools.partial(kabpfctl, "attach", "--cgroup", cgroup, *POLICY)
    if way == "new":
        attach()
    set_mptcp = "echo 1 > /proc/sys/net/mptcp/enabled"
    subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", set_mptcp], check=True)
    server, client = peer(None, namespace), peer(cgroup, namespace)
    _, listener, address = multipath_connection(server, client)
    server.accept(listener)
    if way == "open":
        attach()
    (ours,) = established(namespace, destination=address[1])
    assert ours["idiag_timer"] == 2  # keepalive (sock_diag(7))
    assert 0 < ours["idiag_expires"] <= 61_000
    (theirs,) = established(namespace, source=address[1])
    assert theirs["idiag_timer"] == 0


def test_fast_open_connection_is_covered_on_both_ends(covered, peer, namespace):
    """A connection whose first data travels in the SYN is covered, active and passive."""
    set_sysctl(namespace, "tcp_fastopen", "0x607")  # both ends, without cookies
    server, client = peer(covered, namespace), peer(covered, namespace)
    listener, address = server.listener()
    number = client.open_socket(socket.AF_INET)
    client.connect_with_data(number, address)
    accepted = server.accept(listener)
    assert server.receive(accepted, 5) == "data"
    assert client.options(number) == COVERED
    assert server.options(accepted) == COVERED
    assert _statistic(namespace, "TCPFastOpenPassive") == 1


def test_connection_from_a_syn_cookie_is_covered(covered, peer, namespace):
    """A connection that the server made from a SYN cookie is covered."""
    set_sysctl(namespace, "tcp_syncookies", "2")  # always
    server, client = peer(covered, namespace), peer(None, namespace)
    listener, address = server.listener()
    client.connection(address)
    assert server.options(server.accept(listener)) == COVERED
    assert _statistic(namespace, "SyncookiesRecv") == 1


@pytest.mark.parametrize(
    ("family", "kind", "protocol"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, 0),
        (socket.AF_INET6, socket.SOCK_DGRAM, 0),
        (socket.AF_UNIX, socket.SOCK_STREAM, 0),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP),
    ],
    ids=["udp", "udp over ipv6", "unix", "raw"],
)
def test_socket_of_another_kind_is_left_alone(covered, peer, family, kind, protocol):
    """Sockets that are not TCP have no keepalive turned on, connected or not."""
    client = peer(covered)
    number = client.open_socket(family, kind, protocol)
    if kind == socket.SOCK_DGRAM:
        client.connect(number, ["::1" if family == socket.AF_INET6 else "127.0.0.1", 9])
    assert client.keepalive(number) == 0


def test_other_cgroup_is_left_alone(covered, other_cgroup, peer):
    """Sockets of a cgroup that no policy selects are untouched, on both ends."""
    server, client = peer(other_cgroup), peer(other_cgroup)
    listener, address = server.listener()
    number = client.connection(address)
    assert client.options(number) == UNTOUCHED
    assert server.options(server.accept(listener)) == UNTOUCHED


def test_option_that_the_application_set_before_is_kept(covered, peer):
    """What the application chose before the connection stays; what it left open is filled in."""
    server, client = peer(), peer(covered)
    _, address = server.listener()
    number = client.open_socket(socket.AF_INET)
    client.set_option(number, "keepalive", 1)
    client.set_option(number, "idle", 15)
    client.connect(number, address)
    assert client.options(number) == COVERED | {"idle": 15}


def test_option_that_the_application_sets_later_wins(covered, peer):
    """The application's later setsockopt() has the last word."""
    server, client = peer(), peer(covered)
    _, address = server.listener()
    number = client.connection(address)
    client.set_option(number, "idle", 15)
    client.set_option(number, "keepalive", 0)
    assert client.options(number) == COVERED | {"idle": 15, "keepalive": 0}


def test_option_that_the_policy_leaves_out_is_left_alone(cgroup, peer, kabpfctl):
    """A policy with idle alone turns keepalive on and leaves the other options to the system."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", "61")
    server, client = peer(), peer(cgroup)
    _, address = server.listener()
    number = client.connection(address)
    assert client.options(number) == UNTOUCHED | {"keepalive": 1, "idle": 61}


def _run(program, cgroup, peer, user=0):
    _, address = peer().listener()

    def enter():
        entering(cgroup)()
        os.setuid(user)

    return json.loads(subprocess.check_output([program, str(address[1])], preexec_fn=enter))


def _statistic(namespace, name):
    text = subprocess.check_output(
        ["ip", "netns", "exec", namespace, "cat", "/proc/net/netstat"], text=True
    )
    heads, values = (line.split() for line in text.splitlines()[:2])
    return int(values[heads.index(name)])
