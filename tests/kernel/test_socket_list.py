"""`kabpfctl sockets`: whose sockets there are, which options are active, and who set them."""

import json
import os
import pty
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import BIN, PATIENCE, PINS, cgroup_root, path_of, set_sysctl, wait_until

from kabpf.kernel import dataplane

NOBODY = ("setpriv", "--reuid=65534", "--clear-groups")
SYSTEM = dict.fromkeys(("keepalive", "idle_s", "interval_s", "probes", "user_timeout_ms"), "system")
DROP = """
table inet kabpf_test {
    chain input { type filter hook input priority 0; tcp dport 9000 drop; }
}
"""
HEADS = ["UNIT", "LOCAL", "PEER", "KEEPALIVE", "NEXT", "SET", "BY"]


@pytest.fixture
def find(kabpfctl):
    """The one socket of a cgroup with this local port, as --json has it."""

    def find(cgroup, port):
        done = kabpfctl("sockets", "--json", "--cgroup", cgroup)
        (found,) = (
            one for one in json.loads(done.stdout)["sockets"] if one["local"]["port"] == port
        )
        return found

    return find


@pytest.fixture
def loaded(kabpfctl, other_cgroup):
    """The data plane is loaded, and a policy is on another cgroup."""
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 61)


@pytest.fixture
def connected(peer, cgroup):
    """A client in the cgroup, its socket's number and its port; the server is in no cgroup."""
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    return client, number, client.local_port(number)


def test_options_of_the_application(loaded, connected, cgroup, find):
    """What the application sets itself is shown as it is active, and as the application's."""
    client, number, port = connected
    options = {"keepalive": 1, "idle": 15, "interval": 7, "probes": 4, "user_timeout": 9000}
    for name, value in options.items():
        client.set_option(number, name, value)
    assert client.options(number) == options
    found = find(cgroup, port)
    assert found["keepalive"] is True
    assert (found["idle_s"], found["interval_s"], found["probes"]) == (15, 7, 4)
    assert found["user_timeout_ms"] == 9000
    assert found["set_by"] == dict.fromkeys(SYSTEM, "application")
    assert (found["policy"], found["source"]) == (None, None)


def test_options_that_nobody_set(loaded, peer, cgroup, namespace, find):
    """Unset options are those of the sysctls of the socket's own network namespace."""
    set_sysctl(namespace, "tcp_keepalive_time", "600")
    set_sysctl(namespace, "tcp_keepalive_intvl", "8")
    set_sysctl(namespace, "tcp_keepalive_probes", "3")
    client = peer(cgroup, namespace)
    number, address = client.listener()
    found = find(cgroup, address[1])
    assert client.options(number)["idle"] == 600
    assert found["keepalive"] is False
    assert (found["idle_s"], found["interval_s"], found["probes"]) == (600, 8, 3)
    assert (found["user_timeout_ms"], found["next_probe_ms"]) == (0, None)
    assert found["set_by"] == SYSTEM
    assert found["network_namespace"] == os.stat(f"/run/netns/{namespace}").st_ino


@pytest.mark.core
def test_options_of_a_policy(connected, cgroup, kabpfctl, write_policy, find):
    """What a policy set is shown as the policy's, with its name, file and line; what it leaves
    alone, and what the application had chosen, is not."""
    client, number, port = connected
    client.set_option(number, "interval", 7)
    text = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: 61, interval: 11}}\n'
    file = write_policy("mine.yaml", text)
    kabpfctl("apply")
    found = find(cgroup, port)
    assert client.options(number)["idle"] == found["idle_s"] == 61
    assert client.options(number)["interval"] == found["interval_s"] == 7
    by_policy = {"keepalive": "policy", "idle_s": "policy", "interval_s": "application"}
    assert found["set_by"] == SYSTEM | by_policy
    assert (found["policy"], found["source"]) == ("mine", f"{file}:1")


def test_policy_whose_file_is_gone(connected, cgroup, kabpfctl, write_policy, find):
    """Files that are others now than those active change nothing but the source."""
    _, _, port = connected
    file = write_policy("mine.yaml", f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: on\n')
    kabpfctl("apply")
    file.unlink()
    found = find(cgroup, port)
    assert (found["keepalive"], found["policy"], found["source"]) == (True, "mine", None)
    assert "mine (file removed)" in kabpfctl("sockets", "--policy", "mine", "--wide").stdout


@pytest.mark.parametrize(
    ("rule", "chosen", "idle", "setter"),
    [
        ("keepalive: {idle: 30s..5m}", None, 300, "policy"),
        ("keepalive: {idle: 30s..5m}", 15, 30, "application"),
        ("keepalive: {idle: 30s..5m}", 100, 100, "application"),
        ("keepalive: {idle: 61}\nmode: override", 100, 61, "policy"),
        ("keepalive: {idle: 61}\ndestinations: [{to: 127.0.0.0/8, idle: 33}]", None, 33, "policy"),
        ("keepalive: {idle: 61}\ndirection: in", 100, 100, "application"),
    ],
    ids=["range", "below-the-range", "in-the-range", "override", "destination", "other-direction"],
)
def test_who_set_an_option_under_any_rule(
    connected, cgroup, kabpfctl, write_policy, find, rule, chosen, idle, setter
):
    """The setter is told by the rule that applies to the connection."""
    client, number, port = connected
    if chosen:
        client.set_option(number, "idle", chosen)
    write_policy("mine.yaml", f'select: [{{cgroup: "{path_of(cgroup)}"}}]\n{rule}\n')
    kabpfctl("apply")
    assert client.options(number)["idle"] == idle
    found = find(cgroup, port)
    assert (found["idle_s"], found["set_by"]["idle_s"]) == (idle, setter)


@pytest.mark.core
@pytest.mark.parametrize(
    ("listening", "connecting", "family"),
    [("127.0.0.1", "127.0.0.1", "ipv4"), ("::1", "::1", "ipv6"), ("::", "127.0.0.1", "ipv6")],
    ids=["ipv4", "ipv6", "v4-mapped"],
)
def test_addresses(loaded, peer, cgroup, find, listening, connecting, family):
    """Both ends are shown; an IPv4 connection of an IPv6 socket has IPv4 addresses."""
    server, client = peer(cgroup), peer()
    kinds = {True: socket.AF_INET6, False: socket.AF_INET}
    listener = server.open_socket(kinds[":" in listening])
    _, port = server.listen(listener, [listening, 0])
    number = client.connection([connecting, port], kinds[":" in connecting])
    server.accept(listener)
    server.close(listener)
    found = find(cgroup, port)
    assert found["state"] == "established"
    assert found["family"] == family
    assert found["local"] == {"address": connecting, "port": port}
    assert found["peer"] == {"address": connecting, "port": client.local_port(number)}


def test_listener_has_no_next_probe(peer, cgroup, kabpfctl, find):
    """A covered listener has keepalive on, for those that it accepts, and sends no probes."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    _, address = peer(cgroup).listener()
    found = find(cgroup, address[1])
    assert (found["state"], found["keepalive"], found["idle_s"]) == ("listen", True, 61)
    assert found["next_probe_ms"] is None


@pytest.mark.core
def test_next_probe_counts_down_from_idle(connected, cgroup, kabpfctl, find):
    """On a silent connection the time to the next probe runs from idle towards 0."""
    _, _, port = connected
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    first = find(cgroup, port)["next_probe_ms"]
    assert 55_000 < first <= 61_000
    wait_until(lambda: find(cgroup, port)["next_probe_ms"] < first - 100, "the countdown")


def test_next_probe_counts_anew_after_receipt(peer, cgroup, kabpfctl, find):
    """What is received puts the next probe off, though the timer runs on as it was set."""
    server, client = peer(), peer(cgroup)
    listener, address = server.listener()
    client.connection(address)
    port = client.local_port(0)
    accepted = server.accept(listener)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    counted = 61_000 - 500 * PATIENCE
    wait_until(lambda: find(cgroup, port)["next_probe_ms"] < counted, "the countdown")
    server.send(accepted)
    assert find(cgroup, port)["next_probe_ms"] > counted


def test_next_probe_to_a_silent_peer_is_an_interval_away(peer, cgroup, namespace, kabpfctl, find):
    """After a probe that nobody answers the next one is due after the interval, not after idle."""
    server, client = peer(None, namespace), peer(cgroup, namespace)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 1, "--interval", 40)
    address = server.listen(server.open_socket(socket.AF_INET), ["127.0.0.1", 9000])
    port = client.local_port(client.connection(address))
    command = ["ip", "netns", "exec", namespace, "nft", "-f", "-"]
    subprocess.run(command, input=DROP, text=True, check=True)
    wait_until(lambda: find(cgroup, port)["next_probe_ms"] > 1000, "the first probe")
    assert 30_000 < find(cgroup, port)["next_probe_ms"] <= 40_000


@pytest.mark.core
def test_filters(make_cgroup, peer, kabpfctl, write_policy):
    """Each filter alone, and two together, give the sockets that they describe."""
    top = make_cgroup("top")
    service, other = make_cgroup("top/web@1.service/inner"), make_cgroup("top/plain")
    selector = f'select: [{{cgroup: "{path_of(service.parent)}"}}]'
    write_policy("web.yaml", f"{selector}\nkeepalive: on\n")
    kabpfctl("apply")
    web, plain = (peer(each).listener()[1][1] for each in (service, other))

    def ports(*filters):
        found = json.loads(kabpfctl("sockets", "--json", *filters).stdout)["sockets"]
        return {one["local"]["port"] for one in found}

    assert ports("--cgroup", top) == {web, plain}
    assert ports("--cgroup", path_of(service)) == {web}
    assert ports("--cgroup", other) == {plain}
    assert ports("--unit", "web@1.service") == ports("--unit", "web@*.service") == {web}
    assert ports("--unit", "web@1") == {web}
    assert ports("--policy", "web") == {web}
    assert ports("--cgroup", top, "--without-keepalive") == {plain}
    assert ports("--without-keepalive") >= {plain}
    assert web not in ports("--without-keepalive")


def test_filter_by_what_is_not_there_is_refused(loaded, kabpfctl):
    """A unit or cgroup that does not exist, and a policy that is not active, are errors."""
    for command in ("sockets", "monitor", "explain"):
        unit = () if command == "explain" else ("--unit",)
        none = kabpfctl(command, *unit, "kabpf-no-such", status=1)
        assert (none.stdout, none.stderr) == (
            "",
            "kabpfctl: kabpf-no-such: no such unit, running or installed;"
            " try: systemctl list-units --all\n",
        )
        cgroup = () if command == "explain" else ("--cgroup",)
        assert kabpfctl(command, *cgroup, "/kabpf-no-such", status=1).stderr == (
            "kabpfctl: cgroup /kabpf-no-such: No such file or directory,"
            f" expected a directory below {cgroup_root()}\n"
        )
    none = kabpfctl("sockets", "--policy", "no-such", status=1)
    assert none.stderr == ("kabpfctl: policy no-such is not active; try: kabpfctl status\n")


def test_socket_of_a_removed_cgroup(loaded, make_cgroup, peer, kabpfctl):
    """A socket may outlive its cgroup; it is listed with the path that this had, and a mark."""
    gone = make_cgroup("web.service")
    path = path_of(gone)
    holder = peer(gone)
    _, address = holder.listener()
    (gone.parent / "cgroup.procs").write_text(str(holder.process.pid))
    gone.rmdir()
    local = f"127.0.0.1:{address[1]}"
    (line,) = (each for each in kabpfctl("sockets").stdout.splitlines() if local in each)
    assert line.split()[:2] == [path, "(removed)"]
    listed = json.loads(kabpfctl("sockets", "--json").stdout)["sockets"]
    (found,) = (each for each in listed if each["local"]["port"] == address[1])
    assert (found["cgroup"], found["unit"], found["removed"]) == (path, "web.service", True)
    for option, value in (("--unit", "web.service"), ("--cgroup", path.rpartition("/")[0])):
        assert local in kabpfctl("sockets", option, value).stdout
    assert "  1 removed cgroup still has open sockets\n" in kabpfctl("status").stdout
    assert json.loads(kabpfctl("status", "--json").stdout)["removed_with_sockets"] == 1
    explained = kabpfctl("explain", holder.process.pid).stdout
    assert re.search(rf"web.service \(removed\) +{local} .*listen", explained)
    holder.end()
    wait_until(lambda: "removed" not in kabpfctl("status").stdout, "the cgroup to be forgotten")


def test_socket_of_a_cgroup_that_was_never_known(make_cgroup, peer, kabpfctl, cgroup):
    """One that was removed before kabpf was loaded has no name, and counts nowhere. In a cgroup
    namespace, as here, it may as well be outside."""
    gone = make_cgroup("gone")
    holder = peer(gone)
    _, address = holder.listener()
    (gone.parent / "cgroup.procs").write_text(str(holder.process.pid))
    gone.rmdir()
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    local = f"127.0.0.1:{address[1]}"
    (line,) = (each for each in kabpfctl("sockets").stdout.splitlines() if local in each)
    assert line.startswith("? ")
    (found,) = (
        each
        for each in json.loads(kabpfctl("sockets", "--json").stdout)["sockets"]
        if each["local"]["port"] == address[1]
    )
    assert (found["cgroup"], found["removed"]) == (None, False)
    assert "removed" not in kabpfctl("status").stdout


def test_json_of_a_socket(loaded, make_cgroup, peer, find):
    """A socket's object has these members, however much is known."""
    cgroup = make_cgroup("web.service/inner")
    port = peer(cgroup).listener()[1][1]
    assert find(cgroup, port) == {
        "cgroup": path_of(cgroup),
        "cgroup_id": cgroup.stat().st_ino,
        "container": None,
        "removed": False,
        "unit": "web.service",
        "network_namespace": os.stat("/proc/self/ns/net").st_ino,
        "family": "ipv4",
        "local": {"address": "127.0.0.1", "port": port},
        "peer": {"address": "0.0.0.0", "port": 0},
        "state": "listen",
        "keepalive": False,
        "idle_s": 7200,
        "interval_s": 75,
        "probes": 9,
        "user_timeout_ms": 0,
        "next_probe_ms": None,
        "set_by": SYSTEM,
        "policy": None,
        "source": None,
    }


@pytest.mark.core
def test_plain_table(make_cgroup, peer, kabpfctl, write_policy):
    """Without a terminal there is a line for each socket: its unit and what is around that but for
    slices, or its path."""
    cgroup = make_cgroup("odd\x1b[31mname")
    text = "{select: [{unit: web.service}], keepalive: {idle: 61, user_timeout: 1500ms}}\n"
    file = write_policy("mine.yaml", text)
    kabpfctl("apply")
    port = peer(cgroup).listener()[1][1]
    web_cgroup = make_cgroup("web.service")
    web = peer(web_cgroup)
    number = web.connection(["127.0.0.1", port])
    web.set_option(number, "interval", 7)
    web.set_option(number, "probes", 5)
    done = kabpfctl("sockets", "--cgroup", cgroup.parent)
    heads, *lines = done.stdout.splitlines()
    assert heads.split() == HEADS
    first, _accepted, second = (line.split(maxsplit=5) for line in lines)
    shown = path_of(cgroup).replace("\x1b", "\\x1b")
    assert first == [shown, f"127.0.0.1:{port}", "*", "off", "-", "system"]
    local = f"127.0.0.1:{web.local_port(number)}"
    assert 55 < float(second.pop(4).removesuffix("s")) <= 61
    assert second == [
        path_of(web_cgroup), local, f"127.0.0.1:{port}", "61s/7s/5", "mine, application",
    ]  # fmt: skip
    assert done.stderr == ""
    wide = kabpfctl("sockets", "--cgroup", cgroup.parent, "--wide").stdout.splitlines()[-1]
    cells = wide.split(maxsplit=11)
    assert 55 < float(cells.pop(10).removesuffix("s")) <= 61
    assert cells == [
        path_of(web_cgroup), str(os.stat("/proc/self/ns/net").st_ino), local, f"127.0.0.1:{port}",
        "established", "on", "61s", "7s", "5", "1500ms",
        f"mine ({file}:1), application (interval, probes)",
    ]  # fmt: skip


def test_rows_of_several_network_namespaces_name_them(
    loaded, connected, peer, cgroup, namespace, kabpfctl
):
    """Two listeners of one address in two network namespaces are two rows that differ."""
    client, _, _ = connected
    _, address = client.listener()
    inside = peer(cgroup, namespace)
    inside.listen(inside.open_socket(socket.AF_INET), address)
    heads, *lines = kabpfctl("sockets", "--cgroup", cgroup).stdout.splitlines()
    assert heads.split() == [HEADS[0], "NETNS", *HEADS[1:]]
    rows = [line.split() for line in lines if f" {address[0]}:{address[1]} " in line]
    own, other = (os.stat(path).st_ino for path in ("/proc/self/ns/net", f"/run/netns/{namespace}"))
    assert {row[1] for row in rows} == {str(own), str(other)}
    assert rows[0][0] == rows[1][0] == path_of(cgroup)


def test_table_on_a_terminal(loaded, connected, cgroup):
    """On a terminal the table fits, and every row and column is there."""
    _, _, port = connected
    heads, *rows = filter(None, on_terminal(80, cgroup))
    assert heads.split() == HEADS
    assert max(map(len, [heads, *rows])) <= 80
    assert any(f":{port} " in row and row.endswith("  system") for row in rows)


@pytest.mark.core
def test_user_without_privilege_sees_the_sockets_of_his_namespace(
    connected, peer, cgroup, kabpfctl, namespace
):
    """Without root inet_diag tells the cgroup, and whether a keepalive timer runs."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 610)
    _, _, port = connected
    listening = peer(cgroup).listener()[1][1]
    peer(cgroup, namespace).listener()
    done = as_nobody("sockets", "--json", "--cgroup", str(cgroup))
    assert (done.returncode, done.stderr) == (0, "kabpfctl: options are not shown: needs root\n")
    found = {one["local"]["port"]: one for one in json.loads(done.stdout)["sockets"]}
    assert found.keys() == {port, listening}
    assert found[port]["cgroup"] == path_of(cgroup)
    assert found[port]["cgroup_id"] == cgroup.stat().st_ino
    assert (found[port]["state"], found[port]["keepalive"]) == ("established", True)
    assert 500_000 < found[port]["next_probe_ms"] <= 610_000
    assert (found[port]["idle_s"], found[port]["set_by"]) == (None, {})
    assert (found[listening]["state"], found[listening]["keepalive"]) == ("listen", None)


def test_user_without_privilege_sees_no_policies(loaded):
    """Which policy a socket has is for root to see."""
    done = as_nobody("sockets", "--policy", "any")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "kabpfctl: --policy needs root\n"


def test_without_the_data_plane_inet_diag_is_asked(connected, cgroup, kabpfctl):
    """Where kabpf is not in the kernel, root gets what anybody gets, and is told why."""
    _, _, port = connected
    done = kabpfctl("sockets", "--cgroup", cgroup, "--without-keepalive")
    assert done.stderr == (
        "kabpfctl: options are not shown: the data plane is not loaded; try: kabpfctl apply\n"
    )
    _, line = done.stdout.splitlines()
    assert line.split()[0] == path_of(cgroup)
    assert line.split()[1] == f"127.0.0.1:{port}"
    assert line.split()[3:] == ["off", "-", "?"]


def test_without_pyroute2_the_package_is_named(tmp_path):
    """inet_diag needs pyroute2; without it the error says which package has it."""
    done = subprocess.run(
        [BIN / "kabpfctl", "sockets"],
        env=without(tmp_path, "pyroute2"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "kabpfctl: pyroute2 is missing; install python3-pyroute2 (Debian, Fedora)\n"
    )


def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    if subprocess.run([*NOBODY, "test", "-x", BIN / "kabpfctl"]).returncode:
        pytest.skip(f"{BIN} is in a directory that only root may enter")
    return subprocess.run([*NOBODY, BIN / "kabpfctl", *arguments], capture_output=True, text=True)


def without(directory: Path, *modules: str) -> dict[str, str]:
    """An environment in which these modules can't be imported."""
    for module in modules:
        (directory / f"{module}.py").write_text("raise ImportError\n")
    return {**os.environ, "PYTHONPATH": str(directory)}


def on_terminal(columns: int, cgroup: Path) -> list[str]:
    """What `kabpfctl sockets` writes to a terminal so wide, without colours."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [BIN / "kabpfctl", "sockets", "--cgroup", cgroup],
        env={**os.environ, "COLUMNS": str(columns), "TERM": "dumb"},
        stdout=theirs,
    )
    os.close(theirs)
    assert done.returncode == 0
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # EIO: nobody has the other end any more
        pass
    os.close(ours)
    return written.decode().split("\r\n")


def test_value_of_a_former_policy_is_told_as_such(cgroup, peer, kabpfctl):
    """What a policy left on an open socket that the present one does not change is neither that
    one's nor the application's."""
    _, address = peer().listener()
    client = peer(cgroup)
    client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--interval", 11)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62)
    shown = json.loads(kabpfctl("sockets", "--cgroup", cgroup, "--json").stdout)["sockets"]
    assert [one["set_by"] for one in shown] == [
        {
            "idle_s": "policy", "interval_s": "former policy", "probes": "system",
            "user_timeout_ms": "system", "keepalive": "policy",
        }
    ]  # fmt: skip
    assert "former policy (interval)" in kabpfctl("sockets", "--wide", "--cgroup", cgroup).stdout


IN_TURN = """\
import os, socket, sys
found = []
for cgroup in sys.argv[1:3]:
    with open(f"{cgroup}/cgroup.procs", "w") as file:
        file.write("0")
    found.append(socket.create_server(("127.0.0.1", 0)).detach())
for number in range(100, 100 + int(sys.argv[3])):
    os.dup2(found[number % 2], number)
print("there", flush=True)
sys.stdin.read()
"""


def test_no_holder_is_lost_between_two_pieces(loaded, cgroup, other_cgroup):
    """What tells where open sockets are comes in pieces of a thousand; of descriptors of two
    cgroups in turn each is told."""
    count = 3500
    command = [sys.executable, "-c", IN_TURN, cgroup, other_cgroup, str(count)]
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, (count + 200, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        ),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"there\n"
        told = {one.descriptor for one in dataplane.holders(PINS) if one.process == process.pid}
        process.stdin.close()
    assert set(range(100, 100 + count)) - told == set()
