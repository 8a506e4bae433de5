"""kabpf-request under systemd: a user who attaches what systemd has delegated to them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from harness import PATIENCE, UNTOUCHED, wait_until
from machine import COVERED, KEEPALIVE, Inside

SOCKET = "/run/kabpf/request.socket"
OPTIONS = ("--idle", "61", "--interval", "7", "--probes", "5")
ASKED = {"idle": "61", "interval": "7", "probes": "5"}


@pytest.fixture
def uid(machine):
    """A user whose manager runs."""
    machine.run("useradd", "--create-home", "alice")
    uid = machine.run("id", "--user", "alice")
    machine.run("systemctl", "start", f"user@{uid}.service")
    return uid


@pytest.fixture
def as_alice(machine, uid) -> Callable[..., CompletedProcess[str]]:
    """Runs a command as that user."""
    user = ("runuser", "--user=alice", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}")
    return lambda *command: machine.attempt(*user, *command)


@pytest.fixture
def sync(machine, inside, uid) -> tuple[Inside, str]:
    """A peer that is a service of the user, and its cgroup's path."""
    user = ("runuser", "--user=alice", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}")
    unit = ("systemd-run", "--user", "--quiet", "--pipe", "--unit=sync.service")
    client = inside(*user, *unit)
    client.pair()  # it runs
    manager = f"/user.slice/user-{uid}.slice/user@{uid}.service"
    return client, f"{manager}/app.slice/sync.service"


def varlinkctl(as_user, *arguments: str) -> CompletedProcess[str]:
    done = as_user("varlinkctl", "--no-pager", *arguments)
    if "No such file or directory" in done.stderr and "varlinkctl" in done.stderr:
        pytest.skip("systemd has no varlinkctl here")
    return done


def test_user_attaches_a_service_of_their_own(machine, as_alice, sync):
    """kabpfctl attach by a user covers open and new sockets of the user's service, says what root
    is told, and detach undoes it."""
    client, path = sync
    number, _ = client.pair()
    done = as_alice("kabpfctl", "attach", "--cgroup", f"/sys/fs/cgroup{path}", *OPTIONS)
    # Both ends of two connections, and two listeners.
    said = f"{path}: keepalive on, idle 61s, interval 7s, probes 5; 6 open sockets updated\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert client.options(number) == COVERED
    assert client.options(client.pair()[0]) == COVERED
    assert "alice" not in machine.run("kabpfctl", "status")
    done = as_alice("kabpfctl", "detach", "--cgroup", f"/sys/fs/cgroup{path}")
    assert (done.returncode, done.stdout) == (0, f"{path}: detached\n")
    assert client.options(client.pair()[0]) == UNTOUCHED


def test_user_attaches_the_whole_of_their_manager(as_alice, sync):
    """What systemd has delegated is the user's: user@UID.service and all below it."""
    client, path = sync
    whole = path.removesuffix("/app.slice/sync.service")
    assert as_alice("kabpfctl", "attach", "--cgroup", whole, *OPTIONS).returncode == 0
    assert client.options(client.pair()[0]) == COVERED


def test_user_attaches_nothing_above(machine, as_alice, sync):
    """The slices above the user's manager, and services of the system, are root's."""
    _, path = sync
    above = path.removesuffix("/app.slice/sync.service").rpartition("/")[0]
    for other in (above, "/user.slice", "/system.slice", "/system.slice/kabpf.service"):
        done = as_alice("kabpfctl", "attach", "--cgroup", other, *OPTIONS)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{other} belongs to uid 0, expected uid" in done.stderr
    assert machine.run("ls", "/run/kabpf/policy.d") == ""


def test_policy_of_a_user_survives_kabpf_and_ends_with_its_cgroup(machine, as_alice, sync):
    """A restart and a stop and start of kabpf keep it; the end of the service ends it."""
    client, path = sync
    assert as_alice("kabpfctl", "attach", "--cgroup", path, *OPTIONS).returncode == 0
    machine.run("systemctl", "restart", "kabpf.service")
    assert client.options(client.pair()[0]) == COVERED
    machine.run("systemctl", "stop", "kabpf.service")
    assert client.options(client.pair()[0]) == UNTOUCHED
    machine.run("systemctl", "start", "kabpf.service")
    assert client.options(client.pair()[0]) == COVERED
    as_alice("systemctl", "--user", "stop", "sync.service")
    again = "systemd-run --user --quiet --unit=sync.service sleep infinity"
    assert as_alice(*again.split()).returncode == 0
    explained = machine.run("kabpfctl", "explain", path)
    assert "no policy" in explained


def test_user_is_told_where_nobody_listens(machine, as_alice, sync):
    """Without the socket, kabpfctl says what an administrator has to do."""
    machine.run("systemctl", "disable", "--quiet", "--now", "kabpf-request.socket")
    done = as_alice("kabpfctl", "attach", "--cgroup", sync[1], *OPTIONS)
    assert (done.returncode, done.stderr) == (
        1,
        f"kabpfctl: connect to {SOCKET}: No such file or directory; ask an administrator to"
        " run: systemctl enable kabpf-request.socket; systemctl restart kabpf-request.socket\n",
    )


def test_user_is_told_that_kabpf_is_stopped(machine, as_alice, sync):
    """What an administrator has stopped a user does not start."""
    machine.run("systemctl", "stop", "kabpf.service")
    done = as_alice("kabpfctl", "attach", "--cgroup", sync[1], *OPTIONS)
    assert done.returncode == 1
    assert "kabpf is not active; ask an administrator to run" in done.stderr
    assert machine.pins() == []


def test_varlinkctl_describes_and_calls(as_alice, sync):
    """systemd's own client reads the interface and attaches."""
    client, path = sync
    info = varlinkctl(as_alice, "info", SOCKET)
    assert (info.returncode, info.stderr) == (0, "")
    assert "io.kabpf" in info.stdout
    described = varlinkctl(as_alice, "introspect", SOCKET, "io.kabpf")
    assert (described.returncode, described.stderr) == (0, "")
    assert "method Attach(" in described.stdout
    asked = json.dumps({"cgroup": path, **ASKED})
    called = varlinkctl(as_alice, "call", "--json=short", SOCKET, "io.kabpf.Attach", asked)
    assert (called.returncode, called.stderr) == (0, "")
    assert json.loads(called.stdout)["cgroup"] == path
    assert client.options(client.pair()[0]) == COVERED
    asked = json.dumps({"cgroup": "/system.slice"})
    called = varlinkctl(as_alice, "call", SOCKET, "io.kabpf.Attach", asked)
    assert called.returncode != 0
    assert "io.kabpf.Denied" in called.stderr


def test_process_of_another_user_namespace_is_denied(machine, as_alice, sync):
    """Neither the owner's uid nor root's counts in another user namespace."""
    attach = ("kabpfctl", "attach", "--cgroup", sync[1], *OPTIONS)
    program = f"from kabpf.requests import client; client.attach({sync[1]!r}, {{}})"
    client = ("python3", "-c", program)
    for starter in (as_alice, machine.attempt):
        done = starter("unshare", "--user", "--map-root-user", *client)
        assert done.returncode == 1
        assert "callers in user namespaces are not allowed" in done.stderr
    assert as_alice(*attach).returncode == 0


def test_held_connections_keep_nobody_else_out(machine, as_alice, sync):
    """A user who holds as many connections as they can, and says nothing, keeps neither root nor
    another user from asking, and loses them."""
    code = (
        "import socket, time\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(12)]\n"
        f"for one in held: one.connect({SOCKET!r})\n"
        "print('held', flush=True)\n"
        "print(sum(not one.recv(1) for one in held), flush=True)\n"
    )
    machine.run("useradd", "bob")
    holder = machine.start("runuser", "--user=bob", "--", "python3", "-c", code, stdout=-1)
    with holder:
        assert holder.stdout.readline() == "held\n"
        done = as_alice("kabpfctl", "attach", "--cgroup", sync[1], *OPTIONS)
        assert (done.returncode, done.stderr) == (0, "")
        assert holder.stdout.readline() == "12\n"
    listed = ("systemctl", "list-units", "--plain", "--no-legend", "kabpf-request@*")
    wait_until(lambda: machine.run(*listed) == "", "the end of the instances")
    assert machine.show("kabpf-request.socket", "ActiveState") == "active"


def test_flood_keeps_others_out_for_seconds(machine, as_alice, sync):
    """When a user has connected as fast as they could, and gone, another one is served soon."""
    code = (
        "import contextlib, socket, time\n"
        "end = time.monotonic() + 3\n"
        "while time.monotonic() < end:\n"
        "    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:\n"
        f"        one.connect({SOCKET!r})\n"
    )
    machine.run("useradd", "bob")
    machine.run("runuser", "--user=bob", "--", "python3", "-c", code)
    end = time.monotonic() + 20 * PATIENCE
    attach = ("kabpfctl", "attach", "--cgroup", sync[1], *OPTIONS)
    wait_until(lambda: as_alice(*attach).returncode == 0, "the end of the flood", 20)
    assert time.monotonic() < end


def test_request_takes_nothing_from_a_cgroup_that_is_closed(machine, as_alice, sync, inside):
    """A policy below a cgroup that another user has closed outlives a request, also where kabpfd
    is not there to activate it again."""
    machine.run("mkdir", "-p", "/sys/fs/cgroup/closed/inner")
    machine.run("chown", "-R", "nobody", "/sys/fs/cgroup/closed")
    machine.run("chmod", "700", "/sys/fs/cgroup/closed")
    enter = 'echo 0 > /sys/fs/cgroup/closed/inner/cgroup.procs; exec "$@"'
    app = inside("sh", "-c", enter, "sh")
    machine.drop_in("closed.yaml", f"select: [{{cgroup: /closed/inner}}]\n{KEEPALIVE}")
    machine.run("systemctl", "kill", "--signal=SIGUSR2", "kabpf.service")  # ends, unloads nothing
    wait_until(lambda: machine.show("kabpf.service", "MainPID") == "0", "the end of kabpfd")
    done = as_alice("kabpfctl", "attach", "--cgroup", sync[1], *OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2


def test_requests_share_one_slice(machine, as_alice, sync):
    """Whatever users have going on, all of it together has a low weight and one bound of memory."""
    code = (
        "import socket\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(3)]\n"
        f"for one in held: one.connect({SOCKET!r})\n"
        "print('held', flush=True)\n"
        "input()\n"
    )
    slice = machine.cgroups / "system.slice/system-kabpfrequest.slice"
    command = ("runuser", "--user=alice", "--", "python3", "-c", code)
    with machine.start(*command, stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == "held\n"
        wait_until(lambda: len(list(slice.glob("*kabpf*.service"))) == 3, "three requests")
        assert machine.show(slice.name, "CPUWeight") == "10"
        assert machine.show(slice.name, "MemoryMax") == f"{384 << 20}"
        holder.stdin.close()


def test_requests_are_hardened(machine):
    """`systemd-analyze security` gives kabpf-request@.service an exposure of at most 1.6."""
    command = ("systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=16")
    done = machine.attempt(*command, "kabpf-request@.service")
    assert done.returncode == 0, done.stdout + done.stderr
