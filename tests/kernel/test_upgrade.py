"""A new version takes over what an old one has active, and the other way round."""

import json
import os
import shutil
import signal
import socket
from contextlib import contextmanager

import held
import pytest
import versions
from harness import PINS, UNTOUCHED, WATCHDOG, options_of_new, path_of, pinned, wait_until

IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}


def _policy(cgroup, keepalive):
    return f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {keepalive}\n'


@pytest.fixture
def connecting(peer, tmp_path):
    """Has a client in a cgroup connect all the time; how often it had which options."""

    @contextmanager
    def connect(cgroup):
        running = tmp_path / "running"
        running.touch()
        server, client = peer(), peer(cgroup)
        listener, address = server.listener()
        client.tell("connect_while", address, str(running))

        def more(count=20):
            server.tell("accept_many", listener, count)
            server.answer()

        more()
        seen = {}
        try:
            yield seen
            more()
        finally:
            running.unlink()
        seen.update((key, count) for key, count in client.answer().items())

    return connect


def _link():
    return pinned("link")["kabpf_sockops"]


def _left_beside():
    return [name for name in os.listdir(PINS.parent) if name.startswith("kabpf-")]


def _ids():
    """The ids of what is pinned, and of the programs in the links."""
    links = pinned("link").values()
    return {
        "prog": {one["prog_id"] for one in links},
        "map": {one["id"] for one in pinned("map").values()},
    }


def wait_until_verified(version):
    """A busy socket's lock may be taken for a held one on a busy processor; the next apply mends
    that, and nothing else may be missing."""

    def is_verified():
        done = version.run("verify")
        if "are not updated yet" in done.stdout:
            version.kabpfctl("apply")
            return False
        assert done.returncode == 0, done.stdout
        return True

    wait_until(is_verified, "the update of open sockets")


def wait_until_gone(ids):
    """The kernel lets go of them after grace periods, which are long on a busy processor."""

    def are_gone():
        return not any(
            gone & {one["id"] for one in held.listed(kind, "list")} for kind, gone in ids.items()
        )

    wait_until(are_gone, "the end of the old version", 60)


def _status(version):
    return json.loads(version.kabpfctl("status", "--json").stdout)


@pytest.mark.parametrize(
    ("verb", "other"),
    [
        ("apply", "rebuilt"),
        ("apply", "relaid"),
        ("apply", "renamed"),
        ("apply", "no-exchange"),
        ("apply", "former"),
        ("attach", "relaid"),
        ("restart", "rebuilt"),
        ("restart", "relaid"),
        ("restart", "former"),
    ],
)
def test_upgrade_and_downgrade_miss_no_connection(
    cgroup, make_cgroup, write_policy, version, kabpfd, connecting, verb, other
):
    """While versions take over from each other every connection has its options, the link of the
    sock_ops program stays the same, and the programs and maps before are gone."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}"))
    old, new = version("this"), version(other)
    daemon = kabpfd(*old.command("daemon")) if verb == "restart" else old.kabpfctl("apply")
    link, before = _link()["id"], _ids()
    with connecting(cgroup) as seen:
        for following in (new, old):
            if verb == "apply":
                following.kabpfctl("apply")
            elif verb == "attach":
                following.kabpfctl("attach", "--cgroup", make_cgroup("else"), "--idle", "62")
            else:
                daemon.stop(signal.SIGKILL)
                daemon = kabpfd(*following.command("daemon"))
            assert _left_beside() == []
            assert _link()["id"] == link
            now = _ids()
            assert not now["prog"] & before["prog"]
            wait_until_gone(before)
            before = now
            wait_until_verified(following)
    assert list(map(json.loads, seen)) == [IDLE_61]


@pytest.mark.core
def test_upgrade_of_the_same_layout_keeps_the_counters(cgroup, write_policy, version, peer):
    """What was counted before is counted still."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}"))
    version("this").kabpfctl("apply")
    options_of_new(peer, cgroup)
    (before,) = _status(version("this"))["policies"]
    assert before["counters"]["established"] == 1
    version("rebuilt").kabpfctl("apply")
    assert _status(version("rebuilt"))["policies"] == [before]


def test_upgrade_with_a_changed_policy_moves_open_sockets(cgroup, write_policy, version, peer):
    """The values of the former policy are told from the application's own over the upgrade."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 60, interval: 10}"))
    version("this").kabpfctl("apply")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    client.set_option(number, "interval", 7)
    write_policy("a.yaml", _policy(cgroup, "{idle: 30, interval: 20}"))
    version("rebuilt").kabpfctl("apply")
    assert client.options(number) == UNTOUCHED | {"keepalive": 1, "idle": 30, "interval": 7}


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
def test_upgrade_keeps_destinations(cgroup, write_policy, version, peer, other):
    """Rows by destination, those that turn keepalive off as well, are there after the upgrade."""
    rows = "[{to: 127.0.0.1, keepalive: off}, {to: 127.0.0.2, idle: 62}]"
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}") + f"destinations: {rows}\n")
    version("this").kabpfctl("apply")
    version(other).kabpfctl("apply")
    server, client = peer(), peer(cgroup)
    for host, expected in (
        ("127.0.0.1", UNTOUCHED),
        ("127.0.0.2", IDLE_61 | {"idle": 62}),
        ("127.0.0.3", IDLE_61),
    ):
        address = server.listen(server.open_socket(socket.AF_INET), [host, 0])
        assert client.options(client.connection(address)) == expected


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
def test_upgrade_goes_on_enforcing(cgroup, write_policy, version, peer, other):
    """What applications set is ignored after the upgrade too, by one program."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}") + "mode: enforce\n")
    version("this").kabpfctl("apply")
    before = _ids()
    version(other).kabpfctl("apply")
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    client.set_option(number, "idle", 7)
    assert client.options(number) == IDLE_61
    assert "kabpf_setsockopt" in pinned("link")
    wait_until_gone(before)


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
def test_upgrade_beside_a_wrong_file_leaves_the_old_version_active(
    cgroup, write_policy, version, kabpfd, connecting, other
):
    """Neither kabpfctl nor kabpfd of the new version replaces what is active, both say what is
    wrong, and once the file is right a reload upgrades."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}"))
    version("this").kabpfctl("apply")
    before = _ids()
    bad = write_policy("b.service.yaml", "keepalive: {idle: never}\n")
    done = version(other).kabpfctl("apply", status=1)
    assert done.stderr.startswith(f"kabpfctl: {bad}:1: keepalive.idle: never, expected")
    with connecting(cgroup) as seen:
        daemon = kabpfd(*version(other).command("daemon"))
        problem = f"errors: 1, and the last good policy stays active: {bad}:1: keepalive.idle"
        assert problem in daemon.reload()
        assert _ids() == before
        bad.unlink()
        assert daemon.reload().startswith("1 policy active")
        assert not _ids()["prog"] & before["prog"]
    assert list(map(json.loads, seen)) == [IDLE_61]


def test_watchdog_hears_of_a_daemon_that_a_wrong_file_keeps_from_an_upgrade(
    cgroup, write_policy, version, kabpfd
):
    """systemd does not start it again and again, which would not help."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}"))
    version("this").kabpfctl("apply")
    write_policy("b.service.yaml", "keepalive: {idle: never}\n")
    daemon = kabpfd(*WATCHDOG, *version("relaid").command("daemon"))
    for _ in range(2):
        assert "STATUS=the active policies are of another version of kabpf" in daemon.wait_for(
            "WATCHDOG=1"
        )


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
def test_daemon_beside_kabpfctl_of_another_version(
    cgroup, write_policy, version, kabpfd, connecting, other
):
    """kabpfd takes back what kabpfctl of another version took over, again and again; no connection
    goes without its options, and a reload works."""
    file = write_policy("a.yaml", _policy(cgroup, "{idle: 61}"))
    daemon = kabpfd(*version("this").command("daemon"))
    with connecting(cgroup) as seen:
        for _ in range(2):
            before = _ids()
            version(other).kabpfctl("apply")
            daemon.reload()
            assert not _ids()["prog"] & before["prog"]
            assert _left_beside() == []
            assert _status(version("this"))["policy_files"]["applied"]
    assert list(map(json.loads, seen)) == [IDLE_61]
    file.unlink()
    assert daemon.reload().startswith("0 policies active")
    assert daemon.stop() == 0
    assert not PINS.exists()


@pytest.mark.parametrize("other", ["rebuilt", "relaid"])
def test_daemon_whose_files_were_replaced_leaves_the_new_version_active(
    cgroup, write_policy, version, kabpfd, peer, tmp_path, other
):
    """A package upgrade replaces the files below a running kabpfd: that does not load programs it
    does not know, says what to do, and unloads everything when it stops."""
    write_policy("a.yaml", _policy(cgroup, "{idle: 61}"))
    directory = shutil.copytree(version("this").directory, tmp_path / "installed")
    daemon = kabpfd(*versions.at(directory).command("daemon"))
    shutil.copytree(version(other).directory, directory, dirs_exist_ok=True)
    installed = versions.at(directory)
    installed.kabpfctl("apply")
    before = _ids()
    assert daemon.reload() == (
        "the active policies are of another version of kabpf; errors: 1, and the last good policy"
        f" stays active: {installed.object} was upgraded; try: systemctl restart kabpf"
    )
    assert _ids() == before
    assert options_of_new(peer, cgroup) == IDLE_61
    assert daemon.stop() == 0
    assert not PINS.exists()
    assert _left_beside() == []
