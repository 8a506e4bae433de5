"""kabpfctl status --watch and sockets --watch: live views, which leave the terminal as before."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time

import pytest
from harness import BIN, PATIENCE
from terminal import ALTERNATE, Terminal

KABPFCTL = BIN / "kabpfctl"
SECONDS = 20 * PATIENCE


@pytest.fixture
def covered(cgroup, kabpfctl):
    """The cgroup, with a policy."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    return cgroup


def test_status_shows_rates_in_place(covered, peer):
    """Counts grow, and so do rates, while the view stays on one screen."""
    with Terminal(KABPFCTL, "status", "--watch") as terminal:
        first = terminal.until(r"POLICY +NEW +/S", SECONDS)
        assert [len(line) <= 80 for line in first] == [True] * 24
        assert first[-1] == "q quits, arrow keys and page keys scroll"
        assert first[first.index("") + 2].split()[1:] == ["0", "?"] + ["0", "?"] * 3
        _, address = peer().listener()
        client = peer(covered)
        for _ in range(20):
            client.connection(address)
        shown = terminal.until(r"\n\S+ +20 +[1-9]", SECONDS)
        assert len(shown) == 24
        terminal.type(b"q")
        assert terminal.end(SECONDS) == 0
        assert terminal.is_as_before()


@pytest.mark.parametrize("end", [b"q", b"Q", b"\x03", signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("noun", ["status", "sockets"])
def test_view_ends_with_the_terminal_as_before(covered, noun, end):
    """By q, by Ctrl-C, and by the signals of systemd and of a terminal that closes."""
    with Terminal(KABPFCTL, noun, "--watch") as terminal:
        terminal.until("q quits", SECONDS)
        terminal.type(end) if isinstance(end, bytes) else terminal.process.send_signal(end)
        assert terminal.end(SECONDS) == 0
        assert terminal.is_as_before()


def test_view_follows_the_size_of_the_terminal(covered, peer):
    """Also down to blocks, without waiting for the next look."""
    peer(covered).listener()
    with Terminal(KABPFCTL, "sockets", "--watch", "--cgroup", covered) as terminal:
        terminal.until(r"UNIT +LOCAL +PEER", SECONDS)
        terminal.resize(40, 12)
        shown = terminal.until(r"\nLOCAL +127", SECONDS)
        assert (len(shown), max(map(len, shown)) <= 40) == (12, True)
        terminal.resize(120, 30)
        assert len(terminal.until(r"UNIT +LOCAL +PEER", SECONDS)) == 30


def test_sockets_are_scrolled_and_counted(covered, peer):
    """The list is longer than the screen; what is opened and closed meanwhile counts."""
    _, address = peer().listener()
    client = peer(covered)
    numbers = [client.connection(address) for _ in range(40)]
    ports = sorted(client.local_port(number) for number in numbers)
    with Terminal(KABPFCTL, "sockets", "--watch", "--cgroup", covered) as terminal:
        first = terminal.until("^40 sockets, 0 without keepalive", SECONDS)
        assert f":{ports[0]} " in first[3]
        terminal.type(b"\x1b[B" * 3)
        assert f":{ports[3]} " in terminal.until("from 4 of 40", SECONDS)[3]
        terminal.type(b"\x1b[6~" * 9)
        assert f":{ports[39]} " in terminal.until("from 40 of 40", SECONDS)[3]
        terminal.type(b"\x1b[5~" * 9)
        terminal.until("^40 sockets[^\x1b]*\nq quits", SECONDS)
        for number in numbers[:10]:
            client.close(number)
        terminal.until("^30 sockets.* 0 opened and [1-9][0-9.]* closed a second", SECONDS)


def test_stop_and_go_on(covered):
    """Ctrl-Z gives the terminal back, and fg takes it again."""
    with Terminal(KABPFCTL, "status", "--watch") as terminal:
        terminal.until("q quits", SECONDS)
        terminal.type(b"\x1a")
        assert terminal.stopped(SECONDS)
        assert terminal.is_as_before()
        terminal.said = b""
        terminal.resume()
        terminal.until("q quits", SECONDS)
        terminal.type(b"q")
        assert terminal.end(SECONDS) == 0


@pytest.mark.parametrize("noun", ["status", "sockets"])
def test_no_terminal_is_an_error(covered, noun):
    """In a pipe, and where the terminal can't move its cursor, one line says what to do."""
    said = f"kabpfctl: --watch needs a terminal; try: kabpfctl {noun}\n"
    done = subprocess.run([KABPFCTL, noun, "--watch"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    with Terminal(KABPFCTL, noun, "--watch", term="dumb") as terminal:
        assert terminal.end(SECONDS) == 1
        assert terminal.said.decode().replace("\r", "") == said


def test_view_outlives_the_data_plane(covered, kabpfctl):
    """Where kabpf is unloaded it says so, and goes on when it is loaded again."""
    with Terminal(KABPFCTL, "status", "--watch") as terminal:
        terminal.until("data plane: attached", SECONDS)
        kabpfctl("detach", "--all")
        terminal.until("data plane: not loaded", SECONDS)
        kabpfctl("attach", "--cgroup", covered, "--idle", 61)
        terminal.until("data plane: attached", SECONDS)


def test_error_of_a_later_look_ends_the_view(covered, kabpfctl):
    """It is said on the main screen, after the terminal is as before."""
    name = kabpfctl("status").stdout.splitlines()[-1].split()[0]
    with Terminal(KABPFCTL, "status", name, "--watch") as terminal:
        terminal.until(f"\n{name[:5]}", SECONDS)
        kabpfctl("detach", "--all")
        assert terminal.end(SECONDS) == 1
        assert terminal.is_as_before()
        assert f"policy {name} is not" in terminal.said.rpartition(ALTERNATE)[2].decode()


def _cpu_s(process):
    """Processor time of a process and of those children that it waited for (proc_pid_stat(5))."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def test_ten_thousand_sockets_take_less_than_a_tenth_of_a_processor(covered):
    """At one look a second."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    pairs = []
    try:
        with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
            for _ in range(5000):
                client = socket.create_connection(server.getsockname())
                pairs += [client, server.accept()[0]]
            with Terminal(KABPFCTL, "sockets", "--watch") as terminal:
                terminal.until(r"^1[0-9]{4} sockets", SECONDS)
                before, began, seen = _cpu_s(terminal.process.pid), time.monotonic(), 0
                while time.monotonic() < began + 10:
                    seen += terminal.read(0.5)
                took_s = time.monotonic() - began
                used_s = _cpu_s(terminal.process.pid) - before
                looks = terminal.said.count(b" closed a second")
                print(f"{used_s / took_s:.3f} of a processor, {looks} screens in {took_s:.1f} s")
                assert used_s / took_s < 0.1
                assert looks >= 5
    finally:
        for each in pairs:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
