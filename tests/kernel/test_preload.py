"""The same programs under libkeepalive, libdontdie and kabpf, asked for the same options."""

import contextlib
import functools
import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import side_by_side
from harness import PATIENCE, entering
from outside import connected_to
from side_by_side import ASKED, POLICY, ROWS, SIDES

pytestmark = pytest.mark.preload

SOURCES = Path(__file__).parents[1] / "preload/programs"
OPENER = (sys.executable, "-I", "-S", str(SOURCES / "opener.py"))
TIMES = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
NOBODY, OTHER_USER = 65534, 65533


@pytest.fixture(scope="session")
def program(compiled, tmp_path_factory):
    """The command of a program, which is made once. Skips where its language is not installed."""

    def client(*flags):
        return (str(compiled(str(SOURCES / "client.c"), *flags)),)

    def needs(command, package):
        if shutil.which(command):
            return
        lacking = f"there is no {command} (Debian's package {package})"
        if "preload" in os.environ.get("KABPF_REQUIRE", "").split(","):
            pytest.fail(f"KABPF_REQUIRE=preload, but {lacking}", pytrace=False)
        pytest.skip(f"{lacking}; KABPF_REQUIRE=preload makes this a failure")

    def java():
        needs("javac", "default-jdk-headless")
        return ("java", str(SOURCES / "EchoClient.java"), "127.0.0.1")

    def go():
        needs("go", "golang-go")
        target = tmp_path_factory.mktemp("go")
        environment = {**os.environ, "GOCACHE": str(target / "cache"), "GO111MODULE": "off"}
        command = ["go", "build", "-o", target / "client", SOURCES / "client.go"]
        subprocess.run(command, env=environment, check=True)
        return (str(target / "client"),)

    made = {
        "client": client,
        "static": lambda: client("-static"),
        "python": lambda: (sys.executable, str(SOURCES / "client.py")),
        "java": java,
        "go": go,
    }
    return functools.cache(lambda name: made[name]())


@pytest.fixture
def set_user_id(program):
    """The command of the client as a set-user-ID program that another user runs."""
    # A temporary directory may be mounted nosuid, and belongs to root alone.
    installed = Path(f"/usr/local/bin/kabpf-test-{os.getpid()}")
    try:
        shutil.copyfile(*program("client"), installed)
        os.chown(installed, OTHER_USER, -1)
        installed.chmod(0o4755)
        yield ("setpriv", f"--reuid={NOBODY}", "--clear-groups", str(installed))
    finally:
        installed.unlink(missing_ok=True)


@pytest.fixture
def command(program, request):
    """The command of a row's program."""

    def command_of(row):
        if row.program == "set-user-id":
            return request.getfixturevalue("set_user_id")
        return program(row.program)

    return command_of


@pytest.fixture
def start(command, make_cgroup):
    """Starts a row's program; gives the port that its socket is connected to, once it is ready."""
    with contextlib.ExitStack() as stack:

        def started(row, asked, cgroup):
            argv = ("env", *asked, *row.by, *command(row), *row.words)
            first = cgroup
            if row.opener:
                argv = (*OPENER, row.opener, str(cgroup), *argv)
                first = make_cgroup("opener") if row.opened_elsewhere else cgroup
            listener = stack.enter_context(
                socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            )
            port = listener.getsockname()[1]
            process = stack.enter_context(
                subprocess.Popen(
                    [*argv, str(port)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    preexec_fn=entering(first),
                )
            )
            stack.callback(process.kill)
            if "accept" in row.words:
                address = ("127.0.0.1", int(line(process)))
                client = stack.enter_context(socket.create_connection(address))
                port = client.getsockname()[1]
            assert line(process) == "ready"
            return port

        yield started


def line(process):
    """What a process says next."""
    readable, _, _ = select.select([process.stdout], [], [], 20 * PATIENCE)
    assert readable, "the program says nothing"
    return process.stdout.readline().decode().strip()


def cell(held):
    """What the page says of such a socket."""
    keepalive = held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if held.type != socket.SOCK_STREAM:
        return "keepalive on" if keepalive else "untouched"
    if not keepalive:
        return "off"
    idle, interval, probes = got = tuple(held.getsockopt(socket.SOL_TCP, name) for name in TIMES)
    return "set" if got == ASKED else f"{idle} s, {interval} s, {probes}"


@pytest.fixture
def measured(start, cgroup, other_cgroup, policy):
    """What a row's program gets from one side."""

    def measured(row, side):
        where = cgroup if side == "kabpf" else other_cgroup
        ask = functools.partial(policy, POLICY) if side == "kabpf" else lambda: None
        if not row.is_running:
            ask()
        port = start(row, () if row.is_running else SIDES[side], where)
        if row.is_running:
            ask()
        with connected_to(where, port) as held:
            return cell(held)

    return measured


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.text)
def test_program_gets_what_the_page_says(measured, row):
    """For the same options, the libraries and kabpf give a program what docs/migrating.md has.

    KABPF_RECORD has the table written."""
    got = tuple(measured(row, side) for side in SIDES)
    if "KABPF_RECORD" in os.environ:
        side_by_side.record(row.text, got)
    assert side_by_side.table().get(row.text) == got
