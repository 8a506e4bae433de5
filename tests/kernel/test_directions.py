"""Every way in which a socket comes to be connected has its direction, in each mode."""

import errno
import functools
import socket
import subprocess

import pytest
from harness import PATIENCE, multipath_connection, set_sysctl, wait_until
from outside import KEEPALIVE_TIMER, established

TCP_DEFER_ACCEPT, SO_REUSEPORT = (socket.IPPROTO_TCP, 9), (socket.SOL_SOCKET, 15)
TCP_FASTOPEN_CONNECT = (socket.IPPROTO_TCP, 30)
ON = (1).to_bytes(4, "little").hex()

LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
UNTOUCHED_S, POLICY_S, ASKED_S = 7200, 61, 15
MOMENTS_S = 5 * PATIENCE

# The keepalive of a policy with each mode, and what it makes of ASKED_S.
MODES = {
    "fill": ("{idle: 61}", "mode: fill", ASKED_S),
    "override": ("{idle: 61}", "mode: override", ASKED_S),
    "enforce": ("{idle: 61}", "mode: enforce", POLICY_S),
    "range": ("{idle: 20s..61s}", "mode: fill", 20),
}


def accepted(inside, outside, *, host=LOOPBACK, port=0, backlog=128, option=None, talk=True):
    """A socket that `inside` accepted; data go both ways before."""
    listener = inside.open_socket(socket.AF_INET)
    if option:
        inside.set_bytes(listener, *option, ON)
    address = inside.listen(listener, [host, port], backlog)
    client = outside.connection([LOOPBACK, address[1]])
    outside.send(client)
    number = inside.accept(listener)
    if talk:
        inside.receive(number, 5)
        inside.send(number)
        outside.receive(client, 5)
    return number


def half_closed(inside, outside):
    """The same from a listener without a backlog, after each end has said that it is done."""
    listener = inside.open_socket(socket.AF_INET)
    client = outside.connection(inside.listen(listener, [LOOPBACK, 0], 0))
    number = inside.accept(listener)
    inside.shut(number)
    assert outside.receive(client, 5) == "end"
    return number


def multipath_accepted(inside, outside):
    _, listener, _ = multipath_connection(inside, outside)
    return inside.accept(listener)


def multipath_accepted_plain(inside, outside):
    """Accepted from an MPTCP listener, of a client that speaks TCP alone."""
    listener = inside.open_socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    outside.connection(inside.listen(listener, [LOOPBACK, 0]))
    return inside.accept(listener)


def multipath_connected(inside, outside, protocol=socket.IPPROTO_MPTCP):
    listener = outside.open_socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    address = outside.listen(listener, [LOOPBACK, 0])
    number = inside.open_socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    inside.connect(number, address)
    return number


def fast_open_accepted(inside, outside):
    listener, address = inside.listener()
    outside.connect_with_data(outside.open_socket(socket.AF_INET), address)
    return inside.accept(listener)


def fast_open_connected(inside, outside, option=None):
    _, address = outside.listener()
    number = inside.open_socket(socket.AF_INET)
    if option:
        inside.set_bytes(number, *option, ON)
        inside.connect(number, address)
        inside.send(number)
    else:
        inside.connect_with_data(number, address)
    return number


def connected(inside, outside, *, bound=None, option=None, listener_option=None):
    listener = outside.open_socket(socket.AF_INET)
    if listener_option:
        outside.set_bytes(listener, *listener_option, ON)
    address = outside.listen(listener, [LOOPBACK, 0])
    number = inside.open_socket(socket.AF_INET)
    if option:
        inside.set_bytes(number, *option, ON)
    if bound:
        inside.bind(number, [bound, 0])
    inside.connect(number, address)
    inside.send(number)
    other = outside.accept(listener)
    outside.receive(other, 5)
    outside.send(other)
    inside.receive(number, 5)
    return number


def connected_half_closed(inside, outside):
    listener, address = outside.listener()
    number = inside.open_socket(socket.AF_INET)
    inside.bind(number, [LOOPBACK, 0])
    inside.connect(number, address)
    inside.shut(number)
    assert outside.receive(outside.accept(listener), 5) == "end"
    return number


def restored(inside, _outside):
    """What CRIU restores of a connection that was accepted: TCP_REPAIR knows no directions."""
    listener, own = inside.listener()
    inside.close(listener)
    port = inside.open_socket(socket.AF_INET)
    inside.bind(port, [LOOPBACK, 0])
    peer = [LOOPBACK, inside.local_port(port)]
    inside.close(port)
    number = inside.open_socket(socket.AF_INET)
    inside.restore(number, own, peer)
    return number


IN, OUT = "in", "out"
WAYS = {
    "accepted": (accepted, IN),
    "accepted at any address": (functools.partial(accepted, host=ANY), IN),
    "accepted without a word": (functools.partial(accepted, talk=False), IN),
    "accepted without a backlog": (functools.partial(accepted, backlog=0), IN),
    "accepted without either": (functools.partial(accepted, backlog=0, talk=False), IN),
    "accepted without a backlog at any address": (
        functools.partial(accepted, host=ANY, backlog=0), IN,
    ),
    "accepted without a backlog, half closed": (half_closed, IN),
    "accepted when data came": (functools.partial(accepted, option=TCP_DEFER_ACCEPT), IN),
    "accepted from a shared port": (functools.partial(accepted, option=SO_REUSEPORT), IN),
    "accepted by fast open": (fast_open_accepted, IN),
    "accepted by MPTCP": (multipath_accepted, IN),
    "accepted by MPTCP from TCP": (multipath_accepted_plain, IN),
    "connected": (connected, OUT),
    "connected from an address": (functools.partial(connected, bound=LOOPBACK), OUT),
    "connected from any address": (functools.partial(connected, bound=ANY), OUT),
    "connected from a shared port": (
        functools.partial(connected, bound=LOOPBACK, option=SO_REUSEPORT), OUT,
    ),
    "connected from an address, half closed": (connected_half_closed, OUT),
    "connected to a server that defers": (
        functools.partial(connected, listener_option=TCP_DEFER_ACCEPT), OUT,
    ),
    "connected by fast open": (fast_open_connected, OUT),
    "connected by fast open later": (
        functools.partial(fast_open_connected, option=TCP_FASTOPEN_CONNECT), OUT,
    ),
    "connected by MPTCP": (multipath_connected, OUT),
    "connected by MPTCP to TCP": (functools.partial(multipath_connected, protocol=0), OUT),
    "restored": (restored, OUT),
}  # fmt: skip


@pytest.fixture
def around(namespace):
    """A network namespace with MPTCP, and fast open on both ends without cookies."""
    set_sysctl(namespace, "tcp_fastopen", "0x607")
    set_mptcp = "echo 1 > /proc/sys/net/mptcp/enabled"
    subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", set_mptcp], check=True)
    return namespace


@pytest.mark.parametrize("when", ["new", "open"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", [IN, OUT])
def test_way_of_coming_to_be_has_its_direction(cgroup, peer, policy, around, direction, mode, when):
    """A policy for one direction gives its options to all connections of that and to no other, and
    answers setsockopt(2) by its mode on them alone; of MPTCP the subflow has them."""
    keepalive, key, instead = MODES[mode]
    put = functools.partial(policy, keepalive, key, f"direction: {direction}")
    if when == "new":
        put()
    inside, outside = peer(cgroup, around), peer(None, around)
    sockets = {name: make(inside, outside) for name, (make, _) in WAYS.items()}
    if when == "open":
        put()
    meant = {name: each == direction for name, (_, each) in WAYS.items()}
    multipath = {"accepted by MPTCP", "connected by MPTCP", "connected by MPTCP to TCP"}
    asks = _multipath_takes_idle()
    for name, number in sockets.items():
        idle = POLICY_S if meant[name] else UNTOUCHED_S
        if name in multipath:
            _wait_until_armed(around, inside, number, POLICY_S if meant[name] else None)
        else:
            assert inside.option(number, "idle") == idle, name
        if name not in multipath or asks:
            inside.set_option(number, "idle", ASKED_S)
    for name, number in sockets.items():
        if name in multipath and not asks:
            continue
        idle = instead if meant[name] else ASKED_S
        if name not in multipath:
            assert inside.option(number, "idle") == idle, name
        elif meant[name]:
            _wait_until_armed(around, inside, number, idle)
        else:
            assert inside.option(number, "idle") == idle, name


def _multipath_takes_idle():
    """Whether TCP_KEEPIDLE is an option of MPTCP sockets here: of Linux 5.15's it is not."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as asked:
        try:
            asked.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ASKED_S)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
            return False
    return True


def _wait_until_armed(namespace, owner, number, seconds):
    """Until the keepalive timer of the only subflow is one that was set to so many seconds; for
    None that none runs. Another timer may run before. getsockopt(2) tells nothing of subflows."""
    ports = owner.local_port(number), owner.remote_port(number)

    def is_so():
        (flow,) = established(namespace, *ports)
        left_s = flow["idiag_expires"] / 1000
        if flow["idiag_timer"] == KEEPALIVE_TIMER:
            return seconds is not None and 0 <= seconds - left_s < MOMENTS_S
        return seconds is None and flow["idiag_timer"] == 0

    wait_until(is_so, f"a timer of {seconds} s")
