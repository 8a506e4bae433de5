"""kabpf-retrofit: updates open sockets for a kabpfd that may not enter network namespaces."""

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from harness import BIN, PATIENCE, WATCHDOG, WITHOUT_SYS_ADMIN, changed, path_of

SOCKET = "/run/kabpf/retrofit.socket"
REQUEST = b'{"owed": [], "processes": null}'


@pytest.fixture
def listening() -> Iterator[Callable[..., None]]:
    """Does what systemd does for kabpf-retrofit.socket: a process for each connection."""
    os.makedirs("/run/kabpf", exist_ok=True)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(SOCKET)

        def serve(*command: str) -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    subprocess.run(command, stdin=connection, check=False)

        def start(*command: str) -> None:
            listener.listen()
            threads.append(threading.Thread(target=serve, args=command))
            threads[-1].start()

        threads: list[threading.Thread] = []
        yield start
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
    os.unlink(SOCKET)


@pytest.mark.core
def test_helper_reaches_every_namespace(cgroup, peer, make_namespace, write_policy, listening):
    """Open sockets in other network namespaces are changed for who may not enter those."""
    clients = []
    for name in (None, make_namespace(), make_namespace()):
        server, client = peer(namespace=name), peer(cgroup, name)
        _, address = server.listener()
        clients.append((client, client.connection(address)))
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    listening(str(BIN / "kabpfd"), "--retrofit")
    subprocess.run([*WITHOUT_SYS_ADMIN, BIN / "kabpfctl", "apply"], check=True)
    assert [client.options(number)["idle"] for client, number in clients] == [61, 61, 61]


def test_helper_says_what_was_refused(cgroup, peer, write_policy, kabpfctl, listening):
    """Where the helper may not enter them either, the error says so, and the update stays owed."""
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    listening("sh", "-c", 'cat > /dev/null; echo \'{"refused": "enter net:[1]: no"}\' >&0')
    command = [*WITHOUT_SYS_ADMIN, BIN / "kabpfctl"]
    done = subprocess.run([*command, "apply"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "kabpfctl: enter net:[1]: no\n")
    status = subprocess.check_output([*command, "status", "--json"])
    assert json.loads(status)["refused"] == "enter net:[1]: no"
    assert client.keepalive(number) == 0
    assert changed(kabpfctl)["cgroups"] == 1
    assert client.options(number)["idle"] == 61


def test_helper_without_the_capability_does_not_ask_itself(listening, kabpfctl):
    """A helper that may not enter namespaces says so, instead of calling for another one."""
    kabpfctl("apply")
    listening(str(BIN / "kabpfd"), "--retrofit")
    with closing(socket.socket(socket.AF_UNIX)) as own:
        own.connect(SOCKET)  # so that a second connection would wait for ever
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(REQUEST)
            ours.shutdown(socket.SHUT_WR)
            command = [*WITHOUT_SYS_ADMIN, BIN / "kabpfd", "--retrofit"]
            subprocess.run(command, stdin=theirs, check=True, timeout=20 * PATIENCE)
            assert "Operation not permitted" in json.loads(ours.recv(65536))["refused"]
        own.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("request_", [b"", REQUEST], ids=["no request", "gone before the answer"])
def test_helper_ends_with_who_asked(request_):
    """Where kabpfd dies the helper ends, without a word."""
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(request_)
        command = [BIN / "kabpfd", "--retrofit"]
        done = subprocess.run(
            command, stdin=theirs, capture_output=True, text=True, timeout=20 * PATIENCE
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.core
def test_update_that_was_refused_is_done_again(cgroup, peer, write_policy, kabpfd, listening):
    """Open sockets that kabpfd could not have updated are by its next word to the watchdog."""
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    watched = (*WATCHDOG, *WITHOUT_SYS_ADMIN, str(BIN / "kabpfd"))
    daemon = kabpfd(*watched)
    assert "stays active" not in daemon.wait_for("errors: 1")  # the new one is, for new sockets
    assert client.keepalive(number) == 0
    listening(str(BIN / "kabpfd"), "--retrofit")
    while "errors" in daemon.wait_for("WATCHDOG=1"):
        pass
    assert client.options(number)["idle"] == 61


def test_helper_that_ends_early_is_an_error(cgroup, write_policy, listening):
    """A helper that dies without an answer is not mistaken for one that did its work."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    listening("false")
    command = [*WITHOUT_SYS_ADMIN, BIN / "kabpfctl", "apply"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"kabpfctl: update open sockets through {SOCKET}")
    assert "CAP_SYS_ADMIN is missing; try: systemctl restart kabpf-retrofit.socket" in done.stderr


def test_new_cgroup_of_a_glob_is_updated_by_the_helper(
    make_cgroup, peer, namespace, write_policy, kabpfd, listening
):
    """A kabpfd that may not enter network namespaces has the sockets changed that a new cgroup had
    opened in one before it was resolved."""
    top = make_cgroup()
    write_policy("a.yaml", f'select: [{{cgroup: "{path_of(top)}/w-*"}}]\nkeepalive: {{idle: 61}}\n')
    listening(str(BIN / "kabpfd"), "--retrofit")
    daemon = kabpfd(*WITHOUT_SYS_ADMIN, str(BIN / "kabpfd"))
    daemon.process.send_signal(signal.SIGSTOP)
    server, client = peer(namespace=namespace), peer(make_cgroup("w-1"), namespace)
    _, address = server.listener()
    number = client.connection(address)
    daemon.process.send_signal(signal.SIGCONT)
    assert client.wait_for_keepalive(number) is not None
    assert client.options(number)["idle"] == 61
