"""Who turned keepalive off: calls that undo a policy are told and counted while somebody listens or
a policy has calls watched, and nothing is attached for it at any other time."""

import json
import signal
import socket
import subprocess

import pytest
from harness import cgroup_root, multipath_connection, path_of, wait_until
from watcher import Watcher, require_perf_events

from kabpf.kernel.dataplane import opened_directory
from kabpf.kernel.libbpf import links

OPTIONS = "{idle: 61s, interval: 11s, probes: 5}"
OFF = {"option": "keepalive", "requested": False}


@pytest.fixture(autouse=True)
def perf_events(request):
    """What monitors listen by."""
    if "watch" in request.fixturenames:
        require_perf_events()


@pytest.fixture
def watch():
    """Starts monitors of this event, or of what the arguments say."""
    watchers = []

    def start(*arguments):
        watchers.append(Watcher(*(arguments or ("--event", "turned-off"))))
        return watchers[-1]

    yield start
    for one in watchers:
        one.end()


@pytest.fixture
def connected(peer):
    """Connects a client in a cgroup; the client and the connection's number."""
    server = peer()
    _, address = server.listener()

    def connect(cgroup):
        client = peer(cgroup)
        return client, client.connection(address)

    return connect


def attached():
    """The programs that see each setsockopt(2) of the machine."""
    with opened_directory(cgroup_root()) as root:
        return links.programs(root, links.CGROUP_SETSOCKOPT)[0]


def counted(kabpfctl):
    """How many calls undid each policy."""
    status = json.loads(kabpfctl("status", "--json").stdout)
    return {one["policy"]: one["counters"]["turned_off"] for one in status["policies"]}


@pytest.mark.core
def test_calls_that_undo_a_policy_are_told(cgroup, policy, watch, connected, kabpfctl):
    """Keepalive turned off, and each number of the policy's replaced: once each, and by whom. What
    changes nothing, what the policy leaves to the application, what the kernel refuses and what the
    application itself had set is nobody's business."""
    policy("{idle: 61s, interval: 11s, user_timeout: 120s}")
    client, number = connected(cgroup)
    watcher = watch()
    steps = [
        ("keepalive", 1, None),
        ("idle", 61, None),
        ("probes", 3, None),
        ("idle", 15, {"option": "idle_s", "requested": 15}),
        ("idle", 20, None),  # its own by then
        ("interval", 75, {"option": "interval_s", "requested": 75}),
        ("user_timeout", 0, {"option": "user_timeout_ms", "requested": 0}),
        ("keepalive", 0, OFF),
        ("keepalive", 0, None),
        ("keepalive", 1, None),
        ("keepalive", 0, OFF),
    ]
    for option, value, _ in steps:
        client.set_option(number, option, value)
    assert client.set_bytes(number, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, "00000000")
    expected = [told for _, _, told in steps if told]
    events = [watcher.next() for _ in expected]
    assert [each["setsockopt"] for each in events] == expected
    assert {(each["event"], each["direction"], each["cgroup"]) for each in events} == {
        ("turned_off", "out", path_of(cgroup))
    }
    assert events[0]["options"]["idle_s"]["value"] == 61  # before the call
    assert all(each["pid"] for each in events)
    assert watcher.next(0.1) is None
    assert counted(kabpfctl) == {"a": len(expected)}


def test_accepted_connection_and_listener_are_told(cgroup, policy, peer, watch):
    """They have their options from the policy, too."""
    policy(OPTIONS)
    server = peer(cgroup)
    listener, address = server.listener()
    peer().connection(address)
    accepted = server.accept(listener)
    watcher = watch()
    server.set_option(accepted, "keepalive", 0)
    server.set_option(listener, "probes", 9)
    events = [watcher.next() for _ in range(2)]
    assert [(each["direction"], each["setsockopt"]) for each in events] == [
        ("in", OFF),
        ("listen", {"option": "probes", "requested": 9}),
    ]


def test_value_with_jitter_is_known(cgroup, policy, watch, connected):
    """An idle that was spread is the policy's on that socket."""
    policy("{idle: 600s, jitter: 50%}")
    client, number = connected(cgroup)
    given = client.option(number, "idle")
    assert given <= 600
    watcher = watch()
    client.set_option(number, "idle", given)
    client.set_option(number, "idle", 601)
    assert watcher.next()["setsockopt"] == {"option": "idle_s", "requested": 601}
    assert watcher.next(0.1) is None


@pytest.mark.parametrize("end", ["connect", "accept"])
def test_multipath_tcp_socket_is_told(cgroup, policy, peer, watch, end):
    """Its subflows have the options, and are set along with it."""
    policy("{idle: 61s}")
    server, client = peer(cgroup if end == "accept" else None), peer(cgroup)
    number, listener, _ = multipath_connection(server, client)
    if end == "accept":
        client, number = server, server.accept(listener)
    watcher = watch()
    client.set_option(number, "keepalive", 0)
    assert watcher.next()["setsockopt"] == OFF
    assert watcher.next(0.1) is None


def test_program_is_attached_only_while_somebody_listens(
    cgroup, policy, watch, connected, kabpfctl, own_objects
):
    """Monitors share one link, so that each call is seen once; a killed one takes nothing from the
    others, and the last one leaves nothing. Monitors of other events attach nothing."""
    policy(OPTIONS)
    client, number = connected(cgroup)
    before, objects = attached(), own_objects()
    watch("--event", "set", "--event", "timed_out")
    assert attached() == before
    client.set_option(number, "keepalive", 0)
    client.set_option(number, "keepalive", 1)
    assert counted(kabpfctl) == {"a": 0}

    one = watch()
    (observer,) = set(attached()) - set(before)
    two, three = watch(), watch("--unit", "*.service")
    assert sorted(attached()) == sorted([*before, observer])
    client.set_option(number, "keepalive", 0)
    assert one.next()["setsockopt"] == two.next()["setsockopt"] == OFF
    one.end()
    client.set_option(number, "idle", 15)
    assert two.next()["setsockopt"]["requested"] == 15
    assert two.next(0.1) is None
    assert counted(kabpfctl) == {"a": 2}
    two.end()
    assert sorted(attached()) == sorted([*before, observer])
    three.end()
    wait_until(lambda: attached() == before, "the end of the link")
    client.set_option(number, "keepalive", 1)
    client.set_option(number, "keepalive", 0)
    assert counted(kabpfctl) == {"a": 2}
    four = watch()
    client.set_option(number, "probes", 7)
    assert four.next()["setsockopt"]["option"] == "probes"
    four.end()
    wait_until(lambda: attached() == before, "the end of the link")
    del objects["link"], (after := own_objects())["link"]
    assert after == objects


def test_link_that_was_taken_away_is_made_anew(cgroup, policy, watch, connected):
    """By whoever detached it, while a monitor had it; the next monitor sees all."""
    policy(OPTIONS)
    client, number = connected(cgroup)
    before = attached()
    watch()
    found = json.loads(subprocess.check_output(["bpftool", "--json", "link"]))
    (observer,) = set(attached()) - set(before)
    (link,) = [each["id"] for each in found if each.get("prog_id") == observer]
    subprocess.run(["bpftool", "link", "detach", "id", str(link)], check=True)
    assert attached() == before
    two = watch()
    client.set_option(number, "keepalive", 0)
    assert two.next()["setsockopt"] == OFF


def test_monitors_go_on_beside_daemons_and_versions(
    cgroup, write_policy, watch, connected, kabpfctl, kabpfd, version
):
    """A daemon that starts again disturbs no monitor; what is loaded anew is listened to within a
    second; and of what another version replaced nothing stays attached."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {OPTIONS}\n")
    daemon = kabpfd()
    client, number = connected(cgroup)
    before, watcher = attached(), watch()
    (old,) = set(attached()) - set(before)
    daemon.stop(signal.SIGKILL)  # by which policies stay active
    again = kabpfd()
    client.set_option(number, "keepalive", 0)
    assert watcher.next()["setsockopt"] == OFF
    assert sorted(attached()) == sorted([*before, old])
    again.stop(signal.SIGKILL)
    kabpfctl("detach", "--all")
    wait_until(lambda: attached() == before, "the end of the old link")
    kabpfctl("apply")
    wait_until(lambda: len(attached()) > len(before), "the monitor")
    assert old not in attached()
    client.set_option(number, "probes", 7)
    assert watcher.next()["setsockopt"]["option"] == "probes"
    version("rebuilt").kabpfctl("apply")  # whose maps this version's monitor can't read
    wait_until(lambda: attached() == before, "the end of the link")


def test_policy_that_enforces_tells_of_others_once(
    cgroup, other_cgroup, write_policy, kabpfctl, watch, connected
):
    """Where calls are watched for a policy, those that undo others are counted without a monitor,
    and with one told once. A call that is ignored undoes nothing, and neither does one within a
    range."""
    write_policy(
        "enforced.yaml",
        f"select: [{{cgroup: {path_of(other_cgroup)}}}]\nkeepalive: {OPTIONS}\nmode: enforce\n",
    )
    write_policy(
        "filled.yaml",
        f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 30s..5m, interval: 11s}}\n",
    )
    kabpfctl("apply")
    client, number = connected(cgroup)
    enforced, enforced_number = connected(other_cgroup)
    client.set_option(number, "interval", 15)
    assert counted(kabpfctl) == {"enforced": 0, "filled": 1}
    watcher = watch("--event", "turned-off", "--event", "ignored")
    client.set_option(number, "idle", 60)
    client.set_option(number, "keepalive", 0)
    enforced.set_option(enforced_number, "keepalive", 0)
    enforced.set_option(enforced_number, "idle", 15)
    events = [watcher.next() for _ in range(3)]
    assert [(each["event"], each["policy"]) for each in events] == [
        ("turned_off", "filled"), ("ignored", "enforced"), ("ignored", "enforced"),
    ]  # fmt: skip
    assert watcher.next(0.1) is None
    assert counted(kabpfctl) == {"enforced": 0, "filled": 2}


def test_policy_that_logs_has_calls_watched(cgroup, policy, connected, kabpfctl):
    """Without a monitor; when it logs no more, they are not."""
    policy(OPTIONS)
    before = attached()
    policy(OPTIONS, "log: sockets")
    assert len(attached()) == len(before) + 1
    client, number = connected(cgroup)
    client.set_option(number, "keepalive", 0)
    assert counted(kabpfctl) == {"a": 1}
    policy(OPTIONS)
    assert attached() == before


def test_socket_before_its_connection_is_not_told(cgroup, other_cgroup, policy, peer, watch):
    """What an application sets before it connects is `kept`, if it stays; and other cgroups have no
    policy to undo."""
    policy(OPTIONS)
    _, address = peer().listener()
    client, stranger = peer(cgroup), peer(other_cgroup)
    watcher = watch("--event", "turned-off", "--event", "kept")
    number = client.open_socket(socket.AF_INET)
    client.set_option(number, "idle", 15)
    client.set_option(number, "keepalive", 0)
    client.connect(number, address)
    stranger.set_option(stranger.connection(address), "keepalive", 0)
    assert watcher.next()["event"] == "kept"
    assert watcher.next(0.1) is None
