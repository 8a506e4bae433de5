"""Who set an option, by `kabpfctl sockets`, over all that may become of a socket and its cgroup."""

import json
import signal

import pytest
from harness import path_of

SYSTEM = dict.fromkeys(("keepalive", "idle_s", "interval_s", "probes", "user_timeout_ms"), "system")
POLICY = SYSTEM | {"keepalive": "policy", "idle_s": "policy", "interval_s": "policy"}
BOTH = "{idle: 61, interval: 11}"


@pytest.fixture
def set_by(kabpfctl):
    """Who set each option of a peer's socket."""

    def find(one, number):
        shown = json.loads(kabpfctl("sockets", "--json").stdout)["sockets"]
        port = one.local_port(number)
        (found,) = (
            each for each in shown if each["local"]["port"] == port and each["peer"]["port"]
        )
        return found["set_by"]

    return find


@pytest.mark.core
def test_set_by_the_policy(connection, policy, set_by):
    """When it is established, or open already; before, by nobody."""
    client, connect = connection
    before = connect()
    policy(BOTH)
    after = connect()
    assert [set_by(client, number) for number in (before, after)] == [POLICY, POLICY]


def test_set_by_nobody_before_the_first_policy(connection, kabpfctl, other_cgroup, set_by):
    """What the kernel gives is the system's, also where an other cgroup has a policy."""
    client, connect = connection
    number = connect()
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 61)
    assert set_by(client, number) == SYSTEM


@pytest.mark.core
def test_set_by_a_former_policy(connection, policy, set_by):
    """What the next policy leaves is the former one's, and all once there is none."""
    client, connect = connection
    before = connect()
    policy(BOTH)
    after = connect()
    policy("{idle: 62}")
    former = POLICY | {"interval_s": "former policy"}
    assert [set_by(client, number) for number in (before, after)] == [former, former]
    policy("off")
    unloaded = {name: "former policy" if who == "policy" else who for name, who in POLICY.items()}
    assert set_by(client, after) == unloaded


@pytest.mark.core
def test_set_by_a_listeners_policy_and_application(peer, cgroup, policy, set_by):
    """What an accepted connection inherits is whose the listener's is."""
    policy(BOTH)
    server = peer(cgroup)
    listener, address = server.listener()
    server.set_option(listener, "interval", 7)
    peer().connection(address)
    accepted = server.accept(listener)
    server.close(listener)
    assert set_by(server, accepted) == POLICY | {"interval_s": "application"}


@pytest.mark.core
def test_set_by_the_application_before_and_after(connection, policy, set_by):
    """Its own values are the application's, whether a policy came before or later."""
    client, connect = connection
    before, after = connect(), None
    client.set_option(before, "keepalive", 1)
    client.set_option(before, "interval", 7)
    policy(BOTH)
    after = connect()
    client.set_option(after, "interval", 7)
    own = POLICY | {"interval_s": "application"}
    assert [set_by(client, number) for number in (before, after)] == [own, own]


def test_keepalive_beside_the_applications_numbers_is_unknown(connection, policy, set_by):
    """Policy and application may both have turned it on; that somebody turned it off is seen."""
    client, connect = connection
    policy(BOTH)
    number = connect()
    client.set_option(number, "idle", 15)
    client.set_option(number, "interval", 3)
    own = SYSTEM | {"idle_s": "application", "interval_s": "application"}
    assert set_by(client, number) == own | {"keepalive": "unknown"}
    client.set_option(number, "keepalive", 0)
    assert set_by(client, number) == own | {"keepalive": "application"}


def test_set_by_keepalive_alone(connection, policy, set_by):
    """A policy without any number counts by what it gives."""
    client, connect = connection
    policy("on")
    number = connect()
    assert set_by(client, number) == SYSTEM | {"keepalive": "policy"}
    policy("off")
    assert set_by(client, number) == SYSTEM | {"keepalive": "former policy"}


@pytest.fixture
def orphan(make_cgroup, peer):
    """A connection of a cgroup, and a function that removes that."""
    gone = make_cgroup("covered/gone")
    client = peer(gone)
    _, address = peer().listener()

    def remove():
        (gone.parent.parent / "cgroup.procs").write_text(str(client.process.pid))
        gone.rmdir()

    return client, client.connection(address), remove


def test_set_by_in_a_removed_cgroup(orphan, policy, set_by):
    """Its socket keeps its policy, and its application's own values; what a later policy leaves is
    the former one's."""
    client, number, remove = orphan
    policy(BOTH)
    client.set_option(number, "probes", 4)
    own = POLICY | {"probes": "application"}
    assert set_by(client, number) == own
    remove()
    assert set_by(client, number) == own
    policy("{idle: 62}")
    assert set_by(client, number) == own | {"interval_s": "former policy"}


def test_set_by_in_a_cgroup_that_was_removed_before_kabpf_was_loaded(
    orphan, policy, set_by, kabpfctl
):
    """Nothing is known of it: what a policy had set is never said to be the application's."""
    client, number, remove = orphan
    policy(BOTH)
    kabpfctl("detach", "--all")
    remove()
    policy(BOTH)
    unknown = {name: "unknown" if who == "policy" else who for name, who in POLICY.items()}
    assert set_by(client, number) == unknown
    assert "unknown (idle, interval, keepalive)" in kabpfctl("sockets", "--wide").stdout


def test_set_by_after_its_process_moved(connection, other_cgroup, policy, set_by):
    """A socket stays with its cgroup's policy, whoever has it."""
    client, connect = connection
    policy(BOTH)
    number = connect()
    (other_cgroup / "cgroup.procs").write_text(str(client.process.pid))
    assert set_by(client, number) == POLICY


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
def test_set_by_after_an_upgrade(connection, cgroup, write_policy, version, other):
    """What equals the policy's is its own; of what a former one gave, another layout knows no more
    than that it does not know."""
    client, connect = connection
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: "
    write_policy("a.yaml", select + BOTH)
    version("this").kabpfctl("apply")
    port = client.local_port(connect())
    write_policy("a.yaml", f"{select}{{idle: 62}}")
    version("this").kabpfctl("apply")
    version(other).kabpfctl("apply")
    shown = json.loads(version(other).kabpfctl("sockets", "--json").stdout)["sockets"]
    (found,) = (one for one in shown if one["local"]["port"] == port)
    former = "former policy" if other == "rebuilt" else "unknown"
    assert found["set_by"] == POLICY | {"interval_s": former}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL])
def test_set_by_after_the_daemon_restarted(connection, policy, kabpfd, set_by, end):
    """What policies gave is known after a stop, which unloads them, a restart and a crash."""
    client, connect = connection
    policy(BOTH)
    daemon = kabpfd()
    number = connect()
    client.set_option(number, "probes", 4)
    daemon.stop(end)
    daemon = kabpfd()
    own = POLICY | {"probes": "application"}
    assert set_by(client, number) == own
    policy("{idle: 62}")
    daemon.stop(end)
    kabpfd()
    assert set_by(client, number) == own | {"interval_s": "former policy"}


def test_set_by_a_destination_over_a_stop(connection, policy, kabpfctl, set_by):
    """What a stop does not keep is unknown, and never the application's."""
    client, connect = connection
    policy("{idle: 61}", "destinations: [{to: 127.0.0.0/8, idle: 33}]")
    number = connect()
    assert set_by(client, number)["idle_s"] == "policy"
    kabpfctl("detach", "--all")
    policy("{interval: 12}")
    assert set_by(client, number)["idle_s"] == "unknown"
