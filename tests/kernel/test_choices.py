"""What an application chose on an open connection, over what later becomes of its policy."""

import signal
import subprocess

import pytest
from harness import DROP_INS, PINS, UNTOUCHED, path_of

# An application sets some of what each policy gives, and then SO_KEEPALIVE 0, as net.Dial() and
# SetKeepAlive(false) of Go do.
TURNED_OFF = {
    "every option": ("{{idle: {}, interval: 10s}}", {"idle": 15, "interval": 3}),
    "one option": ("{{user_timeout: {}s}}", {"user_timeout": 9000}),
    "no number": ("on", {}),
}
OVERRIDE = "mode: override"
NUMBERS = "{idle: 61, interval: 11, probes: 5, user_timeout: 90s}"
GIVEN = {"keepalive": 1, "idle": 61, "interval": 11, "probes": 5, "user_timeout": 90_000}


@pytest.fixture
def turned_off(connection, peer, cgroup):
    """A connection, an accepted one and a listener on which an application turns keepalive off,
    after it set its own options."""
    client, connect = connection

    def make(own):
        server = peer(cgroup)
        listener, address = server.listener()
        sockets = [(client, connect()), (server, listener)]
        peer().connection(address)
        sockets.append((server, server.accept(listener)))
        for one, number in sockets:
            one.set_option(number, "keepalive", 1)
            for name, value in own.items():
                one.set_option(number, name, value)
            one.set_option(number, "keepalive", 0)
        return sockets, address

    return make


def _keepalive(sockets):
    return [one.keepalive(number) for one, number in sockets]


@pytest.mark.core
@pytest.mark.parametrize("options", TURNED_OFF)
def test_what_was_turned_off_stays_off_when_the_policy_changes(options, turned_off, policy):
    """Also where each of the policy's options is the application's, and where it gives none."""
    keepalive, own = TURNED_OFF[options]
    policy(keepalive.format(61))
    sockets, _ = turned_off(own)
    for other in ("idle: 62", "idle: 63, probes: 4"):
        policy(f"{{{other}}}")
        assert _keepalive(sockets) == [0, 0, 0]


@pytest.mark.parametrize("options", TURNED_OFF)
def test_what_was_turned_off_stays_off_when_the_daemon_is_started_again(
    options, turned_off, policy, kabpfd
):
    """After it was killed, and after a stop, which unloads the policy."""
    keepalive, own = TURNED_OFF[options]
    policy(keepalive.format(61))
    daemon = kabpfd()
    sockets, _ = turned_off(own)
    daemon.stop(signal.SIGKILL)
    daemon = kabpfd()
    assert _keepalive(sockets) == [0, 0, 0]
    daemon.stop()
    kabpfd()
    policy("{idle: 64}")
    # Of a listener without any number the kernel keeps nothing, nor does a stop.
    assert _keepalive(sockets) == [0, 0 if own else 1, 0]


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
@pytest.mark.parametrize("options", TURNED_OFF)
def test_what_was_turned_off_stays_off_over_an_upgrade(
    options, other, turned_off, cgroup, write_policy, version
):
    """To another build, and to another layout, which forgets the former policies."""
    keepalive, own = TURNED_OFF[options]
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: "
    write_policy("a.yaml", select + keepalive.format(61))
    version("this").kabpfctl("apply")
    sockets, _ = turned_off(own)
    version(other).kabpfctl("apply")
    write_policy("a.yaml", select + "{idle: 62}")
    version(other).kabpfctl("apply")
    assert _keepalive(sockets[::2]) == [0, 0]


def test_what_was_turned_off_before_the_first_policy_stays_off(turned_off, policy):
    """The kernel knows that a connection had keepalive; a listener that has a number for it, too,
    had its application's say."""
    sockets, _ = turned_off({"idle": 15, "interval": 3})
    policy("{idle: 61, probes: 4}")
    assert _keepalive(sockets) == [0, 0, 0]


@pytest.mark.core
def test_what_never_asked_is_turned_on(connection, peer, cgroup, policy):
    """Numbers alone, which an application may set without SO_KEEPALIVE, are no word against it on a
    connection; nor is a user timeout on a listener."""
    client, connect = connection
    number = connect()
    client.set_option(number, "idle", 15)
    client.set_option(number, "user_timeout", 9000)
    server = peer(cgroup)
    listener, address = server.listener()
    server.set_option(listener, "user_timeout", 9000)
    policy("{idle: 61}")
    assert client.options(number) == UNTOUCHED | {
        "keepalive": 1, "idle": 15, "user_timeout": 9000,
    }  # fmt: skip
    assert server.keepalive(listener) == 1
    peer().connection(address)
    assert server.keepalive(server.accept(listener)) == 1


@pytest.mark.parametrize("options", TURNED_OFF)
def test_connection_of_a_listener_that_was_turned_off_is_off(options, turned_off, peer, policy):
    """What it accepts from then on is without keepalive, whoever the numbers are from."""
    keepalive, own = TURNED_OFF[options]
    policy(keepalive.format(61))
    sockets, address = turned_off(own)
    server, listener = sockets[1]
    peer().connection(address)
    assert server.keepalive(server.accept(listener)) == 0


def test_connection_of_a_listener_that_no_policy_met_is_on(peer, cgroup, policy):
    """A listener that `existing: false` leaves alone has turned nothing off."""
    server = peer(cgroup)
    listener, address = server.listener()
    server.set_option(listener, "idle", 15)
    policy("{idle: 61}", "existing: false")
    peer().connection(address)
    assert server.keepalive(server.accept(listener)) == 1


CHANGES = {
    "log": (["log: sockets"], NUMBERS),
    "destination": (["destinations: [{to: 10.0.0.0/8, idle: 9}]"], NUMBERS),
    "direction": (["direction: both"], NUMBERS),
    "loopback": (["loopback: true"], NUMBERS),
    "one option": ([], NUMBERS.replace("61", "62")),
    "fewer options": ([], "{idle: 61}"),
}


@pytest.mark.core
@pytest.mark.parametrize("mode", ["fill", "override"])
@pytest.mark.parametrize("change", CHANGES)
def test_later_choice_stays_when_the_policy_changes(connection, policy, mode, change):
    """What an application sets on an established connection stays, whatever is changed elsewhere in
    the policy, and what it has from the policy follows. Keepalive that it turned off, and a user
    timeout, are such choices."""
    client, connect = connection
    before = {"direction": ["direction: out"]}.get(change, [])
    policy(NUMBERS, f"mode: {mode}", *before)
    own, off, given = connect(), connect(), connect()
    for name, value in (("idle", 15), ("interval", 3)):
        client.set_option(own, name, value)
    client.set_option(off, "keepalive", 0)
    client.set_option(off, "user_timeout", 0)
    others, keepalive = CHANGES[change]
    policy(keepalive, f"mode: {mode}", *others)
    idle = 62 if change == "one option" else 61
    assert client.options(own) == GIVEN | {"idle": 15, "interval": 3}
    assert client.options(off) == GIVEN | {"keepalive": 0, "user_timeout": 0, "idle": idle}
    assert client.options(given) == GIVEN | {"idle": idle}


def test_later_choice_stays_when_the_file_is_renamed(connection, policy, kabpfctl):
    """The policy has another name and gives the same."""
    client, connect = connection
    policy(NUMBERS, OVERRIDE)
    number = connect()
    client.set_option(number, "idle", 15)
    (DROP_INS / "a.yaml").rename(DROP_INS / "b.yaml")
    kabpfctl("apply")
    assert client.options(number) == GIVEN | {"idle": 15}


def test_later_choice_stays_over_a_stop_and_a_start(connection, policy, kabpfctl, kabpfd):
    """While a number of the policy's stands beside it; a connection of the interval gets it all."""
    client, connect = connection
    policy(NUMBERS, OVERRIDE)
    number = connect()
    client.set_option(number, "idle", 15)
    kabpfctl("detach", "--all")
    between = connect()
    client.set_option(between, "keepalive", 1)
    client.set_option(between, "idle", 15)
    policy(NUMBERS, OVERRIDE)
    assert client.options(number) == GIVEN | {"idle": 15}
    assert client.options(between) == GIVEN
    kabpfd().stop()
    kabpfd()
    assert client.options(number) == GIVEN | {"idle": 15}


def test_choice_before_the_policys_turn_is_replaced(connection, policy):
    """Under `override`, also where a policy of `fill` had left it."""
    client, connect = connection
    number = connect()
    client.set_option(number, "idle", 15)
    policy(NUMBERS, OVERRIDE)
    assert client.options(number) == GIVEN
    client.set_option(number, "idle", 16)
    policy(NUMBERS)
    client.set_option(number, "keepalive", 0)
    assert client.options(number) == GIVEN | {"idle": 16, "keepalive": 0}
    policy(NUMBERS, OVERRIDE)
    assert client.options(number) == GIVEN


def test_keepalive_that_was_turned_on_under_off_stays_on(connection, policy):
    """`keepalive: off` of `override` has its turn once, too."""
    client, connect = connection
    policy("off", OVERRIDE)
    number = connect()
    client.set_option(number, "keepalive", 1)
    policy("off", OVERRIDE, "destinations: [{to: 10.0.0.0/8, idle: 9}]")
    assert client.keepalive(number) == 1


def test_policy_that_did_not_update_has_not_had_its_turn(connection, policy):
    """Under `existing: false` a connection that is older than the policy is left; once it is
    updated, what its application had set is replaced."""
    client, connect = connection
    number = connect()
    client.set_option(number, "idle", 15)
    policy(NUMBERS, OVERRIDE, "existing: false")
    assert client.options(number)["idle"] == 15
    policy(NUMBERS, OVERRIDE)
    assert client.options(number) == GIVEN


def test_mended_link_overwrites_no_later_choice(connection, policy, kabpfctl, cut_link):
    """After somebody detached the program, what was open before has what it had, and what was
    opened meanwhile gets what it lacks."""
    client, connect = connection
    policy(NUMBERS, OVERRIDE)
    number = connect()
    client.set_option(number, "idle", 15)
    cut_link()
    between = connect()
    assert client.options(between) == UNTOUCHED
    kabpfctl("apply")
    assert client.options(number) == GIVEN | {"idle": 15}
    assert client.options(between) == GIVEN


@pytest.fixture
def cut_link():
    """Detaches the pinned link of the program on connections."""

    def cut():
        pin = str(PINS / "kabpf_sockops")
        subprocess.run(["bpftool", "link", "detach", "pinned", pin], check=True)

    return cut
