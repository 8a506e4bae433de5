"""`kabpfctl audit` against a firewall that forgets: what it calls at risk hangs, and what it calls
safe goes on. The table of all situations is in tests/unit/audit/test_silence.py."""

import json
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
from harness import DROP_INS, PATIENCE, wait_until

pytestmark = pytest.mark.core

FORGETS_S = 3
SILENCE_S = 4.5  # from the last packet on, with room for the firewall's second
ANSWER_S = 1.5
# A connection is taken up again in its middle without tcp_loose=0.
FIREWALL = f"""
set -e
cd /proc/sys/net
echo 1 >ipv4/ip_forward
echo 1 >ipv6/conf/all/forwarding
nft -f - <<'END'
table inet filter {{
    chain known {{
        ct state established accept
        ct state new tcp flags & (syn | ack) == syn accept
        meta l4proto tcp drop
    }}
    chain forward {{ type filter hook forward priority 0; jump known; }}
    chain input {{ type filter hook input priority 0; jump known; }}
}}
END
echo 0 >netfilter/nf_conntrack_tcp_loose
for state in established close_wait fin_wait last_ack max_retrans unacknowledged; do
    echo {FORGETS_S} >netfilter/nf_conntrack_tcp_timeout_$state
done
"""
DROP = """
table inet kabpf_test {
    chain input { type filter hook input priority 0; tcp dport 9001 drop; }
}
"""
RTO_MAX = Path("/proc/sys/net/ipv4/tcp_rto_max_ms")  # since Linux 6.15
MPTCP = 262
HOSTS = {socket.AF_INET: "10.9.2.2", socket.AF_INET6: "fd09:2::2"}


def within(namespace: str, script: str) -> None:
    command = ["ip", "netns", "exec", namespace, "sh", "-c", script]
    subprocess.run(command, check=True, text=True)


@pytest.fixture
def network(make_namespace):
    """A client's and a server's network namespace, and the firewall between them."""
    client, firewall, server = (make_namespace() for _ in range(3))
    for number, name in ((1, client), (2, server)):
        within(
            name,
            f"set -e; ip link add eth0 type veth peer name side{number} netns {firewall};"
            f" ip address add 10.9.{number}.2/24 dev eth0; ip link set eth0 up;"
            f" ip address add fd09:{number}::2/64 dev eth0 nodad;"
            f" ip -n {firewall} address add 10.9.{number}.1/24 dev side{number};"
            f" ip -n {firewall} address add fd09:{number}::1/64 dev side{number} nodad;"
            f" ip -n {firewall} link set side{number} up;"
            f" ip route add default via 10.9.{number}.1; ip route add default via fd09:{number}::1;"
            " echo 1 >/proc/sys/net/mptcp/enabled;"
            f" [ ! -e {RTO_MAX} ] || echo 1000 >{RTO_MAX}",
        )
    within(firewall, FIREWALL)
    return client, firewall, server


class Network:
    """Makes connections between a client in the cgroup and its peers, by what they are for."""

    def __init__(self, peer, cgroup, network):
        namespace, firewall, server = network
        self.client = peer(cgroup, namespace)
        self.server = peer(None, server)
        self.near = peer(None, firewall)
        self.own = peer(None, namespace)
        self.made = {}  # by name: who sends, who receives, and their sockets' numbers
        self._listeners = {}

    def open(self, name, family=socket.AF_INET, *, to=None, host=None, kind=0, **options):
        """A connection of the client's; the numbers of both ends."""
        server = to or self.server
        host = host or HOSTS[family]
        key = server, family, kind
        if key not in self._listeners:
            number = server.open_socket(family, socket.SOCK_STREAM, kind)
            self._listeners[key] = number, server.listen(number, [host, 0])
        listener, address = self._listeners[key]
        number = self.client.open_socket(family, socket.SOCK_STREAM, kind)
        self.client.connect(number, address)
        accepted = server.accept(listener)
        for option, value in options.items():
            self.client.set_option(number, option, value)
        self.made[name] = self.client, number, server, accepted
        return number, accepted

    def accept(self, name):
        """A connection that the client accepts."""
        listener = self.client.open_socket(socket.AF_INET)
        address = self.client.listen(listener, ["10.9.1.2", 0])
        number = self.server.connection(address)
        self.made[name] = self.client, self.client.accept(listener), self.server, number

    def swap(self, name):
        """Have the other end send."""
        sender, number, receiver, other = self.made[name]
        self.made[name] = receiver, other, sender, number

    def ends(self, name):
        """The ports of the client's end."""
        one, number, other, others = self.made[name]
        if one is not self.client:
            one, number = other, others
        return one.local_port(number), one.remote_port(number)

    def go_on(self):
        """Which connections bring a byte to the other end. The client does what may take long last:
        to send into a window that opens only then."""
        made = sorted(self.made.items(), key=lambda item: item[1][0] is self.client)
        for _, (sender, number, _, _) in made:
            if sender is not self.client:
                sender.send(number, "x")
        receivers = {receiver for _, (_, _, receiver, _) in made} - {self.client}
        for receiver in receivers:
            numbers = [to[3] for _, to in made if to[2] is receiver]
            receiver.tell("received", numbers, ANSWER_S * PATIENCE)
        for _, (sender, number, _, _) in made:
            if sender is self.client:
                sender.send(number, "x")
        names = [name for name, to in made if to[2] is self.client]
        counts = self.client.received([self.made[name][3] for name in names], 0.1)
        for receiver in receivers:
            names += [name for name, to in made if to[2] is receiver]
            counts += receiver.answer()
        return {name for name, count in zip(names, counts, strict=True) if count}


UNIT = "audited.service"


def audited(run_kabpfctl, *arguments, timeout_s=FORGETS_S):
    """What audit says of the unit."""
    done = run_kabpfctl("audit", "--unit", UNIT, "--timeout", timeout_s, "--json", *arguments)
    (unit,) = json.loads(done.stdout)["units"]
    assert done.returncode == (unit["at_risk"][0]["connections"] > 0)
    return unit


def called(unit, network):
    """The names of the connections that are at risk."""
    listed = unit["connections_at_risk"]
    ends = {(one["local"]["port"], one["peer"]["port"]) for one in listed}
    return {name for name in network.made if network.ends(name) in ends}


def test_what_is_at_risk_hangs_and_the_rest_goes_on(
    peer, make_cgroup, other_cgroup, network, kabpfctl, run_kabpfctl
):
    """Also where kabpf is not loaded: then some can't be judged, and none is judged wrongly. What
    `suggest` writes then leaves none at risk, as `audit --with` has said."""
    there = Network(peer, make_cgroup(UNIT), network)
    on = {"keepalive": 1, "idle": 1, "interval": 1}
    # Its first probe comes in time, its second one too late.
    there.open("interval above", keepalive=1, idle=1, interval=200)
    there.open("idle")
    there.accept("accepted")
    there.open("of IPv6", socket.AF_INET6)
    there.open("of MPTCP", kind=MPTCP)
    there.open("of IPv4, mapped", socket.AF_INET6, to=there.near, host="::ffff:10.9.1.1")
    there.open("to the same network", to=there.near, host="10.9.1.1")
    there.open("keepalive of the system", keepalive=1)
    there.open("keepalive above", keepalive=1, idle=60)
    there.open("user timeout", user_timeout=1000)
    there.open("keepalive below", **on)
    there.open("keepalive of IPv6", socket.AF_INET6, **on)
    there.open("keepalive and user timeout", **on, user_timeout=60000)
    there.open("loopback", to=there.own, host="10.9.1.2")
    for name, options in (("half closed by us", {}), ("half closed by us, keepalive", on)):
        number, _ = there.open(name, **options)
        there.client.shut(number)
        there.swap(name)
    for name, options in (
        ("half closed by the peer", {}),
        ("half closed by the peer, keepalive", on),
    ):
        _, accepted = there.open(name, **options)
        there.server.shut(accepted)
    expected = {
        "idle", "accepted", "of IPv6", "of MPTCP", "of IPv4, mapped", "to the same network",
        "user timeout", "interval above", "keepalive of the system", "keepalive above",
        "half closed by us", "half closed by the peer", "just opened",
    }  # fmt: skip
    if RTO_MAX.exists():
        number, accepted = there.open("closed window")
        there.client.send_all_that_fits(number)
        lost = there.server.open_socket(socket.AF_INET)
        address = there.server.listen(lost, ["10.9.2.2", 9001])
        number = there.client.connection(address)
        there.made["sent again"] = there.client, number, there.server, there.server.accept(lost)
        drop = ["ip", "netns", "exec", network[2], "nft", "-f", "-"]
        subprocess.run(drop, input=DROP, text=True, check=True)
        there.client.send(number, "lost at first")
        sent_again = re.compile(r"timer:\(on,[^,]*,[1-9]")
        command = ["ip", "netns", "exec", network[0], "ss", "-Htno", "dport", "9001"]
        wait_until(
            lambda: sent_again.search(subprocess.check_output(command, text=True)) is not None,
            "a retransmission",
        )
    # What is no connection that anybody could lose: a listener, one that is being opened, and ones
    # that are closed.
    opening = there.client.open_socket(socket.AF_INET)
    there.client.begin_to_connect(opening, ["10.9.2.99", 9000])
    for is_over in (False, True):
        number, accepted = there.open("closed")
        there.client.close(number)
        if is_over:
            there.server.close(accepted)
    del there.made["closed"]
    there.open("just opened")
    timers = ["ip", "netns", "exec", network[0], "ss", "-Htno"]
    wait_until(
        lambda: "timer:(keepalive,3min" in subprocess.check_output(timers, text=True),
        "the first probe",
    )
    began = time.monotonic()

    unit = audited(run_kabpfctl)
    assert called(unit, there) == expected
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 61)
    assert unit["unknown"] == sum("keepalive" in name for name in there.made) - 2
    unit = audited(run_kabpfctl)
    assert called(unit, there) == expected
    assert (unit["unknown"], unit["loopback"], unit["same_network"]) == (0, 1, 2)

    time.sleep(max(0, began + SILENCE_S - time.monotonic()))
    if RTO_MAX.exists():
        within(network[2], "nft delete table inet kabpf_test")
    assert there.go_on() == there.made.keys() - expected

    suggest = ("suggest", "--unit", UNIT, "--timeout", 12)
    assert f"{UNIT}.yaml" in kabpfctl(*suggest).stdout
    assert not (DROP_INS / f"{UNIT}.yaml").exists()
    (made,) = json.loads(kabpfctl(*suggest, "--write", "--json").stdout)["policies"]
    assert made["text"] == (DROP_INS / f"{UNIT}.yaml").read_text()
    unit = audited(run_kabpfctl, "--with", DROP_INS / f"{UNIT}.yaml", timeout_s=12)
    assert unit["at_risk"][0]["connections"] > unit["at_risk"][0]["with_file"] == 0
    kabpfctl("apply")
    unit = audited(run_kabpfctl, timeout_s=12)
    # One that is silent already is probed when it has been so for idle once more.
    left = unit["connections_at_risk"]
    assert {(one["reason"], one["silence_ms"] > 5000) for one in left} <= {
        ("keepalive's timer", True)
    }
    assert unit["at_risk"][0]["without_policies"] > len(left)
