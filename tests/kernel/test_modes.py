"""What an application asks for, under each mode and under ranges."""

import json
import socket
import struct
import subprocess

import pytest
from harness import UNTOUCHED, entering, multipath_connection, path_of, pinned, set_sysctl

pytestmark = pytest.mark.core

EXACT = "idle: 61s, interval: 11s, probes: 5, user_timeout: 90s"
RANGES = "idle: 30s..5m, interval: 10s..20s, probes: 3..6, user_timeout: 30s..2m"
MODES = ("fill", "override", "enforce")
OPTIONS = {
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "idle": (socket.SOL_TCP, socket.TCP_KEEPIDLE),
    "interval": (socket.SOL_TCP, socket.TCP_KEEPINTVL),
    "probes": (socket.SOL_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.SOL_TCP, socket.TCP_USER_TIMEOUT),
}
PAGE = 4096  # bytes
TCP_ULP = 31
IPT_SO_SET_REPLACE = 64
IP_ADD_MEMBERSHIP, IP_MSFILTER, MCAST_INCLUDE = 35, 41, 1  # linux/in.h
POLICIES = {
    **{mode: (mode, EXACT) for mode in MODES},
    **{f"{mode} a range": (mode, RANGES) for mode in MODES},
}

# keepalive, idle, interval, probes, user timeout in ms
GIVEN = (1, 61, 11, 5, 90_000)  # what a policy gives where nobody asks
UPPER = (1, 300, 20, 6, 120_000)
OWN = (1, 15, 15, 9, 90_000)
CLAMPED = (1, 30, 15, 6, 120_000)
HOURS = (1, 7200, 11, 5, 90_000)
OFF, UPPER_OFF = (0, *GIVEN[1:]), (0, *UPPER[1:])

# The same of `keepalive: off` in each of MODES.
ON_15 = (1, 15, 15, 9, 0)
ON = (1, 7200, 75, 9, 0)
OFF_15, NOTHING = (0, *ON_15[1:]), (0, *ON[1:])
OFF_OUTCOMES = {
    ("go", "after"): (ON_15, ON_15, OFF_15),
    ("go", "before"): (ON_15, OFF_15, OFF_15),
    ("java", "after"): (ON, ON, NOTHING),
    ("java", "before"): (ON, NOTHING, NOTHING),
    ("off", "after"): (NOTHING, NOTHING, NOTHING),
    ("off", "before"): (NOTHING, NOTHING, NOTHING),
}

# By what an application asks for, and whether before the connection or after: what it has then
# under each of POLICIES, in their order.
OUTCOMES = {
    # SO_KEEPALIVE, 15 s of idle and interval, 9 probes
    ("go", "after"): (OWN, OWN, GIVEN, CLAMPED, CLAMPED, CLAMPED),
    ("go", "before"): (OWN, GIVEN, GIVEN, CLAMPED, CLAMPED, CLAMPED),
    # SO_KEEPALIVE alone
    ("java", "after"): (GIVEN, GIVEN, GIVEN, UPPER, UPPER, UPPER),
    ("java", "before"): (GIVEN, GIVEN, GIVEN, UPPER, UPPER, UPPER),
    # SO_KEEPALIVE and two hours of idle
    ("hours", "after"): (HOURS, HOURS, GIVEN, UPPER, UPPER, UPPER),
    ("hours", "before"): (HOURS, GIVEN, GIVEN, UPPER, UPPER, UPPER),
    # SO_KEEPALIVE turned off; before the connection that is what every socket has
    ("off", "after"): (OFF, OFF, GIVEN, UPPER_OFF, UPPER_OFF, UPPER),
    ("off", "before"): (GIVEN, GIVEN, GIVEN, UPPER, UPPER, UPPER),
}

# How many of the application's calls were ignored, how many clamped to the range, and how many
# sockets kept an option of its when the connection was established.
COUNTED = {
    ("go", "after"): ((0, 0, 0), (0, 0, 0), (3, 0, 0), (0, 2, 0), (0, 2, 0), (0, 2, 0)),
    ("go", "before"): ((0, 0, 1), (0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1)),
    ("hours", "after"): ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ("hours", "before"): ((0, 0, 1), *[(0, 0, 0)] * 5),
    ("off", "after"): ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0), (0, 0, 0), (1, 0, 0)),
}


@pytest.fixture
def cgroup_under(make_cgroup, write_policy, kabpfctl):
    """Activates policies, each on a cgroup of its own; the cgroups by the policies' names."""

    def put(policies):
        cgroups = {name: make_cgroup(name.replace(" ", "-")) for name in policies}
        lines = ["policies:"]
        for name, (mode, options) in policies.items():
            select = f"[{{cgroup: {path_of(cgroups[name])}}}]"
            keepalive = options if options == "off" else f"{{{options}}}"
            lines.append(f"  {name}: {{select: {select}, mode: {mode}, keepalive: {keepalive}}}")
        write_policy("modes.yaml", "\n".join(lines))
        kabpfctl("apply")
        return cgroups

    return put


@pytest.fixture
def run(compiled, peer):
    """Runs programs/runtime.c at one end of a connection, peer.py at the other."""
    program = compiled("runtime.c")
    other = peer()
    _, (_, port) = other.listener()

    def options(cgroup, end, name, when):
        to = port if end == "connect" else 0
        with subprocess.Popen(
            [program, name, when, str(to)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=entering(cgroup),
        ) as process:
            if end == "accept":
                other.connection(["127.0.0.1", int(process.stdout.readline())])
            found = json.loads(process.stdout.readline())
        assert found.pop("refused") == 0
        return tuple(found.values())

    return options


@pytest.mark.parametrize(("name", "when"), OUTCOMES)
def test_what_an_application_asks_for_has_the_outcome_of_the_table(
    cgroup_under, run, kabpfctl, name, when
):
    """The calls of run-time libraries, on outgoing and on accepted connections, under each policy;
    what is done to them is counted."""
    cgroups = cgroup_under(POLICIES)
    expected = dict(zip(POLICIES, OUTCOMES[name, when], strict=True))
    assert {policy: run(cgroups[policy], "connect", name, when) for policy in POLICIES} == expected
    counted = _counted(kabpfctl)
    assert tuple(counted[policy] for policy in POLICIES) == COUNTED.get(
        (name, when), ((0, 0, 0),) * len(POLICIES)
    )
    assert {policy: run(cgroups[policy], "accept", name, when) for policy in POLICIES} == expected


@pytest.mark.parametrize(("name", "when"), OFF_OUTCOMES)
def test_keepalive_is_off_as_the_mode_says(cgroup_under, run, kabpfctl, name, when):
    """`keepalive: off` leaves an application alone under `fill`, turns keepalive off when a
    connection is established under `override`, and keeps it off under `enforce`, on either side.
    The calls that are ignored are counted."""
    cgroups = cgroup_under({mode: (mode, "off") for mode in MODES})
    expected = dict(zip(MODES, OFF_OUTCOMES[name, when], strict=True))
    for end in ("connect", "accept"):
        assert {mode: run(cgroups[mode], end, name, when) for mode in MODES} == expected
    turned_on = name != "off" and when == "after"
    assert {mode: counts[0] for mode, counts in _counted(kabpfctl).items()} == {
        "fill": 0, "override": 0, "enforce": 2 if turned_on else 0,
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "expected"), [("fill", 1), ("override", 0), ("enforce", 0)])
def test_keepalive_of_open_sockets_is_off_as_the_mode_says(
    cgroup, peer, policy, kabpfctl, mode, expected
):
    """Connections of either side and listeners that are open when the policy comes; what a later
    `fill` finds turned off by it, it turns on again, and says who did what."""
    inside = peer(cgroup)
    listener, address = inside.listener()
    inside.set_option(listener, "keepalive", 1)
    outgoing = inside.connection(address)
    inside.set_option(outgoing, "keepalive", 1)
    sockets = [listener, outgoing, inside.accept(listener)]
    port = inside.local_port(outgoing)

    def setter():
        shown = json.loads(kabpfctl("sockets", "--json").stdout)["sockets"]
        (found,) = (one for one in shown if one["local"]["port"] == port)
        return found["set_by"]["keepalive"]

    policy("off", f"mode: {mode}")
    assert [inside.keepalive(number) for number in sockets] == [expected] * 3
    assert setter() == ("application" if expected else "policy")
    policy("{idle: 61}", "mode: fill")
    assert [inside.options(number)["idle"] for number in sockets] == [61] * 3
    assert [inside.keepalive(number) for number in sockets] == [1] * 3


def test_accepted_socket_is_off_with_its_listener(cgroup_under, peer):
    """What a listener that had keepalive on accepts has it off under `override`, and can turn it on
    again."""
    server, client = peer(cgroup_under({"off": ("override", "off")})["off"]), peer()
    listener = server.open_socket(socket.AF_INET)
    server.set_option(listener, "keepalive", 1)
    address = server.listen(listener, ["127.0.0.1", 0])
    assert server.keepalive(listener) == 0
    server.set_option(listener, "keepalive", 1)
    client.connection(address)
    accepted = server.accept(listener)
    assert server.keepalive(accepted) == 0
    server.set_option(accepted, "keepalive", 1)
    assert server.keepalive(accepted) == 1


@pytest.mark.parametrize(("mode", "expected"), [("fill", 1), ("override", 0), ("enforce", 0)])
@pytest.mark.parametrize("way", ["new", "open"])
def test_keepalive_is_off_to_a_destination(cgroup, peer, policy, mode, expected, way):
    """`keepalive: off` of a destination is that of its policy's mode."""
    destination = f"mode: {mode}\ndestinations: [{{to: 127.0.0.2, keepalive: off}}]"
    client, server = peer(cgroup), peer()
    server.listen(server.open_socket(socket.AF_INET), ["0.0.0.0", 7000])
    if way == "new":
        policy("{idle: 61}", destination)
    found = {}
    for host in ("127.0.0.1", "127.0.0.2"):
        number = found[host] = client.open_socket(socket.AF_INET)
        client.set_option(number, "keepalive", 1)
        client.connect(number, [host, 7000])
    if way == "open":
        policy("{idle: 61}", destination)
    options = {host: client.options(number) for host, number in found.items()}
    assert options == {
        "127.0.0.1": UNTOUCHED | {"keepalive": 1, "idle": 61},
        "127.0.0.2": UNTOUCHED | {"keepalive": expected},
    }
    client.set_option(found["127.0.0.2"], "keepalive", 1)
    assert client.keepalive(found["127.0.0.2"]) == (0 if mode == "enforce" else 1)


@pytest.fixture
def connected(peer):
    """Opens a connection from a cgroup: the peer and its socket."""

    def connect(cgroup, protocol=0):
        _, address = peer().listener()
        client = peer(cgroup)
        number = client.open_socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        client.connect(number, address)
        return client, number

    return connect


def test_what_the_kernel_refuses_is_refused_under_every_policy(cgroup_under, connected):
    """Numbers that no socket may have, and calls too short for a number, are neither clamped nor
    ignored: EINVAL, as without kabpf."""
    cgroups = cgroup_under({"clamped": ("fill", RANGES), "enforced": ("enforce", EXACT)})
    numbers = [
        *[(name, value) for name in ("idle", "interval") for value in (-1, 0, 32_768)],
        *[("probes", value) for value in (-1, 0, 128)],
        ("user_timeout", -1),
    ]
    invalid = [
        (*OPTIONS[name], value.to_bytes(4, "little", signed=True)) for name, value in numbers
    ]
    short = [(*where, bytes(size)) for where in OPTIONS.values() for size in (0, 1, 3)]
    for cgroup in (None, *cgroups.values()):
        client, number = connected(cgroup)
        calls = invalid + short
        answers = [client.set_bytes(number, *where, value.hex()) for *where, value in calls]
        assert answers == ["EINVAL"] * len(calls)


def test_value_longer_than_a_page_is_clamped(cgroup_under, connected):
    """The kernel reads the number at the beginning of however long a value."""
    cgroups = cgroup_under({"clamped": ("fill", RANGES)})
    client, number = connected(cgroups["clamped"])
    value = (15).to_bytes(4, "little") + bytes(2 * PAGE)
    assert client.set_bytes(number, *OPTIONS["idle"], value.hex()) == ""
    assert client.options(number)["idle"] == 30


def test_other_options_of_any_length_reach_the_kernel(cgroup_under, connected, peer):
    """Options that are not kabpf's have the same answers as without it, also where the value is
    longer than the page that a program sees."""
    cgroups = cgroup_under({"enforced": ("enforce", EXACT)})
    long = bytes(2 * PAGE)
    calls = [
        (socket.SOL_TCP, socket.TCP_CONGESTION, b"reno" + long),
        (socket.SOL_TCP, socket.TCP_CONGESTION, b"nothing" + long),
        (socket.SOL_TCP, socket.TCP_NODELAY, b"\1" + long),
        (socket.SOL_TCP, TCP_ULP, b"nothing" + long),
        (socket.SOL_TCP, 9999, long),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0" + long),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"none\0" + long),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, (12345).to_bytes(4, "little")),
        (socket.SOL_IP, socket.IP_OPTIONS, long),
        (socket.SOL_IP, IPT_SO_SET_REPLACE, long),
    ]
    answers = []
    for cgroup in (None, cgroups["enforced"]):
        client, number = connected(cgroup)
        answers.append(
            [client.set_bytes(number, *where, value.hex()) for *where, value in calls]
            + [client.get_bytes(number, socket.SOL_TCP, socket.TCP_CONGESTION, 16)]
            + [client.get_bytes(number, socket.SOL_SOCKET, socket.SO_RCVBUF, 4)]
        )
    assert answers[0] == answers[1]
    assert answers[0].count("") == 4
    assert bytes.fromhex(answers[0][-2]).rstrip(b"\0") == b"reno"


def test_long_value_arrives_whole(cgroup_under, peer, namespace):
    """A source filter of several pages is what the application gave, with kabpf in between."""
    cgroups = cgroup_under({"enforced": ("enforce", EXACT)})
    set_sysctl(namespace, "igmp_max_msf", str(PAGE))
    client = peer(cgroups["enforced"], namespace)
    number = client.open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    membership = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1")
    assert client.set_bytes(number, socket.SOL_IP, IP_ADD_MEMBERSHIP, membership.hex()) == ""
    sources = [socket.inet_aton(f"10.0.{each // 256}.{each % 256}") for each in range(PAGE)]
    # struct ip_msfilter of linux/in.h
    value = membership + struct.pack("=II", MCAST_INCLUDE, len(sources)) + b"".join(sources)
    assert client.set_bytes(number, socket.SOL_IP, IP_MSFILTER, value.hex()) == ""
    mcfilter = ["ip", "netns", "exec", namespace, "cat", "/proc/net/mcfilter"]
    assert len(subprocess.check_output(mcfilter).splitlines()) == 1 + len(sources)


@pytest.mark.parametrize(
    ("family", "kind", "protocol"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, 0),
        (socket.AF_UNIX, socket.SOCK_STREAM, 0),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP),
    ],
    ids=["udp", "unix", "raw"],
)
def test_socket_of_another_kind_is_not_ignored(
    cgroup_under, peer, kabpfctl, family, kind, protocol
):
    """Under `enforce` sockets that are not TCP are turned on and off as they ask."""
    client = peer(cgroup_under({"enforced": ("enforce", EXACT)})["enforced"])
    number = client.open_socket(family, kind, protocol)
    client.set_option(number, "keepalive", 1)
    assert client.keepalive(number) == 1
    client.set_option(number, "keepalive", 0)
    assert client.keepalive(number) == 0
    assert _counted(kabpfctl)["enforced"] == (0, 0, 0)


def test_listener_is_enforced(cgroup_under, peer):
    """What an application asks for on an open listener is ignored under `enforce`, and clamped to
    a range."""
    cgroups = cgroup_under({"enforced": ("enforce", EXACT), "clamped": ("fill", RANGES)})
    found = {}
    for name, cgroup in cgroups.items():
        server = peer(cgroup)
        listener, _ = server.listener()
        server.set_option(listener, "idle", 15)
        found[name] = server.options(listener)["idle"]
    assert found == {"enforced": 61, "clamped": 30}


@pytest.mark.parametrize(("mode", "expected"), [("fill", 0), ("override", 1), ("enforce", 1)])
def test_listener_without_keepalive_accepts_as_its_mode_says(cgroup_under, peer, mode, expected):
    """Keepalive that an application turns off on an open listener stays off on what it accepts,
    unless the policy replaces what the application chose."""
    server, client = peer(cgroup_under({mode: (mode, EXACT)})[mode]), peer()
    listener, address = server.listener()
    server.set_option(listener, "keepalive", 0)
    client.connection(address)
    assert server.keepalive(server.accept(listener)) == expected


def test_option_that_the_policy_leaves_out_is_not_ignored(cgroup_under, connected):
    """Under `enforce` only the policy's own options are."""
    client, number = connected(cgroup_under({"enforced": ("enforce", "idle: 61s")})["enforced"])
    for name, value in (("idle", 15), ("interval", 16), ("probes", 7), ("user_timeout", 8000)):
        client.set_option(number, name, value)
    assert client.options(number) == {
        "keepalive": 1, "idle": 61, "interval": 16, "probes": 7, "user_timeout": 8000,
    }  # fmt: skip


def test_user_timeout_of_nothing_is_the_upper_bound(cgroup_under, connected):
    """0, the system's default, is as if the application had not asked."""
    client, number = connected(cgroup_under({"clamped": ("fill", RANGES)})["clamped"])
    client.set_option(number, "user_timeout", 0)
    assert client.options(number)["user_timeout"] == 120_000


@pytest.mark.parametrize(
    ("mode", "keepalive", "linked"),
    [
        ("fill", "{idle: 61}", False),
        ("override", "{idle: 61}", False),
        ("enforce", "{idle: 61}", True),
        ("fill", "{idle: 61..62}", True),
        ("enforce", "off", True),
        ("override", "off", False),
    ],
)
def test_setsockopt_is_linked_while_a_policy_needs_it(
    cgroup, write_policy, kabpfctl, mode, keepalive, linked
):
    """The program on setsockopt(2) is linked for `enforce` and for ranges, and for nothing else."""
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]\n"
    write_policy("a.yaml", f"{select}mode: {mode}\nkeepalive: {keepalive}\n")
    kabpfctl("apply")
    assert ("kabpf_setsockopt" in pinned("link")) is linked
    write_policy("a.yaml", f"{select}keepalive: {{idle: 61}}\n")
    kabpfctl("apply")
    assert "kabpf_setsockopt" not in pinned("link")


@pytest.mark.parametrize("end", ["connect", "accept"])
def test_multipath_tcp_socket_is_enforced_and_clamped(cgroup_under, peer, kabpfctl, end):
    """On an MPTCP socket calls are ignored and clamped like on any other."""
    cgroups = cgroup_under({"enforced": ("enforce", EXACT), "clamped": ("fill", RANGES)})
    for cgroup in cgroups.values():
        server, client = peer(cgroup if end == "accept" else None), peer(cgroup)
        number, listener, _ = multipath_connection(server, client)
        if end == "accept":
            client, number = server, server.accept(listener)
        client.set_option(number, "idle", 15)
    assert {name: counts[:2] for name, counts in _counted(kabpfctl).items()} == {
        "enforced": (1, 0), "clamped": (0, 1),
    }  # fmt: skip


def _counted(kabpfctl):
    """Ignored, clamped and kept, by policy."""
    status = json.loads(kabpfctl("status", "--json").stdout)
    return {
        one["policy"]: tuple(one["counters"][name] for name in ("ignored", "clamped", "kept"))
        for one in status["policies"]
    }
