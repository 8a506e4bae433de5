"""Which connections a policy means: by direction, peer and loopback; and what differs by socket."""

import contextlib
import functools
import json
import socket
import time

import pyroute2
import pytest
from harness import PATIENCE, UNTOUCHED

IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}
HERE, THERE = ("10.77.0.1", "2001:db8:77::1"), ("10.77.0.2", "2001:db8:77::2")

ACCEPTED = ("accepted", "accepted, listener closed", "accepted on an automatic port")
CONNECTED = (
    "connected", "connected from a port", "connected from an address", "connected from port 0",
)  # fmt: skip

WAYS = pytest.mark.parametrize("way", ["new", "open"])


@pytest.fixture
def linked(make_namespace):
    """Two network namespaces with a cable between them, of which the ends are HERE and THERE."""
    names = [make_namespace(), make_namespace()]
    with contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(pyroute2.NetNS(name)) for name in names)
        here.link("add", ifname="cable", kind="veth", peer={"ifname": "end"})
        here.link("set", index=here.link_lookup(ifname="end")[0], net_ns_fd=names[1])
        for inside, name, (v4, v6) in ((here, "cable", HERE), (there, "end", THERE)):
            (index,) = inside.link_lookup(ifname=name)
            inside.addr("add", index=index, address=v4, prefixlen=24)
            # Without duplicate address detection, which takes seconds.
            inside.addr("add", index=index, address=v6, prefixlen=64, flags=0x02)
            inside.link("set", index=index, state="up")
    return names


@pytest.mark.loaders(way="open")
@WAYS
@pytest.mark.parametrize("direction", ["in", "out", "both"])
def test_direction(cgroup, peer, policy, direction, way):
    """A policy for one direction covers connections of that one alone, new or open, whatever their
    port, also those whose listener is closed."""
    put = functools.partial(policy, "{idle: 61}", f"direction: {direction}")
    if way == "new":
        put()
    inside, sockets = _sockets_by_direction(cgroup, peer)
    if way == "open":
        put()
    found = {name: inside.options(number)["idle"] for name, number in sockets.items()}
    accepted, connected = (61 if direction in (one, "both") else 7200 for one in ("in", "out"))
    assert found == dict.fromkeys(ACCEPTED, accepted) | dict.fromkeys(CONNECTED, connected)


@WAYS
@pytest.mark.parametrize("direction", ["in", "out"])
def test_direction_is_known_to_setsockopt(cgroup, peer, policy, direction, way):
    """`enforce` for one direction does not ignore the applications of the other."""
    put = functools.partial(policy, "{idle: 61}", "mode: enforce", f"direction: {direction}")
    if way == "new":
        put()
    inside, sockets = _sockets_by_direction(cgroup, peer)
    if way == "open":
        put()
    for number in sockets.values():
        inside.set_option(number, "idle", 15)
    found = {name: inside.options(number)["idle"] for name, number in sockets.items()}
    accepted, connected = (61 if direction == one else 15 for one in ("in", "out"))
    assert found == dict.fromkeys(ACCEPTED, accepted) | dict.fromkeys(CONNECTED, connected)


DESTINATIONS = """
destinations:
- {to: 10.77.0.0/16, idle: 70}
- {to: 10.77.0.0/24, idle: 71}
- {to: 10.77.0.2, ports: [7001, 7005], idle: 72}
- {to: 10.77.0.2, ports: [7002], keepalive: off}
- {to: 0.0.0.0/0, ports: [7003, 7004], idle: 74}
- {to: "2001:db8:77::/48", idle: 75}
- {to: "2001:db8:77::2", ports: [7001], idle: 76}
"""


@pytest.mark.loaders(way="open")
@WAYS
def test_destination(cgroup, peer, policy, linked, way):
    """The longest prefix around the peer decides, then its port; a v4-mapped address is an IPv4
    address; what a destination leaves out is the policy's."""
    client, server, local = peer(cgroup, linked[0]), peer(None, linked[1]), peer(None, linked[0])
    for port in (7000, 7001, 7002, 7003):
        server.listen(server.open_socket(socket.AF_INET6), ["::", port])
    local.listen(local.open_socket(socket.AF_INET), ["127.0.0.1", 7000])
    local.listen(local.open_socket(socket.AF_INET), ["127.0.0.1", 7004])
    own = IDLE_61 | {"interval": 11}
    expected = {
        (THERE[0], 7000): own | {"idle": 71},
        (THERE[0], 7001): own | {"idle": 72},
        (THERE[0], 7002): UNTOUCHED,
        (THERE[0], 7003): own | {"idle": 71},
        (f"::ffff:{THERE[0]}", 7001): own | {"idle": 72},
        (f"::ffff:{THERE[0]}", 7002): UNTOUCHED,
        (THERE[1], 7000): own | {"idle": 75},
        (THERE[1], 7001): own | {"idle": 76},
        ("127.0.0.1", 7000): own,
        ("127.0.0.1", 7004): own | {"idle": 74},
    }
    put = functools.partial(policy, "{idle: 61, interval: 11}", DESTINATIONS)
    if way == "new":
        put()
    numbers = {to: client.connection(to, _family(to[0])) for to in expected}
    if way == "open":
        put()
    found = {to: client.options(number) for to, number in numbers.items()}
    assert found == expected


@pytest.mark.loaders(way="open")
@WAYS
def test_destination_of_an_accepted_connection(cgroup, peer, policy, linked, way):
    """There it is the peer's address, and the port that the peer connected to."""
    client, server = peer(None, linked[1]), peer(cgroup, linked[0])
    put = functools.partial(
        policy,
        "{idle: 61}",
        "destinations: [{to: 10.77.0.2, ports: [7001], idle: 71}, {to: 10.77.0.1, idle: 72}]",
    )
    if way == "new":
        put()
    numbers = []
    for port in (7000, 7001):
        listener = server.open_socket(socket.AF_INET6)
        server.listen(listener, ["::", port])
        client.connection([HERE[0], port])
        numbers.append(server.accept(listener))
    if way == "open":
        put()
    assert [server.options(number)["idle"] for number in numbers] == [61, 71]


def test_changed_destination_moves_what_it_had_set(cgroup, peer, policy, linked):
    """Other options of a destination reach the open connections that have theirs from it, and leave
    what the application chose."""
    client, server = peer(cgroup, linked[0]), peer(None, linked[1])
    server.listen(server.open_socket(socket.AF_INET6), ["::", 7000])
    policy("{idle: 61}", "destinations: [{to: 10.77.0.0/24, idle: 71}]")
    numbers = [client.connection([THERE[0], 7000]) for _ in range(2)]
    client.set_option(numbers[1], "idle", 15)
    for destinations, idle in (
        ("destinations: [{to: 10.77.0.0/24, idle: 72}]", 72),
        ("destinations: [{to: 10.77.0.0/24, idle: 73}, {to: 10.77.0.2, idle: 74}]", 74),
        ("", 61),
        ("destinations: [{to: 10.77.0.2, keepalive: off}]", 61),
        ("destinations: [{to: 10.77.0.2, idle: 75}]", 75),
    ):
        policy("{idle: 61}", destinations)
        assert [client.options(number)["idle"] for number in numbers] == [idle, 15]


@pytest.mark.loaders(way="open")
@WAYS
def test_loopback_is_left_alone(cgroup, peer, policy, linked, way):
    """With `loopback: false` connections to a loopback address or to the machine's own are not
    meant."""
    client, server = peer(cgroup, linked[0]), peer(None, linked[1])
    local = peer(None, linked[0])
    for one in (server, local):
        one.listen(one.open_socket(socket.AF_INET6), ["::", 7000])
    put = functools.partial(policy, "{idle: 61}", "loopback: false")
    mapped = [f"::ffff:{host}" for host in ("127.0.0.1", HERE[0], THERE[0])]
    own = ("127.0.0.1", "127.7.7.7", "::1", *HERE, *mapped[:2])
    if way == "new":
        put()
    numbers = {
        host: client.connection([host, 7000], _family(host)) for host in (*own, *THERE, mapped[2])
    }
    if way == "open":
        put()
    found = {host: client.options(number) for host, number in numbers.items()}
    assert found == dict.fromkeys(numbers, UNTOUCHED) | dict.fromkeys((*THERE, mapped[2]), IDLE_61)


@pytest.fixture
def black_hole(linked):
    """A namespace, and an address beyond it that takes packets and answers none."""
    with pyroute2.NetNS(linked[0]) as inside:
        (index,) = inside.link_lookup(ifname="cable")
        inside.neigh("add", dst="10.77.0.99", lladdr="02:00:00:00:00:99", ifindex=index)
    return linked[0], ["10.77.0.99", 7000]


@pytest.mark.loaders
def test_syn_retries_bound_the_time_to_connect(cgroup, peer, policy, black_hole):
    """connect() to a peer that does not answer gives up by then."""
    namespace, address = black_hole
    policy("{idle: 61, syn_retries: 1}")
    client = peer(cgroup, namespace)
    begin = time.monotonic()
    assert client.connect_error(client.open_socket(socket.AF_INET), address) == "ETIMEDOUT"
    # 1 s to the second SYN, and 2 s; with the default of 6 it were 127 s.
    assert 2.5 < time.monotonic() - begin < 6 * PATIENCE


@pytest.mark.loaders
def test_syn_retries_are_set_before_the_syn(cgroup, peer, policy, black_hole):
    """They are where the policy, its destination and its direction mean the connection; the
    application's own stay under `fill`."""
    namespace, address = black_hole
    client = peer(cgroup, namespace)

    def retries(keepalive, *others, own=None):
        policy(keepalive, *others)
        number = client.open_socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        where = (socket.SOL_TCP, socket.TCP_SYNCNT)
        if own:
            client.set_bytes(number, *where, own.to_bytes(4, "little").hex())
        assert client.connect_error(number, address) == "EINPROGRESS"
        return int.from_bytes(bytes.fromhex(client.get_bytes(number, *where, 4)), "little")

    assert retries("{idle: 61}") == 6  # tcp_syn_retries
    assert retries("{syn_retries: 2}") == 2
    assert retries("{syn_retries: 2}", own=3) == 3
    assert retries("{syn_retries: 2}", "mode: override", own=3) == 2
    assert retries("{syn_retries: 2}", "direction: in") == 6
    assert retries("{syn_retries: 2}", "direction: out") == 2
    assert retries("{syn_retries: 2}", "destinations: [{to: 10.77.0.99, syn_retries: 4}]") == 4
    assert retries("on", "destinations: [{to: 10.77.0.99, syn_retries: 4}]") == 4
    assert retries("{syn_retries: 2}", "destinations: [{to: 10.77.0.99, keepalive: off}]") == 6


def test_connect_timeout_bounds_the_time_to_connect(cgroup, peer, policy, black_hole):
    """connect() to a peer that does not answer gives up by then, and the next one on the same
    socket, too; the policy's user timeout bounds no connect()."""
    namespace, address = black_hole
    policy("{connect_timeout: 2500ms, user_timeout: 1s}")
    client = peer(cgroup, namespace)
    number = client.open_socket(socket.AF_INET)
    for _ in range(2):
        begin = time.monotonic()
        assert client.connect_error(number, address) == "ETIMEDOUT"
        assert 2.4 < time.monotonic() - begin < 2.9 * PATIENCE


def _connecting(client, address, own=None):
    """A socket whose SYN nobody has answered yet."""
    number = client.open_socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    if own:
        client.set_option(number, "user_timeout", own)
    assert client.connect_error(number, address) == "EINPROGRESS"
    return number


def test_connect_timeout_is_the_user_timeout_while_connecting(cgroup, peer, policy, black_hole):
    """It is there where the policy, its destination and its direction mean the connection; the
    application's own user timeout stays under `fill`."""
    namespace, address = black_hole
    client = peer(cgroup, namespace)

    def timeout(keepalive, *others, own=None):
        policy(keepalive, *others)
        return client.options(_connecting(client, address, own))["user_timeout"]

    ten, there = "{connect_timeout: 10s, user_timeout: 90s}", "to: 10.77.0.99"
    assert timeout("{user_timeout: 90s}") == 0
    assert timeout(ten) == 10_000
    assert timeout(ten, own=7000) == 7000
    assert timeout(ten, "mode: override", own=7000) == 10_000
    assert timeout(ten, "direction: in") == 0
    assert timeout(ten, "direction: out") == 10_000
    assert timeout(ten, f"destinations: [{{{there}, connect_timeout: 20s}}]") == 20_000
    assert timeout("on", f"destinations: [{{{there}, connect_timeout: 20s}}]") == 20_000
    assert timeout(ten, f"destinations: [{{{there}, connect_timeout: off}}]") == 0
    assert timeout(ten, f"destinations: [{{{there}, keepalive: off}}]") == 0


@pytest.fixture
def answer(linked, black_hole, peer):
    """Has a peer answer at the address that took packets without a word; the SYN comes again after
    a second."""
    server = peer(None, linked[1])
    listener = server.open_socket(socket.AF_INET)
    server.listen(listener, ["0.0.0.0", 7000])

    def begin():
        with pyroute2.NetNS(linked[1]) as there:
            (index,) = there.link_lookup(ifname="end")
            there.addr("add", index=index, address="10.77.0.99", prefixlen=32)
            hardware = there.get_links(index)[0].get_attr("IFLA_ADDRESS")
        with pyroute2.NetNS(linked[0]) as here:
            (index,) = here.link_lookup(ifname="cable")
            here.neigh("replace", dst="10.77.0.99", lladdr=hardware, ifindex=index)

    return begin


@pytest.mark.parametrize(
    ("options", "mode", "own", "expected"),
    [
        ("user_timeout: 90s", "fill", None, 90_000),
        ("user_timeout: 90s", "fill", 7000, 7000),
        ("user_timeout: 90s", "override", 7000, 90_000),
        ("user_timeout: 1m..2m", "fill", None, 120_000),
        ("user_timeout: 1m..2m", "override", 7000, 60_000),
        ("idle: 61", "fill", None, 0),
        ("idle: 61", "fill", 7000, 7000),
        ("idle: 61", "override", 7000, 7000),
        ("idle: 61", "override", 10_000, 10_000),
    ],
)
def test_connect_timeout_ends_with_the_connect(
    cgroup, peer, policy, black_hole, answer, options, mode, own, expected
):
    """When the connection is established the user timeout is the policy's, or what the application
    had."""
    namespace, address = black_hole
    policy(f"{{connect_timeout: 10s, {options}}}", f"mode: {mode}")
    client = peer(cgroup, namespace)
    number = _connecting(client, address, own)
    answer()
    client.connect(number, address)
    assert client.options(number)["user_timeout"] == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [("policy", 90_000), ("none", 0), ("application", 5000), ("application, none", 5000)],
)
def test_what_changes_while_connecting_counts(
    cgroup, peer, policy, kabpfctl, black_hole, answer, change, expected
):
    """A policy that changes, or goes, and what the application sets before the connection is
    established: nothing of the connect timeout stays."""
    namespace, address = black_hole
    policy("{connect_timeout: 10s}")
    client = peer(cgroup, namespace)
    number = _connecting(client, address)
    if "application" in change:
        client.set_option(number, "user_timeout", 5000)
    if "policy" in change:
        policy("{user_timeout: 90s}")
    elif "none" in change:
        policy("off")
    answer()
    client.connect(number, address)
    assert client.options(number)["user_timeout"] == expected


def test_update_leaves_what_is_connecting(cgroup, peer, policy, kabpfctl, black_hole, answer):
    """A policy that comes while connect() is under way does not end it; its options are there when
    the connection is established. `sockets` says whose the connect timeout is."""
    namespace, address = black_hole
    client = peer(cgroup, namespace)
    number = _connecting(client, address)
    policy("{idle: 61, connect_timeout: 5s, user_timeout: 1s}")
    assert client.options(number) == UNTOUCHED
    bounded = _connecting(client, address)
    shown = json.loads(kabpfctl("sockets", "--cgroup", cgroup, "--json").stdout)["sockets"]
    assert {
        one["local"]["port"]: (one["user_timeout_ms"], one["set_by"]["user_timeout_ms"])
        for one in shown
        if one["state"] == "syn-sent"
    } == {
        client.local_port(number): (0, "system"),
        client.local_port(bounded): (5000, "policy"),
    }
    answer()
    client.connect(number, address)
    assert client.options(number) == IDLE_61 | {"user_timeout": 1000}


def test_jitter_spreads_idle(cgroup, peer, policy, kabpfctl):
    """Idle of new connections, accepted ones too, is spread below its value, stays what it is when
    the policy is applied again, and is known for kabpf's when the policy changes."""
    client, server = peer(cgroup), peer(cgroup)
    policy("{idle: 100, jitter: 20%}")
    listener, address = server.listener()
    client.tell("connect_many", address, 500)
    server.accept_many(listener, 500)
    client.answer()

    def idle():
        return [
            [one.options(number)["idle"] for number in range(first, first + 500)]
            for one, first in ((client, 0), (server, 1))
        ]

    before = idle()
    for one in before:
        assert {min(one), max(one)} == {80, 100}
        assert len(set(one)) == 21
    kabpfctl("apply")
    assert idle() == before
    policy("{idle: 300, jitter: 10%}")
    for one in idle():
        assert min(one) >= 270
        assert max(one) <= 300
        assert len(set(one)) > 20


def _sockets_by_direction(cgroup, peer):
    """A peer in the cgroup, and its sockets by how they came to be."""
    inside, outside = peer(cgroup), peer()
    listener, address = inside.listener()
    closed, its_address = inside.listener()
    automatic = inside.open_socket(socket.AF_INET)
    its_port = inside.listen_unbound(automatic)
    listeners = (listener, closed, automatic)
    addresses = (address, its_address, ["127.0.0.1", its_port])
    sockets = {}
    for name, number, to in zip(ACCEPTED, listeners, addresses, strict=True):
        outside.connection(to)
        sockets[name] = inside.accept(number)
    inside.close(closed)
    _, outer = outside.listener()
    own = (None, ["127.0.0.1", _free_port()], ["127.0.0.1", 0], ["0.0.0.0", 0])
    for name, bound in zip(CONNECTED, own, strict=True):
        sockets[name] = inside.open_socket(socket.AF_INET)
        if bound:
            inside.bind(sockets[name], bound)
        inside.connect(sockets[name], outer)
    return inside, sockets


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET
