"""Containers are covered by what their engine knows of them: Docker's files, and cgroups as it
makes them."""

import contextlib
import json
import os
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import BIN, PATIENCE, UNTOUCHED, options_of_new, wait_until
from measured import measured
from watcher import Watcher, require_perf_events

SOCKET = Path("/run/kabpf/containers.socket")
IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}
IDLE_62 = UNTOUCHED | {"keepalive": 1, "idle": 62}
WEB = "select: [{container: {name: web-*, label: {team: shop}}}]\nkeepalive: {idle: 61}\n"


def ask(request, timeout=5 * PATIENCE):
    """What kabpfd answers to a hook's line."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(SOCKET))
        connection.settimeout(timeout)
        line = request if isinstance(request, bytes) else json.dumps(request).encode()
        connection.sendall(line + b"\n")
        return json.loads(connection.makefile().readline())


def test_apply_covers_containers_that_run(container, write_policy, kabpfctl, peer):
    """By name and label; another container, and a cgroup that only has such a name, are left."""
    ours, other = container(), container("db")
    unlabelled, unknown = container(labels={}), container(described=False)
    cgroups = [each.start() for each in (ours, other, unlabelled, unknown)]
    write_policy("a.yaml", WEB)
    kabpfctl("apply")
    found = [options_of_new(peer, each) for each in cgroups]
    assert found == [IDLE_61, UNTOUCHED, UNTOUCHED, UNTOUCHED]


def test_container_is_covered_when_it_is_born(container, write_policy, kabpfd, peer):
    """kabpfd hears of the cgroup and looks at what is on disk; what is below goes with it."""
    write_policy("a.yaml", WEB)
    write_policy("b.yaml", "select: [{unit: '*.service'}]\nkeepalive: {idle: 62}\n")
    kabpfd()
    cgroup = container().start()
    wait_until(lambda: options_of_new(peer, cgroup) == IDLE_61, "the container to be covered")
    unit = cgroup / "system.slice" / "nginx.service"
    unit.mkdir(parents=True)
    assert options_of_new(peer, unit) == IDLE_61


def test_container_that_its_engine_describes_late_is_covered(container, write_policy, kabpfd, peer):
    """kabpfd looks again for a tenth of a second, and sockets of the meantime are updated."""
    write_policy("a.yaml", WEB)
    kabpfd()
    late = container(described=False)
    cgroup = late.start()
    time.sleep(0.03)  # not an event of kabpf's: an engine that is slow
    late.describe()
    wait_until(lambda: options_of_new(peer, cgroup) == IDLE_61, "the container to be covered")


def test_hook_is_answered_when_the_container_is_covered(container, write_policy, kabpfd, peer):
    """Also one that nothing was known of for long; its open sockets are updated then."""
    write_policy("a.yaml", WEB)
    kabpfd()
    late = container(described=False)
    cgroup = late.start()
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    time.sleep(0.3)  # longer than kabpfd looks for it by itself
    asked = {"id": late.id, "cgroup": late.path, "bundle": "/nowhere", "pid": os.getpid()}
    assert ask(asked) == {"error": "no engine knows this container yet"}
    assert client.options(number) == UNTOUCHED
    late.describe()
    assert ask(asked) == {}
    assert client.options(client.connection(address)) == IDLE_61
    wait_until(lambda: client.options(number) == IDLE_61, "its open socket to be updated")


def test_hook_may_name_a_cgroup_in_the_container(container, write_policy, kabpfd, peer):
    """crun has its process in a cgroup below the container's."""
    write_policy("a.yaml", WEB)
    kabpfd()
    late = container(described=False)
    cgroup = late.start()
    inside = cgroup / "container"
    inside.mkdir()
    time.sleep(0.3)  # as above
    late.describe()
    assert ask({"cgroup": f"{late.path}/container"}) == {}
    assert options_of_new(peer, inside) == IDLE_61


def test_hook_of_the_package_finds_kabpfd(container, write_policy, kabpfd, peer, tmp_path):
    """The program itself: the container is covered when it ends."""
    source = Path(__file__).parents[2] / "oci/hook.c"
    subprocess.run(["clang", source, "-o", tmp_path / "hook"], check=True)
    write_policy("a.yaml", WEB)
    kabpfd()
    late = container(described=False)
    cgroup = late.start()
    inside = peer(cgroup)
    time.sleep(0.3)  # as above
    late.describe()
    state = {"id": late.id, "bundle": "/nowhere", "pid": inside.process.pid}
    subprocess.run([tmp_path / "hook"], input=json.dumps(state).encode(), check=True)
    _, address = peer().listener()
    assert inside.options(inside.connection(address)) == IDLE_61


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b"null", b"7", b"{}", b'{"cgroup": 7}', b'{"cgroup": "a"}', b"\xff\xfe",
        b'{"cgroup": "/no/such"}', b'{"cgroup": "/../.."}', b'{"cgroup": "/\\u0000"}',
        b'{"cgroup": "/' + b"a/" * 4000 + b'"}', b"[" * 16000, b'{"cgroup": "/\\ud800"}',
    ],
)  # fmt: skip
def test_hook_that_asks_nonsense_gets_an_error(line, container, write_policy, kabpfd):
    """Whatever the line is, and kabpfd goes on."""
    write_policy("a.yaml", WEB)
    kabpfd()
    assert list(ask(line)) == ["error"]
    here = container()
    here.start()
    assert ask({"cgroup": here.path}) == {}


def test_hooks_that_say_nothing_keep_no_other_waiting(container, write_policy, kabpfd):
    """Nor do those that say too much, or go."""
    write_policy("a.yaml", WEB)
    kabpfd()
    here = container()
    here.start()
    with ExitStack() as stack:
        for number in range(600):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(str(SOCKET))
            if number % 3:
                silent.send(b'{"cgroup": "/')
            if number % 5 == 0:
                silent.close()
        assert ask({"cgroup": here.path}) == {}
        long = stack.enter_context(socket.socket(socket.AF_UNIX))
        long.connect(str(SOCKET))
        with pytest.raises(OSError):
            for _ in range(1000):
                long.sendall(b"x" * 4096)
        assert ask({"cgroup": here.path}) == {}


def test_socket_is_there_only_for_policies_of_containers(write_policy, kabpfd, tmp_path):
    """A hook finds nobody then, and goes on; root alone may connect."""
    file = write_policy("a.yaml", WEB)
    daemon = kabpfd()
    assert SOCKET.is_socket()
    assert SOCKET.stat().st_mode & 0o777 == 0o600
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(SOCKET)!r})"
    done = subprocess.run(
        [*nobody, "python3", "-c", program], capture_output=True, text=True, cwd="/"
    )
    assert "PermissionError" in done.stderr
    file.write_text("select: [{cgroup: /a}]\nkeepalive: on\n")
    daemon.reload()
    assert not SOCKET.exists()
    file.write_text(WEB)
    daemon.reload()
    assert SOCKET.is_socket()
    assert daemon.stop() == 0
    assert not SOCKET.exists()


def test_kabpfd_that_ends_leaves_no_hook_waiting(container, write_policy, kabpfd):
    """A hook that is connected when kabpfd ends, or has been killed, fails at once."""
    write_policy("a.yaml", WEB)
    here = container()
    here.start()
    daemon = kabpfd()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(SOCKET))
        daemon.process.kill()
        daemon.process.wait()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        ask({"cgroup": here.path})
    kabpfd()
    assert ask({"cgroup": here.path}) == {}


def test_commands_name_containers(container, write_policy, kabpfctl, peer):
    """Tables have a container's name, and commands take it, or the beginning of its id."""
    ours, other = container(), container("db")
    cgroups = [each.start() for each in (ours, other)]
    write_policy("a.yaml", WEB)
    kabpfctl("apply")
    _, address = peer().listener()
    clients = [peer(each) for each in cgroups]
    for client in clients:
        client.connection(address)
    listed = json.loads(kabpfctl("sockets", "--container", "web-*", "--json").stdout)["sockets"]
    assert [(each["cgroup"], each["container"]["name"]) for each in listed] == [
        (ours.path, "web-1")
    ]
    assert json.loads(kabpfctl("sockets", "--container", "no", "--json").stdout)["sockets"] == []
    names = {line.split()[0] for line in kabpfctl("sockets").stdout.splitlines()}
    assert {"web-1", "db"} <= names
    for what in ("web-1", ours.id[:12]):
        (explained,) = json.loads(kabpfctl("explain", what, "--json").stdout)["cgroups"]
        assert (explained["cgroup"], explained["policy"]) == (ours.path, "a")
        assert explained["selector"].keys() == {"container", "source"} and explained["active"]
    assert [line.split()[0] for line in kabpfctl("plan").stdout.splitlines()][1] == "web-1"
    assert "containers: engines: docker" in " ".join(kabpfctl("doctor").stdout.split())


def test_monitor_tells_of_a_container_alone(container, write_policy, kabpfctl, peer):
    """By its name, a glob or the beginning of its id; also of one that starts while it listens."""
    require_perf_events()
    ours, other = container(), container("db")
    cgroups = [each.start() for each in (other, ours)]
    write_policy("a.yaml", WEB.replace("name: web-*, ", ""))
    kabpfctl("apply")
    _, address = peer().listener()
    clients = [peer(each) for each in cgroups]
    with ExitStack() as stack:

        def watch(name):
            watcher = Watcher("--container", name)
            stack.callback(watcher.end)
            return watcher

        nobody, later, *watchers = map(watch, ("no", "web-2", "web-1", "web-?", ours.id[:12]))
        for client in clients:
            client.connection(address)
        for watcher in watchers:
            event = watcher.next()
            assert (event["event"], event["cgroup"]) == ("set", ours.path)
            assert event["container"]["name"] == "web-1"
        late = container("web-2")
        started = late.start()
        kabpfctl("apply")
        peer(started).connection(address)
        event = later.next()
        assert (event["event"], event["cgroup"], event["container"]["id"]) == (
            "set", late.path, late.id,
        )  # fmt: skip
        glob = watchers[1]
        assert glob.next()["container"]["name"] == "web-2"
        clients[1].connection(address)
        assert glob.next()["container"]["name"] == "web-1"
        for watcher in (nobody, later):
            assert watcher.next(1) is None


def test_line_of_monitor_begins_with_the_containers_name(container, write_policy, kabpfctl, peer):
    """In the place of the cgroup's, which has an id."""
    require_perf_events()
    cgroup = container().start()
    write_policy("a.yaml", WEB)
    kabpfctl("apply")
    _, address = peer().listener()
    command = [BIN / "kabpfctl", "monitor", "--container", "web-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout.readline().startswith("TIME ")  # it listens
        peer(cgroup).connection(address)
        assert monitor.stdout.readline().split()[1:3] == ["set", "web-1"]
        monitor.terminate()


def test_thousand_containers_are_covered_in_a_second(container, write_policy, kabpfctl, peer):
    """Of processor time, and in 60 MiB."""
    made = [container(f"web-{number}") for number in range(1000)]
    cgroups = [each.start() for each in made]
    write_policy("a.yaml", WEB)
    kabpfctl("apply")  # loads the data plane
    write_policy("a.yaml", WEB.replace("61", "62"))
    status, seconds, megabytes = measured(BIN / "kabpfctl", "apply")
    assert status == 0
    assert seconds < 1 * PATIENCE
    assert megabytes < 60
    assert options_of_new(peer, cgroups[-1]) == IDLE_62
