"""kabpf-request: what users get for cgroups of their own, and what nobody gets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from harness import (
    BIN,
    PATIENCE,
    PINS,
    PROGRAMS,
    UNTOUCHED,
    WATCHED,
    options_of_new,
    path_of,
)

from kabpf.requests import varlink
from kabpf.requests.access import TABLE, Role
from kabpf.requests.methods import POLICIES_MAX
from kabpf.requests.server import CALLS_MAX, CONNECTIONS_MAX

SOCKET = "/run/kabpf/request.socket"
RUNTIME = Path("/run/kabpf/policy.d")
OWNER, STRANGER = 4242, 4343
COVERED = UNTOUCHED | {"keepalive": 1, "idle": 61}

Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def listening() -> Iterator[None]:
    """Does what systemd does for kabpf-request.socket: a process for each connection."""
    os.makedirs("/run/kabpf", exist_ok=True)
    threads: list[threading.Thread] = []
    errors: list[str] = []

    def serve(connection: socket.socket) -> None:
        command = [BIN / "kabpfd", "--request"]
        with connection:
            done = subprocess.run(command, stdin=connection, stderr=subprocess.PIPE, text=True)
        if done.returncode or "Traceback" in done.stderr:
            errors.append(done.stderr)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(SOCKET)
        os.chmod(SOCKET, 0o666)
        listener.listen()
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for thread in threads:
            thread.join()
    os.unlink(SOCKET)
    assert errors == []


@pytest.fixture
def ask(listening: None, kabpfctl) -> Ask:
    """Has a user ask while kabpf is active; the messages that were answered."""
    kabpfctl("apply")
    return send


def send(
    uid: int, *messages: bytes, starter: tuple[str, ...] = (), asker: str = ""
) -> list[dict[str, Any]]:
    """What is answered to a user's process, whose program is `asker` or else ASKER; `starter` is a
    command that starts it."""
    done = subprocess.run(
        [*starter, "/usr/bin/python3", "-I", "-S", "-c", asker or ASKER, SOCKET],
        input=b"".join(messages),
        stdout=subprocess.PIPE,
        user=uid,
        group=uid,
        extra_groups=[],
        cwd="/",
        check=True,
        timeout=30 * PATIENCE,
    )
    return [json.loads(message) for message in done.stdout.split(b"\0")[:-1]]


ASKER = (PROGRAMS / "asker.py").read_text()
INFO = varlink.call("org.varlink.service.GetInfo", {})
WITHOUT_NET_ADMIN = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
IN_ANOTHER_NAMESPACE = ("unshare", "--user", "--map-root-user")


def attach(cgroup: Path | str, **options: Any) -> bytes:
    """A call that attaches a cgroup, with idle 61 where nothing else is said."""
    path = cgroup if isinstance(cgroup, str) else path_of(cgroup)
    return varlink.call("io.kabpf.Attach", {"cgroup": path, **(options or {"idle": "61"})})


def detach(cgroup: Path) -> bytes:
    return varlink.call("io.kabpf.Detach", {"cgroup": path_of(cgroup)})


def error(answers: list[dict[str, Any]]) -> str:
    """The name of the only answer's error without its interface; "" where it is a reply."""
    (answer,) = answers
    return answer.get("error", "").rpartition(".")[2]


def reason(answers: list[dict[str, Any]]) -> str:
    (answer,) = answers
    return answer["parameters"]["reason"]


@pytest.fixture
def own(make_cgroup) -> Path:
    """A cgroup that belongs to OWNER."""
    cgroup = make_cgroup("own")
    os.chown(cgroup, OWNER, OWNER)
    return cgroup


CALLERS = {
    Role.ROOT: (0, ()),
    Role.OWNER: (OWNER, ()),
    Role.STRANGER: (STRANGER, ()),
    Role.OUTSIDER: (OWNER, IN_ANOTHER_NAMESPACE),
    "root of another user namespace": (0, IN_ANOTHER_NAMESPACE),
    "root without capabilities": (0, WITHOUT_NET_ADMIN),
}


@pytest.mark.core
@pytest.mark.parametrize("caller", CALLERS)
def test_every_call_is_answered_as_the_table_says(caller, ask, own):
    """Each call of the table, by root, by the cgroup's owner, by another user, by the owner and
    root of another user namespace, and by a root whose rights were taken away."""
    uid, starter = CALLERS[caller]
    given = {"interface": "io.kabpf", "cgroup": path_of(own)}
    role = caller if isinstance(caller, Role) else Role.OUTSIDER
    denied = "PermissionDenied" if role == Role.OUTSIDER else "Denied"
    calls = [
        varlink.call(method, {name: given[name] for name in rule.required})
        for method, rule in TABLE.items()
    ]
    answers = ask(uid, *calls, starter=starter)
    found = {method: error([answer]) for method, answer in zip(TABLE, answers, strict=True)}
    assert found == {
        method: "" if role in rule.callers else denied for method, rule in TABLE.items()
    }
    assert list(RUNTIME.glob("user-*")) == []  # as Detach comes after Attach


@pytest.mark.core
@pytest.mark.parametrize("name", [b"\rCapEff:-1", b"\nCapEff:\tffff", b"x) R 1 1 1 1 1"])
def test_name_of_a_process_gives_it_no_rights(ask, own, name):
    """Root whose capabilities were taken away stays refused, whatever its process calls itself."""
    asker = f"import ctypes; ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)\n{ASKER}"
    answers = send(0, attach(own), starter=WITHOUT_NET_ADMIN, asker=asker)
    assert error(answers) == "PermissionDenied"
    assert list(RUNTIME.glob("user-*")) == []


def test_uid_without_a_name_is_denied(ask, own):
    """A process whose user namespace maps no uid may not attach its owner's cgroup."""
    assert error(ask(OWNER, attach(own), starter=("unshare", "--user"))) == "PermissionDenied"


def test_caller_that_is_gone_is_denied(ask, own):
    """Who ended before the service could look may not attach: its number may be another's."""
    assert error(orphaned(attach(own))) == "PermissionDenied"


def orphaned(message: bytes) -> list[dict[str, Any]]:
    """What is answered at a connection whose maker has ended before the service was started."""
    code = (
        "import socket, sys\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "connection.connect(sys.argv[1])\n"
        "socket.send_fds(socket.socket(fileno=0), [b'.'], [connection.fileno()])\n"
    )
    path = "/run/kabpf/orphaned.socket"
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen()
        command = ["/usr/bin/python3", "-I", "-S", "-c", code, path]
        subprocess.run(command, stdin=theirs, user=OWNER, check=True)
        os.unlink(path)
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        connection, _ = listener.accept()
    with socket.socket(fileno=descriptor) as client:
        client.sendall(message)
        client.shutdown(socket.SHUT_WR)
        with connection:
            subprocess.run([BIN / "kabpfd", "--request"], stdin=connection, check=True)
        return [json.loads(client.recv(65536).removesuffix(b"\0"))]


@pytest.mark.core
def test_users_policy_is_active(ask, own, make_cgroup, peer, kabpfctl):
    """The answer comes when new sockets have the options, and open ones, in the cgroup and below;
    without the daemon, too. Detach takes the policy away again."""
    below = make_cgroup("own/below")
    _, address = peer().listener()
    client = peer(own)
    number = client.connection(address)
    (answer,) = ask(OWNER, attach(own, idle="61", interval="7s", probes="5"))
    expected = {
        "cgroup": path_of(own),
        "policy": f"user-{OWNER}-{own.stat().st_ino}",
        "file": f"{RUNTIME}/user-{OWNER}-{own.stat().st_ino}.yaml",
        "updated": 1,
    }
    found = answer["parameters"]
    assert {key: found[key] for key in expected} == expected
    assert found["options"]["idle_s"] == 61
    covered = COVERED | {"interval": 7, "probes": 5}
    assert client.options(number) == covered
    assert options_of_new(peer, own) == covered
    assert options_of_new(peer, below) == covered
    assert options_of_new(peer, make_cgroup("own/later")) == covered
    assert options_of_new(peer, make_cgroup("beside")) == UNTOUCHED
    (answer,) = ask(OWNER, detach(own))
    assert answer["parameters"] == {"removed": [expected["file"]]}
    assert options_of_new(peer, own) == UNTOUCHED
    assert options_of_new(peer, below) == UNTOUCHED


def test_attach_again_replaces_what_was_there(ask, own, peer):
    """A second request for a cgroup takes the place of the first, also of another owner's."""
    ask(OWNER, attach(own))
    assert error(ask(OWNER, attach(own, idle="62"))) == ""
    assert options_of_new(peer, own)["idle"] == 62
    os.chown(own, STRANGER, STRANGER)
    assert error(ask(STRANGER, attach(own, idle="63"))) == ""
    assert options_of_new(peer, own)["idle"] == 63
    assert [path.name.split("-")[1] for path in RUNTIME.glob("user-*")] == [str(STRANGER)]


def test_cgroup_made_anew_has_nothing_of_it(ask, own, peer):
    """What is made at the path later, by whomever, does not inherit the policy."""
    ask(OWNER, attach(own))
    own.rmdir()
    own.mkdir()
    assert options_of_new(peer, own) == UNTOUCHED
    ask(STRANGER, INFO)
    assert options_of_new(peer, own) == UNTOUCHED


def test_policy_ends_when_the_cgroup_is_given_to_somebody_else(ask, own, peer, kabpfctl):
    """It does not count for any command from then on, and the next one removes it."""
    assert ask(OWNER, attach(own, idle="61"))[0]["parameters"]["policy"]
    os.chown(own, STRANGER, STRANGER)
    shown = json.loads(kabpfctl("explain", own, "--json").stdout)
    assert shown["cgroups"][0]["policy"] is None
    assert json.loads(kabpfctl("plan", "--json").stdout)["cgroups"] == []
    kabpfctl("apply")
    assert options_of_new(peer, own) == UNTOUCHED
    assert list(RUNTIME.iterdir()) == []


def test_daemon_ends_the_policy_of_a_former_owner(ask, own, peer, kabpfd):
    """Nothing tells of it; the watchdog looks."""
    ask(OWNER, attach(own, idle="61"))
    daemon = kabpfd(*WATCHED)
    daemon.wait_for("1 policy active")
    os.chown(own, STRANGER, STRANGER)
    daemon.wait_for("0 policies active")
    assert options_of_new(peer, own) == UNTOUCHED


def test_policy_of_a_cgroup_that_is_gone_goes_with_the_next(ask, own, make_cgroup, kabpfctl):
    """Where no daemon removes what is over, the next request does, whoever makes it."""
    other = make_cgroup("other")
    os.chown(other, STRANGER, STRANGER)
    ask(STRANGER, attach(other))
    other.rmdir()
    assert error(ask(OWNER, attach(own))) == ""
    assert [path.name.split("-")[1] for path in RUNTIME.glob("user-*")] == [str(OWNER)]
    assert f"user-{STRANGER}" not in kabpfctl("status").stdout


def test_policy_survives_the_daemon(ask, own, peer, kabpfd):
    """It stays active when the daemon starts, restarts and reloads."""
    ask(OWNER, attach(own))
    daemon = kabpfd()
    assert options_of_new(peer, own) == COVERED
    daemon.stop(signal.SIGUSR2)
    assert options_of_new(peer, own) == COVERED
    kabpfd().reload()
    assert options_of_new(peer, own) == COVERED


def test_daemon_hears_of_it(ask, own, peer, kabpfd, make_cgroup):
    """A daemon that runs knows of the policy: it resolves cgroups as the kernel does."""
    daemon = kabpfd()
    ask(OWNER, attach(own))
    assert "1 policy active" in daemon.wait_for("STATUS=")
    assert options_of_new(peer, make_cgroup("own/later")) == COVERED


@pytest.mark.parametrize(
    "selector",
    [
        "cgroup: {path}",
        'cgroup: "{parent}/*"',
        'unit: "o*.scope"',
    ],
)
def test_administrators_policy_wins(ask, make_cgroup, peer, write_policy, kabpfctl, selector):
    """A policy of the administrator that names the cgroup, by whatever selector, takes over from a
    user's, and none can be attached beside it."""
    own = make_cgroup("own.scope")
    os.chown(own, OWNER, OWNER)
    ask(OWNER, attach(own))
    selector = selector.format(path=path_of(own), parent=path_of(own.parent))
    text = f"select: [{{{selector}}}]\nkeepalive: {{idle: 99}}\n"
    file = write_policy("a.yaml", text)
    kabpfctl("apply")
    assert options_of_new(peer, own)["idle"] == 99
    answers = ask(OWNER, attach(own, idle="62"))
    assert error(answers) == "Refused"
    assert reason(answers) == (
        f"{path_of(own)} has its policy from {file}:1, which is stronger; change that one instead"
    )
    assert options_of_new(peer, own)["idle"] == 99


def test_refused_attach_leaves_what_was_there(ask, own, write_policy, kabpfctl):
    """A request that is refused changes no file."""
    ask(OWNER, attach(own))
    before = {path: path.read_bytes() for path in RUNTIME.iterdir()}
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(own)}}}]\nkeepalive: on\n")
    kabpfctl("apply")
    assert error(ask(OWNER, attach(own, idle="62"))) == "Refused"
    assert {path: path.read_bytes() for path in RUNTIME.iterdir()} == before


def test_policy_above_does_not_hold_where_a_user_attached(ask, own, peer, write_policy, kabpfctl):
    """What the administrator says for a cgroup above is what the owner changes."""
    above = f"select: [{{cgroup: {path_of(own.parent)}}}]\nkeepalive: {{idle: 99}}\n"
    write_policy("a.yaml", above)
    kabpfctl("apply")
    assert options_of_new(peer, own)["idle"] == 99
    ask(OWNER, attach(own, keepalive="off"))
    assert options_of_new(peer, own) == UNTOUCHED


def test_what_waits_for_the_administrator_is_not_applied(ask, own, peer, write_policy, kabpfctl):
    """A user who attaches or detaches changes that policy alone: changed files wait, and what users
    are allowed to ask for, too, is what was applied."""
    file = write_policy("b.yaml", "users: {idle: 10s..2h}\n")
    kabpfctl("apply")
    ask(OWNER, attach(own))
    above = f"select: [{{cgroup: {path_of(own.parent)}}}]\nkeepalive: {{idle: 99}}\n"
    write_policy("a.yaml", above)
    file.write_text("users: {idle: 70s..2h}\n")
    assert error(ask(OWNER, attach(own, idle="62"))) == ""
    assert options_of_new(peer, own.parent) == UNTOUCHED
    assert options_of_new(peer, own) == COVERED | {"idle": 62}
    assert reason(ask(OWNER, attach(own, idle="5"))).startswith("idle: 5 s is not in 10..7200 s")
    assert error(ask(OWNER, detach(own))) == ""
    assert options_of_new(peer, own) == options_of_new(peer, own.parent) == UNTOUCHED
    kabpfctl("apply")
    assert options_of_new(peer, own.parent)["idle"] == 99
    assert reason(ask(OWNER, attach(own, idle="62"))).startswith("idle: 62 s is not in 70..7200 s")


@pytest.mark.parametrize("refused", [True, False])
def test_file_written_during_a_request_waits(ask, own, peer, write_policy, kabpfctl, refused):
    """What an administrator writes while a request is worked on is not activated by that, nor
    taken for applied, whether the request is refused for another reason or not."""
    if refused:
        write_policy("a.yaml", f"select: [{{cgroup: {path_of(own)}}}]\nkeepalive: on\n")
    for number in range(500):  # to be looked at, one after the other
        write_policy(f"c-{number}.yaml", "# nothing\n")
    RUNTIME.mkdir(exist_ok=True)
    above = f"select: [{{cgroup: {path_of(own.parent)}}}]\nkeepalive: {{idle: 99}}\n"
    file = write_policy("b.yaml", above)
    ready = file.rename(file.parent.parent / "b.yaml")
    kabpfctl("apply")
    before = RUNTIME.stat().st_mtime_ns

    def write() -> None:
        while RUNTIME.stat().st_mtime_ns == before:  # the request has not begun to write
            pass
        ready.rename(file)

    writing = threading.Thread(target=write)
    writing.start()
    ask(OWNER, attach(own))
    writing.join()
    assert options_of_new(peer, own.parent) == UNTOUCHED
    status = json.loads(kabpfctl("status", "--json").stdout)
    assert not status["policy_files"]["applied"]


def test_refused_request_keeps_nobody_from_asking(ask, own, make_cgroup, write_policy, kabpfctl):
    """Where an attach was undone the files still count as applied."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(own)}}}]\nkeepalive: on\n")
    kabpfctl("apply")
    assert error(ask(OWNER, attach(own))) == "Refused"
    other = make_cgroup("other")
    os.chown(other, STRANGER, STRANGER)
    assert error(ask(STRANGER, attach(other))) == ""


def test_users_off_unloads_and_denies(ask, own, peer, write_policy, kabpfctl):
    """An administrator who switches users off unloads what they have attached."""
    ask(OWNER, attach(own))
    file = write_policy("a.yaml", "users: off\n")
    kabpfctl("apply")
    assert options_of_new(peer, own) == UNTOUCHED
    answers = ask(OWNER, attach(own))
    assert (error(answers), reason(answers)) == (
        "Denied",
        f"users may not attach policies ({file}:1)",
    )
    file.unlink()
    kabpfctl("apply")
    assert options_of_new(peer, own) == COVERED


def test_bounds_are_kept(ask, own, write_policy, kabpfctl):
    """What is outside of the administrator's bounds is denied, with the bounds."""
    file = write_policy("a.yaml", "users: {idle: 10s..2h}\n")
    kabpfctl("apply")
    answers = ask(OWNER, attach(own, idle="5"))
    assert reason(answers) == f"idle: 5 s is not in 10..7200 s ({file}:1)"
    assert error(ask(OWNER, attach(own, idle="10"))) == ""


def test_wrong_policy_files_keep_nobody_from_asking(ask, own, peer, write_policy):
    """Where the administrator's files are wrong what was applied last is active, and the user's."""
    write_policy("a.yaml", "secret: on\n").chmod(0o600)
    assert error(ask(OWNER, attach(own))) == ""
    assert options_of_new(peer, own) == COVERED
    assert error(ask(OWNER, detach(own))) == ""
    assert options_of_new(peer, own) == UNTOUCHED


def test_wrong_policy_files_are_not_shown(ask, own, write_policy, kabpfctl):
    """Where nobody knows any more what was applied the user learns no more than that."""
    write_policy("a.yaml", "users: on\n")
    kabpfctl("apply")
    write_policy("a.yaml", "secret: on\n").chmod(0o600)
    Path("/var/lib/kabpf/last-good.json").unlink()
    answers = ask(OWNER, attach(own))
    assert error(answers) == "Refused"
    assert "secret" not in reason(answers)
    assert list(RUNTIME.glob("user-*")) == []


def test_user_can_not_activate_kabpf(listening, own, own_objects):
    """Where an administrator has unloaded everything a request changes nothing."""
    answers = send(OWNER, attach(own))
    assert reason(answers).startswith("kabpf is not active; ask an administrator")
    assert not PINS.exists()
    assert own_objects() == {"prog": {}, "map": {}, "link": {}}
    assert list(RUNTIME.glob("user-*")) == []


@pytest.mark.parametrize("loader", ["bcc"], indirect=True)
def test_user_is_refused_where_bcc_loaded_kabpf(ask, own):
    """A policy would take attachments there, for which kabpf-request may not make pins."""
    for message in (attach(own), detach(own)):
        assert reason(ask(OWNER, message)).startswith("requests of users need BTF, which the bcc")
    assert list(RUNTIME.glob("user-*")) == []


def test_path_is_taken_as_it_is_spelled(ask, own):
    """What does not spell out a cgroup's path is refused, though it would lead there."""
    name = path_of(own)[1:]
    paths = [f"/{name}/../own", f"/{name}/", f"//{name}", f"/./{name}", name, f"/{name}/*"]
    answers = ask(OWNER, *map(attach, [*paths, "/", "", "/../etc"]))
    assert [answer["parameters"] for answer in answers] == [{"parameter": "cgroup"}] * 9
    assert {error([answer]) for answer in answers} == {"InvalidParameter"}


def test_directory_that_is_no_cgroup_is_refused(ask, own):
    """What an owner has mounted in the way is not gone into, and a file is no cgroup."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"uid={OWNER}", "kabpf-test", own], check=True)
    try:
        answers = ask(OWNER, attach(own))
        os.mkdir(own / "inner")
        os.chown(own / "inner", OWNER, OWNER)
        inner = ask(OWNER, attach(own / "inner"))
    finally:
        subprocess.run(["umount", own], check=True)
    assert [error(each) for each in (answers, inner)] == ["Refused", "Refused"]
    assert error(ask(OWNER, attach(f"{path_of(own)}/cgroup.procs"))) == "Refused"
    assert error(ask(OWNER, attach(f"{path_of(own)}/missing"))) == "Refused"


def test_closed_cgroup_tells_others_nothing(ask, own, make_cgroup):
    """What is below a cgroup that its owner has closed, only the owner and root are told. Whose
    that is may attach it; others hear what they hear of anything there."""
    inner, missing = make_cgroup("own/inner"), own / "missing"
    own.chmod(0o700)
    for cgroup in (inner, missing, inner / "below"):
        expected = "Permission denied, expected one of the cgroup2 tree"
        assert reason(ask(STRANGER, attach(cgroup))) == f"cgroup {path_of(cgroup)}: {expected}"
    assert reason(ask(OWNER, attach(inner))).startswith(f"{path_of(inner)} belongs to uid 0,")
    assert "No such file" in reason(ask(OWNER, attach(missing)))
    assert "No such file" in reason(ask(0, attach(missing)))
    os.chown(inner, STRANGER, STRANGER)
    assert error(ask(STRANGER, attach(inner))) == ""


def test_number_of_policies_of_a_user_is_bounded(ask, own, make_cgroup, kabpfctl):
    """A user has no more than so many cgroups attached; those that are gone do not count."""
    RUNTIME.mkdir(exist_ok=True)
    for number in range(POLICIES_MAX):
        cgroup = make_cgroup(f"many-{number}")
        os.chown(cgroup, OWNER, OWNER)
        path, id = path_of(cgroup), cgroup.stat().st_ino
        text = f"select: [{{cgroup: {path}}}]\nkeepalive: on\nowner: {OWNER}\n"
        file = RUNTIME / f"user-{OWNER}-{id}.yaml"
        file.write_text(f"{text}until: {{cgroup: {path}, id: {id}}}\n")
    kabpfctl("apply")
    answers = ask(OWNER, attach(own))
    expected = f"uid {OWNER} may attach at most {POLICIES_MAX} cgroups"
    assert reason(answers) == expected
    os.chown(own, STRANGER, STRANGER)
    assert error(ask(STRANGER, attach(own))) == ""
    os.chown(own, OWNER, OWNER)
    cgroup.rmdir()
    assert error(ask(OWNER, attach(own))) == ""


def test_connections_of_a_user_are_bounded(ask, own):
    """Beyond so many at once a user is not answered; another user is."""
    held = []
    with ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            held.append(stack.enter_context(closing(socket.socket(socket.AF_UNIX))))
            held[-1].settimeout(20 * PATIENCE)
            held[-1].connect(SOCKET)
            held[-1].sendall(INFO)
        for connection in held:
            assert connection.recv(65536).endswith(b"\0")  # its process is there
        assert ask(0, attach(own)) == []
        assert error(ask(OWNER, attach(own))) == ""


def test_other_user_namespaces_share_their_connections(ask, own):
    """Whoever is in another user namespace, under whatever uid, has the same few connections."""
    code = (
        "import socket, sys\n"
        f"held = [socket.socket(socket.AF_UNIX) for _ in range({CONNECTIONS_MAX})]\n"
        "for one in held: one.connect(sys.argv[1])\n"
        f"for one in held: one.sendall({INFO!r})\n"
        "print(all(one.recv(1) for one in held), flush=True)\n"  # their processes are there
        "sys.stdin.read()\n"
    )
    command = [*IN_ANOTHER_NAMESPACE, "/usr/bin/python3", "-I", "-S", "-c", code, SOCKET]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, user=OWNER, **pipes) as holder:
        assert holder.stdout.readline() == b"True\n"
        assert send(STRANGER, INFO, starter=IN_ANOTHER_NAMESPACE) == []
        assert error(send(STRANGER, INFO)) == error(ask(OWNER, attach(own))) == ""


def test_calls_of_a_connection_are_bounded(ask):
    """So many calls are answered, one after the other, and then the connection is closed."""
    assert len(ask(OWNER, *[INFO] * (CALLS_MAX + 5))) == CALLS_MAX


def test_oneway_is_done_without_an_answer(ask, own):
    """A call that wants no answer gets none."""
    call = json.loads(attach(own)[:-1]) | {"oneway": True}
    answers = ask(OWNER, json.dumps(call).encode() + b"\0", detach(own))
    assert [list(answer["parameters"]) for answer in answers] == [["removed"]]


@pytest.mark.parametrize("flag", ["more", "upgrade"])
def test_flags_of_the_protocol(ask, own, flag):
    """`more` has one answer; there is no other protocol for `upgrade`."""
    call = json.loads(attach(own)[:-1]) | {flag: True}
    answers = ask(OWNER, json.dumps(call).encode() + b"\0")
    assert error(answers) == ("" if flag == "more" else "MethodNotImplemented")


def test_what_is_no_message_ends_the_connection(ask):
    """Nothing is answered to what is no message, nor to what comes behind it."""
    info = "org.varlink.service.GetInfo"
    for message in (
        b"",
        b"\0",
        b"half a message",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"[" * 60_000 + b"\0",
        b" " * 1_000_000,
        f'{{"method": "{info}", "method": "{info}"}}\0'.encode(),
        b"\xff" * 1000 + b"\0",
    ):
        assert ask(OWNER, message, varlink.call(info, {})[:-1]) == [], message[:30]


def test_descriptions_are_given(ask):
    """The service says what it is and describes its interfaces."""
    names = ("io.kabpf", "org.varlink.service", "io.systemd")
    describe = "org.varlink.service.GetInterfaceDescription"
    info, *described = ask(
        STRANGER,
        INFO,
        *(varlink.call(describe, {"interface": name}) for name in names),
    )
    assert info["parameters"]["product"] == "kabpf"
    assert info["parameters"]["interfaces"] == ["org.varlink.service", "io.kabpf"]
    for name, answer in zip(names[:2], described, strict=False):
        assert f"\ninterface {name}\n" in answer["parameters"]["description"]
    assert error([described[2]]) == "InterfaceNotFound"


def test_root_detaches_a_users_policy(ask, own, peer, kabpfctl):
    """kabpfctl detach by root takes away a user's policy as well."""
    ask(OWNER, attach(own))
    assert kabpfctl("detach", "--cgroup", own).stdout == f"{path_of(own)}: detached\n"
    assert options_of_new(peer, own) == UNTOUCHED


def test_explain_tells_of_a_users_policy(ask, own, kabpfctl):
    """kabpfctl explain names the file of the user's policy, and not for a cgroup made anew."""
    ask(OWNER, attach(own))
    name = f"user-{OWNER}-{own.stat().st_ino}"
    assert f"policy {name}, {RUNTIME}/{name}.yaml" in kabpfctl("explain", own).stdout
    own.rmdir()
    own.mkdir()
    assert "no policy" in kabpfctl("explain", own).stdout


def test_not_even_root_attaches_the_root_cgroup(ask):
    """The root of the tree is nobody's to attach there."""
    assert error(ask(0, attach("/"))) == "InvalidParameter"


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (attach, "write kabpf_policies, 1"),
        (attach, "write kabpf_cgroups, 1"),
        (detach, "write kabpf_cgroups, 1"),
    ],
)
def test_killed_request_keeps_nobody_out(ask, own, make_cgroup, peer, kabpfctl, call, fault):
    """What a request has left that was killed half-way, as for want of memory, the next one of
    anybody finishes; root need not reload."""
    other = make_cgroup("other")
    os.chown(other, STRANGER, STRANGER)
    if call is detach:
        ask(0, attach(own, idle="62"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(call(own, idle="62") if call is attach else call(own))
        ours.shutdown(socket.SHUT_WR)
        command = [BIN / "kabpfd", "--request"]
        done = subprocess.run(command, stdin=theirs, env={**os.environ, "KABPF_FAULT": fault})
    assert done.returncode == -signal.SIGKILL
    assert error(ask(STRANGER, attach(other))) == ""
    assert options_of_new(peer, other) == COVERED
    expected = COVERED | {"idle": 62} if call is attach else UNTOUCHED
    assert options_of_new(peer, own) == expected
    assert json.loads(kabpfctl("status", "--json").stdout)["policy_files"]["applied"]


def test_users_policies_are_closed_to_others(ask, own):
    """The names of cgroups below closed directories are nobody's business; what others may run
    does without these files, and says nothing of them."""
    ask(OWNER, attach(own))
    (file,) = RUNTIME.glob("user-*")
    assert file.stat().st_mode & 0o777 == 0o600
    for command in (["check", "--json"], ["explain", path_of(own)]):
        done = subprocess.run(
            [BIN / "kabpfctl", *command], user=STRANGER, group=STRANGER, extra_groups=[],
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "user-" not in done.stdout + done.stderr
