"""The OCI hook: what it asks kabpfd, and that it never fails nor waits."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from kabpf.daemon import container_requests

SOURCE = Path(__file__).parents[2]
STATE = {"ociVersion": "1.0.2", "id": "0123", "status": "creating", "bundle": "/run/b"}
# The hook's 0.2 s, and what a busy machine adds.
WAITED_S = (0.15, 5)


@pytest.fixture(scope="module")
def hook(tmp_path_factory):
    """The program, which asks a socket beside it."""
    place = tmp_path_factory.mktemp("hook")
    command = ("clang", "-Wall", "-Wextra", "-Werror", f'-DSOCKET="{place}/socket"')
    subprocess.run([*command, "-o", place / "hook", SOURCE / "oci/hook.c"], check=True)
    return place / "hook"


@pytest.fixture
def server(hook):
    """A listener in kabpfd's place."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(hook.with_name("socket")))
        listener.listen(1)
        listener.settimeout(10)
        yield listener
    hook.with_name("socket").unlink()


def start(hook, state):
    process = subprocess.Popen(
        [hook], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(state)
        process.stdin.close()
    process.stdin = None
    return process


def state(**more):
    return json.dumps(STATE | {"pid": os.getpid()} | more).encode()


def succeeds(process):
    """A runtime sees no failure, and nothing to show."""
    assert (process.communicate(timeout=10)[0], process.returncode) == (b"", 0)


def asked(hook, server, given):
    """The line that kabpfd gets."""
    process = start(hook, given)
    with server.accept()[0] as channel, channel.makefile("rwb") as stream:
        line = stream.readline()
        assert process.poll() is None  # it waits for the answer
        stream.write(b"{}\n")
    succeeds(process)
    return line


def own_cgroup():
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def test_kabpfd_is_told_of_the_container(hook, server):
    """Its id, its process and where that is, and its bundle."""
    line = asked(hook, server, state(annotations={"id": "no", "a": ["}", {"pid": 1}]}))
    assert json.loads(line) == {
        "id": "0123",
        "cgroup": own_cgroup(),
        "bundle": "/run/b",
        "pid": os.getpid(),
    }


@pytest.mark.parametrize(
    "style",
    [{"separators": (",", ":")}, {"separators": (" ,\n", " :\t")}, {"indent": 2}],
    ids=["short", "blanks", "lines"],
)
def test_state_is_read_however_it_is_printed(hook, server, style):
    """Runtimes put blanks where they like, and escapes into strings."""
    odd = 'a"b\\c\u2028é'
    given = {
        "annotations": {"x": "{"},
        "empty": {},
        "none": None,
        "bundle": odd,
        "pid": os.getpid(),
    }
    text = json.dumps(given | {"id": odd}, **style).encode()
    found = json.loads(asked(hook, server, b" \n" + text))
    assert (found["id"], found["bundle"], found["pid"]) == (odd, odd, os.getpid())


def test_state_with_long_annotations_is_read(hook, server):
    """An annotation may have a mebibyte."""
    assert (
        json.loads(asked(hook, server, state(annotations={"a": "x" * (1 << 20)})))["id"] == "0123"
    )


def test_nobody_listens(hook):
    """Where no policy names containers there is no socket."""
    begin = time.monotonic()
    succeeds(start(hook, state()))
    assert time.monotonic() - begin < WAITED_S[0] or os.getloadavg()[0] > 2


def waits(process):
    begin = time.monotonic()
    succeeds(process)
    assert WAITED_S[0] < time.monotonic() - begin < WAITED_S[1]


def test_kabpfd_accepts_nobody(hook, server):
    """One that is stopped (SIGSTOP) still has a socket."""
    waits(start(hook, state()))


def test_kabpfd_has_no_room(hook, server):
    """Neither has one whose backlog is full."""
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect(server.getsockname())
        waits(start(hook, state()))


def test_kabpfd_does_not_answer(hook, server):
    """It has asked, and gets half an answer."""
    process = start(hook, state())
    with server.accept()[0] as channel:
        channel.sendall(b"{")
        waits(process)


def test_runtime_never_ends_the_state(hook, server):
    """The hook does not wait for its input for ever."""
    process = subprocess.Popen([hook], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"{")
    process.stdin.flush()
    begin = time.monotonic()
    assert process.wait(10) == 0
    assert time.monotonic() - begin < WAITED_S[1]
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"\n", b"{}", b"\0" * 100_000, b'{"error": "no such container"}\n'],
    ids=["nothing", "line", "half", "long", "error"],
)
def test_answer_does_not_matter(hook, server, answer):
    """Whatever kabpfd says, or closes, the container starts."""
    process = start(hook, state())
    with server.accept()[0] as channel:
        channel.recv(1)
        with contextlib.suppress(ConnectionError):
            channel.sendall(answer)
    succeeds(process)


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b'{"id": "a", "pid": 0, "bundle": "b"}',
        b'{"id": "a", "pid": 4194305, "bundle": "b"}',  # above the greatest PID_MAX_LIMIT
        b'{"id": "a", "pid": "x", "bundle": "b"}',
        b'{"id": "a", "pid": 1',
        b'{"id": "a',
        b'{"id": "a\\',
        b'{"id"',
        b'{"id": }, "pid": 1, "bundle": "b"}',
        b"\0\xff" * 4096,
        b"{" * 100_000,
        b'{"a": ' * 100_000,
        b" " * (9 << 20),
    ],
    ids=range(17),
)
def test_other_state_asks_nothing(hook, server, given):
    """The hook takes what it does not understand, and lets the container start."""
    succeeds(start(hook, given))
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        assert server.accept()[0].recv(1) == b""


def test_signals_that_the_runtime_blocks_do_not_matter(hook, server):
    """A runtime may start it with SIGALRM blocked or ignored."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        process = start(hook, state())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    waits(process)


def test_package_has_what_the_settings_name():
    """The program is where hooks.d says, and asks where kabpfd listens."""
    settings = json.loads((SOURCE / "oci/kabpf.json").read_text())
    directory, name = settings["hook"]["path"].rsplit("/", 1)
    installed = (SOURCE / "debian/kabpf.install").read_text()
    assert f"debian/docs/{name} {directory.lstrip('/')}\n" in installed
    assert "oci/kabpf.json usr/share/containers/oci/hooks.d\n" in installed
    assert settings["stages"] == ["createRuntime"] and "timeout" not in settings["hook"]
    asked = re.search(r'SOCKET "(.*)"', (SOURCE / "oci/hook.c").read_text())[1]
    assert asked == str(container_requests.RUN / container_requests.NAME)
