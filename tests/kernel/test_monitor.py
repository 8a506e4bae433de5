"""kabpfctl monitor and `log: sockets`: what is told of sockets, and that nothing waits for it."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime

import pytest
from harness import (
    BIN,
    PATIENCE,
    PINS,
    path_of,
    refuse_perf_events,
    set_sysctl,
    wait_until,
)
from watcher import Watcher, require_perf_events

from kabpf.commands.monitor import LOOK_S
from kabpf.kernel import abi, dataplane
from kabpf.kernel.abi import CPolicy
from kabpf.kernel.libbpf import maps
from kabpf.observe.reports import PROCESSOR_BYTES

SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000  # asm-generic/socket.h, linux/socket.h
# In another PID namespace, as a container's, nobody knows the numbers that are told.
IS_FIRST = os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC  # PROC_PID_INIT_INO in the kernel
NAME = os.path.basename(sys.executable)[:15]  # of a peer's process
OPTIONS = "{idle: 61s, interval: 11s, probes: 5}"
REPORTS = PROCESSOR_BYTES // abi.REPORT_SIZE  # more than a processor's buffer has room for

# What the listener gets and sends from now on is dropped.
DROP = """
table inet kabpf_test {
    chain input { type filter hook input priority 0; tcp dport 9000 drop; }
}
"""


@pytest.fixture(scope="module", autouse=True)
def perf_events():
    """What monitors listen by."""
    require_perf_events()


@pytest.fixture
def watch():
    """Starts monitors."""
    watchers = []

    def start(*arguments):
        watchers.append(Watcher(*arguments))
        return watchers[-1]

    yield start
    for one in watchers:
        one.end()


def process_told(event, peer):
    """The process of an event, which is the peer's where that can be told."""
    assert event["pid"] > 0
    return event["pid"] if IS_FIRST else peer.process.pid


def outcomes(event):
    """Value and outcome of each option, without the user timeout."""
    return {
        name: (option["value"], option["outcome"])
        for name, option in event["options"].items()
        if name != "user_timeout_ms"
    }


SET = {
    "idle_s": (61, "set"),
    "interval_s": (11, "set"),
    "probes": (5, "set"),
    "keepalive": (True, "set"),
}
INHERITED = {name: (value, None) for name, (value, _) in SET.items()}


@pytest.mark.core
def test_outgoing_connection_is_told(cgroup, peer, policy, watch):
    """With its process, its ends, its policy, and each option."""
    policy(OPTIONS)
    _, address = peer().listener()
    client = peer(cgroup)
    watcher = watch()
    began = time.time()
    number = client.connection(address)
    event = watcher.next()
    assert (event["event"], event["direction"], event["policy"]) == ("set", "out", "a")
    assert event["cgroup"] == path_of(cgroup)
    assert (process_told(event, client), event["command"]) == (client.process.pid, NAME)
    assert event["peer"] == {"address": "127.0.0.1", "port": address[1]}
    assert event["local"] == {"address": "127.0.0.1", "port": client.local_port(number)}
    assert outcomes(event) == SET
    assert began < datetime.fromisoformat(event["time"]).timestamp() < time.time()
    assert watcher.next(0.1) is None


@pytest.mark.parametrize(("host", "told"), [("::1", "::1"), ("::ffff:127.0.0.1", "127.0.0.1")])
def test_ends_of_an_ipv6_socket_are_told(cgroup, peer, policy, watch, host, told):
    """An IPv4 address as such; the process is found there, too."""
    policy(OPTIONS)
    _, (_, port) = peer().listener(socket.AF_INET6 if told == host else socket.AF_INET)
    client = peer(cgroup)
    watcher = watch()
    client.connection([host, port], socket.AF_INET6)
    event = watcher.next()
    assert (event["family"], process_told(event, client)) == ("ipv6", client.process.pid)
    assert (event["local"]["address"], event["peer"]) == (told, {"address": told, "port": port})


@pytest.mark.core
def test_listener_and_accepted_connection_are_told(cgroup, peer, policy, watch):
    """The listener is given the options; what it accepts has them already, and nobody knows yet
    which process will take it."""
    policy(OPTIONS)
    server = peer(cgroup)
    watcher = watch()
    _, address = server.listener()
    peer().connection(address)
    listener, accepted = watcher.next(), watcher.next()
    assert (listener["event"], listener["direction"], process_told(listener, server)) == (
        "set", "listen", server.process.pid,
    )  # fmt: skip
    assert outcomes(listener) == SET
    assert (accepted["event"], accepted["direction"], accepted["pid"]) == ("set", "in", None)
    assert accepted["local"]["port"] == address[1]
    assert outcomes(accepted) == INHERITED


def test_connection_is_left_alone(cgroup, peer, policy, watch):
    """Where all options are the application's, under fill; where some are, those are named."""
    policy("{idle: 61s, interval: 11s}")
    _, address = peer().listener()
    client = peer(cgroup)
    watcher = watch()
    for names in (("idle",), ("idle", "interval", "keepalive")):
        number = client.open_socket(2)
        for name in names:
            client.set_option(number, name, 15)
        client.connect(number, address)
    some, every = watcher.next(), watcher.next()
    assert (some["event"], some["options"]["idle_s"]) == ("kept", {"value": 15, "outcome": "kept"})
    assert some["options"]["interval_s"] == {"value": 11, "outcome": "set"}
    assert every["event"] == "kept"
    assert every["options"]["interval_s"] == {"value": 15, "outcome": "kept"}


def test_refused_option_is_told_with_its_error(cgroup, peer, policy, watch):
    """What the kernel does not take, which a policy file can't say, is named by its errno."""
    policy(OPTIONS)
    with dataplane.open_map(PINS, "kabpf_policies") as policies:
        ((key, raw),) = [each for each in policies.items() if each[1][CPolicy.name.offset]]
        record = CPolicy.from_buffer_copy(raw)
        record.options.idle_s.low = record.options.idle_s.high = 40_000
        policies.update(key, bytes(record))
    _, address = peer().listener()
    watcher = watch()
    peer(cgroup).connection(address)
    event = watcher.next()
    assert event["event"] == "failed"
    assert outcomes(event) == SET | {"idle_s": (None, "EINVAL")}


def test_retrofit_is_told(cgroup, peer, policy, watch):
    """Each socket that was open and is changed, or left as it is; the second time there is nothing
    to tell."""
    policy("off")
    server, client = peer(), peer(cgroup)
    watcher = watch()
    _, address = server.listener()
    numbers = [client.connection(address) for _ in range(2)]
    for name in ("idle", "interval", "probes", "keepalive"):
        client.set_option(numbers[1], name, 15)
    policy(OPTIONS)
    told = {event["event"]: event for event in (watcher.next(), watcher.next())}
    assert told.keys() == {"updated", "kept"}
    changed = told["updated"]
    assert (changed["direction"], changed["policy"], changed["pid"]) == ("out", "a", None)
    assert changed["local"]["port"] == client.local_port(numbers[0])
    assert outcomes(changed) == SET
    policy(OPTIONS)
    assert watcher.next(0.1) is None


def test_retrofit_that_had_nothing_to_do_is_not_told(cgroup, peer, policy, watch):
    """The same options under another mode."""
    policy(OPTIONS)
    _, address = peer().listener()
    peer(cgroup).connection(address)
    watcher = watch()
    policy(OPTIONS, "mode: override")
    assert watcher.next(0.1) is None


def test_many_updates_are_told_once_each(cgroup, peer, policy, watch):
    """More sockets than the iterator's buffer has room for."""
    policy("off")
    _, address = peer().listener()
    client = peer(cgroup)
    client.connect_many(address, 3000)
    watcher = watch("--event", "updated")
    policy(OPTIONS)
    ports = [watcher.next()["local"]["port"] for _ in range(3000)]
    assert len(set(ports)) == 3000
    assert watcher.next(0.1) is None


def test_ignored_and_clamped_calls_are_told(cgroup, peer, policy, watch):
    """Which option the application asked for, and which process it is."""
    policy("{idle: 30s..5m, interval: 11s}", "mode: enforce")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    watcher = watch()
    client.set_option(number, "interval", 15)
    client.set_option(number, "idle", 7200)
    client.set_option(number, "keepalive", 0)
    client.set_option(number, "probes", 3)
    events = [watcher.next() for _ in range(3)]
    assert [(each["event"], each["setsockopt"]) for each in events] == [
        ("ignored", {"option": "interval_s", "requested": 15}),
        ("clamped", {"option": "idle_s", "requested": 7200}),
        ("ignored", {"option": "keepalive", "requested": False}),
    ]
    assert {(process_told(each, client), each["direction"]) for each in events} == {
        (client.process.pid, "out")
    }
    assert watcher.next(0.1) is None


@pytest.fixture
def cut(namespace):
    """Cuts connections to port 9000 in a network namespace."""

    def drop():
        command = ["ip", "netns", "exec", namespace, "nft", "-f", "-"]
        subprocess.run(command, input=DROP, text=True, check=True)

    return drop


@pytest.fixture
def connected(cgroup, peer, namespace):
    """A client in the cgroup with the number of its connection to port 9000 in the namespace."""

    def connect():
        server = peer(None, namespace)
        address = server.listen(server.open_socket(2), ["127.0.0.1", 9000])
        client = peer(cgroup, namespace)
        return client, client.connection(address)

    return connect


def timed_out(kabpfctl):
    """How many connections timed out by what `status` says of the one policy."""
    (policy,) = json.loads(kabpfctl("status", "--json").stdout)["policies"]
    return policy["counters"]["timed_out"]


@pytest.mark.parametrize("others", ["", ", user_timeout: 3s"])
def test_death_by_keepalive_is_told(policy, kabpfctl, connected, cut, watch, others):
    """With the peer, the silence, and the probes that were not answered; `status` counts it."""
    policy(f"{{idle: 1s, interval: 1s, probes: 2{others}}}")
    watcher = watch()
    client, number = connected()
    cut()
    assert client.receive(number, 15 * PATIENCE) == "ETIMEDOUT"
    event = watcher.until("timed_out")
    timeout = event["timeout"]
    assert (timeout["reason"], timeout["error"], timeout["unanswered"]) == (
        "keepalive",
        "ETIMEDOUT",
        2,
    )
    assert 2900 <= timeout["silent_ms"] <= 3000 + 2000 * PATIENCE
    assert event["peer"] == {"address": "127.0.0.1", "port": 9000}
    assert (event["policy"], event["direction"], process_told(event, client)) == (
        "a",
        "out",
        client.process.pid,
    )
    assert timed_out(kabpfctl) == 1


def test_death_of_an_accepted_connection_is_told(cgroup, peer, policy, watch, cut, namespace):
    """It is known as such, although a dead socket has no port any more."""
    policy("{idle: 1s, interval: 1s, probes: 1}")
    server = peer(cgroup, namespace)
    watcher = watch()
    listener = server.open_socket(2)
    peer(None, namespace).connection(server.listen(listener, ["127.0.0.1", 9000]))
    accepted = server.accept(listener)
    cut()
    assert server.receive(accepted, 15 * PATIENCE) == "ETIMEDOUT"
    event = watcher.until("timed_out")
    assert (event["direction"], event["local"]["port"]) == ("in", 9000)


def test_death_is_told_once(policy, kabpfctl, connected, cut, watch):
    """Although the kernel says more than once that something is wrong: with MSG_ZEROCOPY also for
    each buffer that it gives back then."""
    policy("{idle: 1h, user_timeout: 1500ms}")
    watcher = watch("--event", "timed_out")
    client, number = connected()
    assert client.set_bytes(number, socket.SOL_SOCKET, SO_ZEROCOPY, "01000000") == ""
    cut()
    for _ in range(3):
        client.send(number, "data", MSG_ZEROCOPY)
    assert client.receive(number, 15 * PATIENCE) == "ETIMEDOUT"
    assert watcher.next()["timeout"]["reason"] == "user timeout"
    assert watcher.next(0.1) is None
    assert timed_out(kabpfctl) == 1


def test_death_by_user_timeout_is_told(policy, kabpfctl, connected, cut, watch):
    """Data that is not acknowledged."""
    policy("{idle: 1h, user_timeout: 1500ms}")
    watcher = watch()
    client, number = connected()
    cut()
    client.send(number)
    assert client.receive(number, 15 * PATIENCE) == "ETIMEDOUT"
    timeout = watcher.until("timed_out")["timeout"]
    assert (timeout["reason"], timeout["error"]) == ("user timeout", "ETIMEDOUT")
    assert (timeout["unanswered"] >= 1, timeout["window_closed_ms"]) == (True, 0)
    assert timed_out(kabpfctl) == 1


def test_window_that_a_living_reader_closed_is_named(policy, connected, watch):
    """A peer that is there and does not read for longer than the user timeout: it answers each
    probe, and the connection ends all the same."""
    policy("{idle: 1h, user_timeout: 1500ms}")
    watcher = watch()
    client, number = connected()
    client.send_all_that_fits(number)
    assert client.receive(number, 15 * PATIENCE) == "ETIMEDOUT"
    event = watcher.until("timed_out")
    timeout = event["timeout"]
    assert (timeout["reason"], timeout["error"], timeout["unanswered"]) == (
        "user timeout",
        "ETIMEDOUT",
        0,
    )
    assert timeout["silent_ms"] < timeout["window_closed_ms"]
    assert 1500 <= timeout["window_closed_ms"] <= 1500 + 4000 * PATIENCE


def test_death_by_retransmission_is_called_so(policy, kabpfctl, connected, cut, watch, namespace):
    """It is the kernel's own limit and none of kabpf's: told, and not counted."""
    set_sysctl(namespace, "tcp_retries2", "2")
    policy("{idle: 1h}")
    watcher = watch()
    client, number = connected()
    cut()
    client.send(number)
    assert client.receive(number, 15 * PATIENCE) == "ETIMEDOUT"
    timeout = watcher.until("timed_out")["timeout"]
    assert (timeout["reason"], timeout["error"]) == ("retransmissions", "ETIMEDOUT")
    assert timed_out(kabpfctl) == 0


def test_death_elsewhere_is_not_told(other_cgroup, peer, policy, connected, cut, watch, namespace):
    """A connection of a cgroup without a policy, and one that was never established."""
    policy("{idle: 1s, interval: 1s, probes: 1}")
    set_sysctl(namespace, "tcp_syn_retries", "1")
    watcher = watch("--event", "timed_out")
    client, number = connected()
    other = peer(other_cgroup, namespace)
    silent = other.connection(["127.0.0.1", 9000])
    for name in ("idle", "interval", "probes", "keepalive"):
        other.set_option(silent, name, 1)
    cut()
    assert client.connect_error(client.open_socket(2), ["127.0.0.1", 9000]) == "ETIMEDOUT"
    assert other.receive(silent, 15 * PATIENCE) == "ETIMEDOUT"
    assert client.receive(number, 15 * PATIENCE) == "ETIMEDOUT"
    event = watcher.next()
    assert event["local"]["port"] == client.local_port(number)
    assert watcher.next(0.1) is None


def test_filters_select(make_cgroup, peer, write_policy, kabpfctl, watch):
    """By cgroup, unit, policy and event, all at once."""
    paths = [make_cgroup(name) for name in ("one.service/inner", "two.service")]
    for name, path in zip(("one", "two"), paths, strict=True):
        write_policy(f"{name}.yaml", f"select: [{{cgroup: {path_of(path)}}}]\nkeepalive: on")
    kabpfctl("apply")
    _, address = peer().listener()
    watchers = {
        flag: watch(flag, value)
        for flag, value in (
            ("--cgroup", paths[0].parent), ("--unit", "on*.service"), ("--policy", "one"),
            ("--event", "timed_out"),
        )
    }  # fmt: skip
    for path in reversed(paths):
        peer(path).connection(address)
    assert [watchers[flag].next()["policy"] for flag in ("--cgroup", "--unit", "--policy")] == [
        "one"
    ] * 3
    assert [each.next(0.1) for each in watchers.values()] == [None] * 4


def test_cgroup_that_is_gone_is_named(make_cgroup, peer, kabpfctl, watch):
    """The monitor knows the path of a cgroup that was made and removed since it began, also where
    it did not come to read meanwhile."""
    top = make_cgroup()
    kabpfctl("attach", "--cgroup", top, "--idle", 61)
    _, address = peer().listener()
    watcher = watch()
    watcher.process.send_signal(signal.SIGSTOP)
    brief = make_cgroup("brief.service")
    one = peer(brief)
    one.connection(address)
    one.end()
    wait_until(lambda: "populated 0" in (brief / "cgroup.events").read_text(), "its end")
    brief.rmdir()
    watcher.process.send_signal(signal.SIGCONT)
    event = watcher.next()
    assert (event["cgroup"], event["unit"]) == (path_of(brief), "brief.service")


def test_slow_reader_is_told_what_it_lost(cgroup, peer, policy, watch):
    """More calls than there is room for, while the monitor stands still; they do not wait."""
    policy(OPTIONS, "mode: enforce")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    watcher = watch()
    watcher.process.send_signal(signal.SIGSTOP)
    count = REPORTS * os.cpu_count() + 5000
    client.set_often(number, "idle", 15, count)
    watcher.process.send_signal(signal.SIGCONT)
    received = 0
    while (event := watcher.next())["event"] == "ignored":
        received += 1
    assert event["event"] == "lost"
    assert received + event["count"] == count
    assert received > REPORTS / 2
    client.set_option(number, "idle", 15)
    assert watcher.next()["event"] == "ignored"


def test_monitors_hear_all_and_leave_nothing(cgroup, peer, policy, watch, own_objects):
    """Two hear the same; when one is killed the other goes on, and the data plane talks to nobody
    who is not there."""
    policy(OPTIONS)
    _, address = peer().listener()
    client = peer(cgroup)
    before = own_objects()
    one, two = watch(), watch()
    number = client.connection(address)
    assert one.next()["local"] == two.next()["local"] == {
        "address": "127.0.0.1", "port": client.local_port(number),
    }  # fmt: skip
    two.end()
    client.connection(address)
    assert one.next()["event"] == "set"
    assert Watcher.listeners() == 1
    one.end()
    client.connection(address)
    assert Watcher.listeners() == 0
    assert own_objects() == before


def test_place_of_a_killed_monitor_is_taken_again(cgroup, peer, policy, watch):
    """Although nothing has happened since that would have shown that it is gone."""
    policy(OPTIONS)
    _, address = peer().listener()
    watch().end()
    assert Watcher.listeners() == 1
    command = [BIN / "kabpfctl", "monitor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout.readline().startswith("TIME ")  # it listens
        peer(cgroup).connection(address)
        assert " set " in monitor.stdout.readline()
        assert Watcher.listeners() == 1
        monitor.terminate()


def test_there_are_so_many_monitors(policy, watch):
    """One more than there is room for is refused."""
    policy(OPTIONS)
    for _ in range(abi.MONITORS - 1):
        watch()
    done = subprocess.run(
        [BIN / "kabpfctl", "monitor"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "kabpfctl: too many monitors; at most 7 can run at a time\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_monitor(cgroup, policy, watch, number):
    """Its exit status is 0, and it says nothing."""
    policy(OPTIONS)
    watcher = watch()
    watcher.process.send_signal(number)
    assert watcher.process.communicate(timeout=10 * PATIENCE) == ("", "")
    assert watcher.process.returncode == 0


def test_signals_that_come_together_end_the_monitor(policy, watch):
    """As systemd sends them at the end of a session."""
    policy(OPTIONS)
    watcher = watch()
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
        watcher.process.send_signal(number)
    assert watcher.process.communicate(timeout=10 * PATIENCE) == ("", "")
    assert watcher.process.returncode == 0


def test_signal_that_is_ignored_does_not_end_the_monitor(cgroup, peer, policy, watch):
    """As under nohup(1)."""
    policy(OPTIONS)
    _, address = peer().listener()
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watcher = watch()
    signal.signal(signal.SIGHUP, former)
    watcher.process.send_signal(signal.SIGHUP)
    peer(cgroup).connection(address)
    assert watcher.next()["event"] == "set"


def test_output_that_takes_nothing_is_an_error(policy):
    """As a full disk."""
    policy(OPTIONS)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [BIN / "kabpfctl", "monitor"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "kabpfctl: write to standard output: No space left on device\n"


def test_output_that_does_not_block_is_waited_for(cgroup, peer, policy, watch):
    """Whoever shares a terminal or a pipe may have made it so: nothing is lost."""
    policy(OPTIONS, "mode: enforce")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    output, end = os.pipe()
    os.set_blocking(end, False)
    with (
        open(output) as lines,
        subprocess.Popen([BIN / "kabpfctl", "monitor", "--json"], stdout=end) as monitor,
    ):
        os.close(end)
        wait_until(lambda: Watcher.listeners() == 1, "a monitor")
        client.set_often(number, "idle", 15, 1000)
        events = [json.loads(lines.readline() or "{}").get("event") for _ in range(1000)]
        monitor.terminate()
    assert events == ["ignored"] * 1000


def test_closed_output_ends_the_monitor(cgroup, policy, watch):
    """As after `head`, and without another event."""
    policy(OPTIONS)
    watcher = watch()
    watcher.process.stdout.close()
    assert watcher.process.wait(10 * PATIENCE) == 0
    assert watcher.process.stderr.read() == ""


def test_signal_ends_a_monitor_whose_reader_is_stuck(cgroup, peer, policy, watch):
    """It does not wait for the pipe to be read."""
    policy(OPTIONS, "mode: enforce")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    watcher = watch()
    client.set_often(number, "idle", 15, 1000)
    output = watcher.process.stdout.fileno()
    wait_until(lambda: select.select([output], [], [], 0)[0] != [], "events")
    watcher.process.send_signal(signal.SIGTERM)
    assert watcher.process.wait(10 * PATIENCE) == 0


def test_monitor_goes_on_with_another_data_plane(cgroup, peer, policy, kabpfctl, watch):
    """When kabpf is unloaded it waits, and hears of what is loaded then."""
    policy(OPTIONS)
    _, address = peer().listener()
    client = peer(cgroup)
    watcher = watch()
    kabpfctl("detach", "--all")
    assert "kabpf is not active; waiting" in watcher.process.stderr.readline()
    kabpfctl("apply")
    wait_until(lambda: Watcher.listeners() == 1, "the monitor")
    client.connection(address)
    assert watcher.next()["event"] == "set"


def test_monitor_that_is_given_up_begins_again(cgroup, peer, policy, watch):
    """As where a processor works that did not when it began: it says that something is missing."""
    policy(OPTIONS)
    _, address = peer().listener()
    watcher = watch()
    with maps.Map(str(PINS / dataplane.READERS), 4, 8) as readers:
        readers.update(bytes(4), bytes(8))
    assert "up to a second of events is missing" in watcher.process.stderr.readline()
    wait_until(lambda: Watcher.listeners() == 1, "the monitor")
    peer(cgroup).connection(address)
    assert watcher.next()["event"] == "set"


def test_monitor_says_what_came_before_kabpf_was_unloaded(cgroup, peer, policy, kabpfctl, watch):
    """Also where its own reader was too slow to look whether kabpf still is active."""
    policy(OPTIONS, "mode: enforce")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    watcher = watch()
    output = watcher.process.stdout.fileno()
    client.set_often(number, "idle", 15, 1000)
    wait_until(lambda: select.select([output], [], [], 0)[0] != [], "events")
    client.set_often(number, "idle", 15, 1000)
    kabpfctl("detach", "--all")
    unloaded = time.monotonic()
    wait_until(lambda: time.monotonic() > unloaded + LOOK_S, "the time of its next look")
    assert [watcher.next()["event"] for _ in range(2000)] == ["ignored"] * 2000


def test_monitor_says_which_capability_is_missing(policy):
    """Root without CAP_PERFMON is told so."""
    policy(OPTIONS)
    command = ["setpriv", "--bounding-set", "-perfmon", "--inh-caps", "-perfmon"]
    done = subprocess.run(
        [*command, BIN / "kabpfctl", "monitor"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kabpfctl: CAP_PERFMON missing; run it as root")


def test_monitor_says_that_perf_events_are_refused(policy):
    """As in a container, or where Debian's kernel finds no CAP_SYS_ADMIN."""
    policy(OPTIONS)
    done = subprocess.run(
        [BIN / "kabpfctl", "monitor"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=refuse_perf_events,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "kabpfctl: the kernel refuses perf_event_open(2): it needs CAP_SYS_ADMIN"
    )


@pytest.fixture
def no_journal():
    """Hides the machine's journal from the tests' mounts, if it has one."""
    place = "/run/systemd/journal"
    if not os.path.exists(place):
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    yield
    subprocess.run(["umount", place], check=True)


def test_daemon_logs_what_policies_want(
    cgroup, other_cgroup, peer, write_policy, kabpfctl, kabpfd, no_journal
):
    """Under `log: sockets` kabpfd writes a line for each event of that policy's sockets, here on
    standard error; for other policies, and when no policy wants it any more, none."""

    def write(name, cgroup, log):
        text = f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {OPTIONS}\nlog: {log}\n"
        write_policy(f"{name}.yaml", text)

    write("other", other_cgroup, "off")
    write("logged", cgroup, "off")
    daemon = kabpfd()
    assert Watcher.listeners() == 0
    write("logged", cgroup, "sockets")
    kabpfctl("apply")
    assert Watcher.listeners() == 1
    _, address = peer().listener()
    peer(other_cgroup).connection(address)
    client = peer(cgroup)
    port = client.local_port(client.connection(address))
    expected = (
        f"set: 127.0.0.1:{port} -> 127.0.0.1:{address[1]} of {path_of(cgroup)},"
        f" {NAME}[{client.process.pid}], policy logged: keepalive on, idle 61s"
    )
    errors, said = daemon.process.stderr.fileno(), ""
    while "127.0.0.1:" not in said:
        assert select.select([errors], [], [], 10 * PATIENCE)[0], said
        said += os.read(errors, 1 << 16).decode()
    if not IS_FIRST:
        said = re.sub(r"\[[0-9]+\]", f"[{client.process.pid}]", said)
    assert expected in said
    assert path_of(other_cgroup) not in said
    write("logged", cgroup, "off")
    kabpfctl("apply")
    wait_until(lambda: Watcher.listeners() == 0, "the end of the log")


def test_daemon_waits_for_no_reader_of_its_log(
    cgroup, peer, write_policy, kabpfctl, kabpfd, no_journal
):
    """Where standard error is a pipe that nobody reads, lines are lost, and kabpfd works."""
    write_policy(
        "a.yaml",
        f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {OPTIONS}\nmode: enforce\n"
        "log: sockets\n",
    )
    daemon = kabpfd()
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    client.set_often(number, "idle", 15, 1500)
    assert daemon.stop() == 0


def test_daemon_without_sys_admin_can_log(cgroup, write_policy, kabpfctl, kabpfd, no_journal):
    """It needs no capability that the service does not have."""
    write_policy(
        "a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: on\nlog: sockets\n"
    )
    capabilities = "-all,+bpf,+net_admin,+perfmon"
    kabpfd("setpriv", "--inh-caps", capabilities, "--bounding-set", capabilities, BIN / "kabpfd")
    assert Watcher.listeners() == 1
