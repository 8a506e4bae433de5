"""Connections that were open before the policy."""

import json
import resource
import socket
import struct
from pathlib import Path

import pytest
from harness import DROP_INS, UNTOUCHED

IDLE_61 = {"keepalive": 1, "idle": 61, "interval": 11, "probes": 5, "user_timeout": 0}
ATTACH = ("--idle", 61, "--interval", 11, "--probes", 5)
TCP_ULP, SOL_TLS, TLS_TX = 31, 282, 1


@pytest.fixture
def many_descriptors():
    """Room for thousands of sockets in the peers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 20_000), max(before[1], 20_000)))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _pairs(server, client, count):
    """Opens connections between two peers."""
    listener, address = server.listener()
    client.tell("connect_many", address, count)
    server.accept_many(listener, count)
    client.answer()


def _seen(options):
    return json.dumps(options, sort_keys=True)


@pytest.mark.core
def test_attach_covers_exactly_the_open_connections_of_the_cgroup(
    cgroup, other_cgroup, peer, kabpfctl, many_descriptors
):
    """Of 10,000 open connections the half in the cgroup is changed, and no other socket."""
    server, inside, outside = peer(other_cgroup), peer(cgroup), peer(other_cgroup)
    _pairs(server, inside, 5000)
    _pairs(server, outside, 5000)
    text = kabpfctl("attach", "--cgroup", cgroup, *ATTACH).stdout
    assert inside.all_options(0) == {_seen(IDLE_61): 5000}
    assert outside.all_options(0) == {_seen(UNTOUCHED): 5000}
    assert server.all_options(0) == {_seen(UNTOUCHED): 10_002}
    assert "5000 open sockets updated" in text


@pytest.mark.core
def test_attach_reaches_other_network_namespaces(
    cgroup, other_cgroup, peer, kabpfctl, make_namespace, many_descriptors
):
    """Open connections of the cgroup are covered in every network namespace, and those of other
    cgroups in the same namespaces are not."""
    peers = []
    for name in (make_namespace(), make_namespace(), None):
        server, client = peer(other_cgroup, name), peer(cgroup, name)
        _pairs(server, client, 1000)
        peers.append((server, client))
    # Its sockets stay in a namespace and a cgroup that no process of the other is in.
    (other_cgroup / "cgroup.procs").write_text(str(peers[0][1].process.pid))
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    for server, client in peers:
        assert client.all_options(0) == {_seen(IDLE_61): 1000}
        assert server.all_options(0) == {_seen(UNTOUCHED): 1001}


def test_socket_in_a_namespace_that_its_process_has_left_is_covered(
    cgroup, peer, kabpfctl, namespace
):
    """A process that enters a network namespace, opens a connection and goes back is covered."""
    server, client = peer(None, namespace), peer(cgroup)
    _, address = server.listener()
    number = client.connection_in(f"/run/netns/{namespace}", address)
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    assert client.options(number) == IDLE_61


@pytest.mark.core
def test_attach_covers_open_listeners(cgroup, peer, kabpfctl):
    """A listener that was open before has the options, and what it accepts from then on."""
    server, client = peer(cgroup), peer()
    listener, address = server.listener()
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    assert server.options(listener) == IDLE_61
    client.connection(address)
    assert server.options(server.accept(listener)) == IDLE_61


@pytest.mark.core
def test_changed_policy_moves_what_it_had_set(cgroup, peer, kabpfctl):
    """Other options reach the sockets that kabpf had set, and leave what the application chose."""
    server, client = peer(), peer(cgroup)
    _, address = server.listener()
    ours, theirs = client.connection(address), client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    client.set_option(theirs, "idle", 15)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62, "--interval", 12, "--probes", 6)
    moved = {"keepalive": 1, "idle": 62, "interval": 12, "probes": 6, "user_timeout": 0}
    assert client.options(ours) == moved
    assert client.options(theirs) == moved | {"idle": 15}


def test_policy_that_comes_back_moves_what_it_had_set(cgroup, peer, kabpfctl):
    """Between detach and attach sockets keep their options, and are still known as kabpf's."""
    server, client = peer(), peer(cgroup)
    _, address = server.listener()
    number = client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    kabpfctl("detach", "--cgroup", cgroup)
    assert client.options(number) == IDLE_61
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62, "--interval", 12, "--probes", 6)
    assert client.options(number)["idle"] == 62


@pytest.mark.core
def test_option_that_the_application_set_is_kept(cgroup, peer, kabpfctl):
    """On open connections, too, the application's own values stay."""
    server, client = peer(), peer(cgroup)
    _, address = server.listener()
    number = client.connection(address)
    client.set_option(number, "keepalive", 1)
    client.set_option(number, "idle", 15)
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    assert client.options(number) == IDLE_61 | {"idle": 15}


def test_moved_to_keepalive_off_is_left_as_it_is(cgroup, peer, kabpfctl, write_policy):
    """A policy `keepalive: off` changes no open socket, and covers no new one."""
    server, client = peer(), peer(cgroup)
    _, address = server.listener()
    number = client.connection(address)
    file = write_policy(
        "a.yaml",
        f'select: [{{cgroup: "/{"/".join(cgroup.parts[-2:])}"}}]\nkeepalive: {{idle: 61}}\n',
    )
    kabpfctl("apply")
    assert client.options(number) == UNTOUCHED | {"keepalive": 1, "idle": 61}
    file.write_text(file.read_text().replace("{idle: 61}", "off"))
    kabpfctl("apply")
    assert client.options(number) == UNTOUCHED | {"keepalive": 1, "idle": 61}
    assert client.options(client.connection(address)) == UNTOUCHED


def test_keepalive_that_was_turned_off_stays_off(connection, policy):
    """Other numbers reach a socket whose application turned keepalive off; it stays off, over one
    change after the other."""
    client, connect = connection
    policy("{idle: 61}")
    number = connect()
    client.set_option(number, "keepalive", 0)
    for idle in (62, 63, 64):
        policy(f"{{idle: {idle}}}")
        assert client.options(number) == UNTOUCHED | {"idle": idle}


def test_keepalive_that_was_turned_off_stays_off_when_the_policy_comes_back(
    connection, policy, kabpfctl
):
    """The same policy, unloaded and put back, turns nothing on that the application turned off."""
    client, connect = connection
    policy("{idle: 61}")
    number = connect()
    client.set_option(number, "keepalive", 0)
    policy("off")
    policy("{idle: 61}")
    assert client.keepalive(number) == 0
    kabpfctl("detach", "--all")
    policy("{idle: 61}")
    assert client.keepalive(number) == 0


def test_changes_in_a_row_are_followed(connection, policy):
    """Through changes, an interval without policy and a return, every socket of kabpf's has the
    last values, whenever it was opened."""
    client, connect = connection
    numbers = []
    for keepalive in ("{idle: 61}", "{idle: 62}", "off", "{idle: 63}", "{idle: 61}", "{idle: 64}"):
        policy(keepalive)
        numbers.append(connect())
    assert [client.options(number)["idle"] for number in numbers] == [64] * len(numbers)


@pytest.mark.core
def test_existing_false_leaves_open_connections(connection, policy):
    """A change with `existing: false` is for new connections; the next one without still knows the
    old values for kabpf's."""
    client, connect = connection
    before = connect()
    policy("{idle: 61}", "existing: false")
    first = connect()
    policy("{idle: 62}", "existing: false")
    second = connect()
    assert [client.options(each)["idle"] for each in (before, first, second)] == [7200, 61, 62]
    client.set_option(second, "idle", 15)
    policy("{idle: 63}")
    assert [client.options(each)["idle"] for each in (before, first, second)] == [63, 63, 15]


def test_new_only_leaves_open_connections(cgroup, connection, kabpfctl):
    """So does `attach --new-only`."""
    client, connect = connection
    before = connect()
    kabpfctl("attach", "--cgroup", cgroup, "--new-only", *ATTACH)
    after = connect()
    assert client.options(before) == UNTOUCHED
    assert client.options(after) == IDLE_61
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62)
    assert client.options(before) == UNTOUCHED | {"keepalive": 1, "idle": 62}
    assert client.options(after) == IDLE_61 | {"idle": 62}


def test_values_are_known_over_a_stop_of_the_daemon(connection, policy, write_policy, kabpfd):
    """A policy that was changed while kabpfd was stopped moves what kabpf had set before."""
    client, connect = connection
    policy("{idle: 61, user_timeout: 90s}")
    daemon = kabpfd()
    ours, theirs, off = connect(), connect(), connect()
    client.set_option(theirs, "idle", 15)
    client.set_option(off, "keepalive", 0)
    assert daemon.stop() == 0
    file = DROP_INS / "a.yaml"
    file.write_text(file.read_text().replace("61", "62"))
    kabpfd()
    moved = UNTOUCHED | {"keepalive": 1, "idle": 62, "user_timeout": 90_000}
    assert client.options(ours) == moved
    assert client.options(theirs) == moved | {"idle": 15}
    assert client.options(off) == moved | {"keepalive": 0}


def test_change_of_mode_and_back(connection, policy):
    """Under `enforce` open connections have the policy's values, the application's own among them;
    back under `fill` they are kabpf's, and the application may set its own again."""
    client, connect = connection
    policy("{idle: 61}")
    number = connect()
    client.set_option(number, "idle", 15)
    policy("{idle: 61}", "mode: enforce")
    assert client.options(number)["idle"] == 61
    policy("{idle: 62}")
    assert client.options(number)["idle"] == 62
    client.set_option(number, "idle", 16)
    policy("{idle: 63}")
    assert client.options(number)["idle"] == 16


def test_option_that_was_dropped_and_given_again(connection, policy):
    """An option that the policy gives no longer stays on the socket, known for kabpf's."""
    client, connect = connection
    policy("{idle: 61, interval: 11}")
    number = connect()
    policy("{idle: 62}")
    assert client.options(number)["interval"] == 11
    policy("{idle: 62, interval: 12}")
    assert client.options(number)["interval"] == 12


@pytest.mark.core
def test_range_in_place_of_a_value(connection, policy):
    """Under a range open connections keep their application's value inside it, are brought to the
    nearer bound from outside, and have the upper bound where the value was kabpf's."""
    client, connect = connection
    policy("{idle: 61}")
    numbers = [connect() for _ in range(4)]
    for number, idle in zip(numbers, (15, 100, 7200), strict=False):
        client.set_option(number, "idle", idle)
    policy("{idle: 30..300}")
    assert [client.options(number)["idle"] for number in numbers] == [30, 100, 300, 300]


def test_value_that_was_clamped_is_kept_inside_the_next_range(connection, policy):
    """What was brought to the lower bound is still the application's; the upper bound is kabpf's,
    because unset options have it."""
    client, connect = connection
    policy("{idle: 30..300}")
    numbers = [connect() for _ in range(3)]
    for number, idle in zip(numbers, (15, 7200), strict=False):
        client.set_option(number, "idle", idle)
    assert [client.options(number)["idle"] for number in numbers] == [30, 300, 300]
    policy("{idle: 40..400}")
    assert [client.options(number)["idle"] for number in numbers] == [40, 400, 400]
    policy("{idle: 20..200}")
    assert [client.options(number)["idle"] for number in numbers] == [40, 200, 200]


@pytest.mark.parametrize("other", ["direction: out", "destinations: [{to: 10.0.0.0/8, idle: 9}]"])
def test_value_chosen_before_the_connection_is_no_former_policys(connection, policy, other, peer):
    """An application's value stays its own, though it is what a former policy gave."""
    client, _ = connection
    _, address = peer().listener()
    policy("{idle: 61}", other)
    policy("{idle: 62}", other)
    number = client.open_socket(socket.AF_INET)
    client.set_option(number, "idle", 61)
    client.connect(number, address)
    assert client.options(number)["idle"] == 61


def test_connection_that_nobody_accepted_yet_is_covered(cgroup, peer, kabpfctl):
    """What waits in the queue of a listener is an open connection of its cgroup."""
    server, client = peer(cgroup), peer()
    listener, address = server.listener()
    client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    assert server.options(server.accept(listener)) == IDLE_61


def test_listener_moves_with_the_policy(cgroup, peer, policy):
    """A listener of kabpf's has other values after a change, and what it accepts has them."""
    server, client = peer(cgroup), peer()
    policy("{idle: 61}")
    listener, address = server.listener()
    policy("{idle: 62}")
    assert server.options(listener)["idle"] == 62
    client.connection(address)
    assert server.options(server.accept(listener))["idle"] == 62


def test_change_reaches_other_network_namespaces(cgroup, peer, policy, make_namespace):
    """A policy that changes moves kabpf's sockets in every network namespace."""
    policy("{idle: 61}")
    clients = []
    for name in (make_namespace(), make_namespace()):
        _, address = peer(None, name).listener()
        client = peer(cgroup, name)
        clients.append((client, client.connection(address)))
    policy("{idle: 62}")
    assert [client.options(number)["idle"] for client, number in clients] == [62, 62]


def test_open_tls_connection_is_covered(cgroup, peer, kabpfctl):
    """A connection whose encryption the kernel does is covered like any other."""
    if "tls" not in Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text().split():
        pytest.skip("this kernel has no TLS of its own (CONFIG_TLS)")
    client = peer(cgroup)
    _, address = peer().listener()
    number = client.connection(address)
    assert client.set_bytes(number, socket.SOL_TCP, TCP_ULP, b"tls".hex()) == ""
    # struct tls12_crypto_info_aes_gcm_128 of linux/tls.h: TLS 1.2, and a key of zeros.
    key = struct.pack("=HH", 0x303, 51) + bytes(36)
    assert client.set_bytes(number, SOL_TLS, TLS_TX, key.hex()) == ""
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    assert client.options(number) == IDLE_61
