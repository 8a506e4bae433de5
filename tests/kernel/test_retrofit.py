"""Connections that were open before the policy."""

import json
import resource

import pytest
from harness import UNTOUCHED

IDLE_61 = {"keepalive": 1, "idle": 61, "interval": 11, "probes": 5, "user_timeout": 0}
ATTACH = ("--idle", 61, "--interval", 11, "--probes", 5)


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
    assert "5000 open sockets changed" in text


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


def test_attach_covers_open_listeners(cgroup, peer, kabpfctl):
    """A listener that was open before has the options, and what it accepts from then on."""
    server, client = peer(cgroup), peer()
    listener, address = server.listener()
    kabpfctl("attach", "--cgroup", cgroup, *ATTACH)
    assert server.options(listener) == IDLE_61
    client.connection(address)
    assert server.options(server.accept(listener)) == IDLE_61


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
