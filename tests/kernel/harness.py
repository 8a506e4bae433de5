"""What the tests of the kernel tier are made of: peers in cgroups, a daemon, ways to look."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import held
import output_schema

PROGRAMS = Path(__file__).parent / "programs"
BIN = Path(sys.executable).parent
PINS = Path("/sys/fs/bpf/kabpf")
DROP_INS = Path("/etc/kabpf/policy.d")

# Before a command: WatchdogSec=1 of systemd's.
WATCHDOG = ("env", "WATCHDOG_USEC=1000000")
WATCHED = (*WATCHDOG, str(BIN / "kabpfd"))

# What a socket has that nobody touched, with the sysctls' defaults.
UNTOUCHED = {"keepalive": 0, "idle": 7200, "interval": 75, "probes": 9, "user_timeout": 0}

# For a shell in a mount namespace of its own: a kernel without BTF, for which bcc has no headers.
WITHOUT_BTF = (
    "mount -t tmpfs none /sys/kernel/btf; [ ! -d /lib/modules ] || mount -t tmpfs none /lib/modules"
)

# Before a command of root's: what opens other network namespaces is taken away.
WITHOUT_SYS_ADMIN = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")

# By how much longer the tests wait for things, as on an emulated processor.
PATIENCE = float(os.environ.get("KABPF_PATIENCE", "1"))

SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]

numbers = itertools.count()

# The turns of this process that last: one of `stay_alone`, and one beside others.
_kept: list[ExitStack] = []
_beside: list[None] = []


def cgroup_root() -> Path:
    """Where the cgroup2 tree is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    raise AssertionError("no cgroup2 tree")


def pinned(kind: str) -> dict[str, dict[str, Any]]:
    """What bpftool lists of kabpf's pinned links ("link") or maps ("map"), by the pins' names."""
    return {
        Path(pin).name: one
        for one in held.listed("--bpffs", kind, "list")
        for pin in one.get("pinned", [])
        if Path(pin).parent == PINS
    }


def known_cgroups() -> set[int]:
    """The ids in the map of cgroups, as bpftool reads it."""
    command = ["bpftool", "--json", "map", "dump", "pinned", str(PINS / "kabpf_cgroups")]
    return {one["formatted"]["key"] for one in json.loads(subprocess.check_output(command))}


def alone() -> AbstractContextManager[None]:
    """Takes turns with all other tests on the machine."""
    return nullcontext() if _kept else _turn(fcntl.LOCK_EX)


def stay_alone() -> None:
    """The same until `let_others_in`, for one test after the other: others wait for them once."""
    if not _kept:
        stack = ExitStack()
        stack.enter_context(_turn(fcntl.LOCK_EX))
        _kept.append(stack)


def let_others_in() -> None:
    """End the turn of `stay_alone`, if there is one."""
    if _kept:
        _kept.pop().close()


@contextmanager
def beside_others() -> Iterator[None]:
    """The same for a test that others like it do not disturb. Within a turn another one is no new
    one, which would wait for somebody who waits for the first to end."""
    if _beside or _kept:
        yield
        return
    with _turn(fcntl.LOCK_SH):
        _beside.append(None)
        try:
            yield
        finally:
            _beside.pop()


@contextmanager
def _turn(kind: int) -> Iterator[None]:
    temporary = Path(tempfile.gettempdir())
    with (
        open(temporary / "kabpf-tests.queue", "w") as queue,
        open(temporary / "kabpf-tests.lock", "w") as lock,
    ):
        # Who waits to be alone keeps later ones out, which would never leave the lock free.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(lock, kind)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """Wait for something that has no event of its own."""
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds * PATIENCE} s for {what}"
        time.sleep(0.01)


def multipath_connection(server: Peer, client: Peer) -> tuple[int, int, tuple[str, int]]:
    """An MPTCP connection: the client's number of it, the server's of its listener, and where that
    listens."""
    listener = server.open_socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    address = server.listen(listener, ["127.0.0.1", 0])
    number = client.open_socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    client.connect(number, address)
    return number, listener, address


def end_processes(cgroup: Path) -> None:
    """End all processes below a cgroup."""
    (cgroup / "cgroup.kill").write_text("1")
    events = cgroup / "cgroup.events"
    wait_until(lambda: "populated 0" in events.read_text(), f"the end of what is in {cgroup}")


def path_of(directory: Path) -> str:
    """A directory's cgroup path."""
    return f"/{directory.relative_to(cgroup_root())}"


def enforced(idle: int, *paths: str) -> str:
    """A policy file that enforces an idle time in the cgroups of these paths."""
    selectors = ", ".join(f"{{cgroup: {path}}}" for path in paths)
    return f"select: [{selectors}]\nkeepalive: {{idle: {idle}}}\nmode: enforce\n"


class Peer:
    """A process running programs/peer.py; a function of that is a method here."""

    def __init__(self, cgroup: Path | None, namespace: str | None = None) -> None:
        command = [sys.executable, "-I", "-S", str(PROGRAMS / "peer.py")]  # starts in half the time
        if namespace:
            command = ["ip", "netns", "exec", namespace, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=entering(cgroup),
        )

    def tell(self, function: str, *arguments: Any) -> None:
        """Begin a function, without waiting for its answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([function, *arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the peer died"
        return json.loads(line)

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.tell(function, *arguments)
            return self.answer()

        return call

    def listener(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Any:
        """A listening socket's number and address, on loopback."""
        number = self.open_socket(family, kind)
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        return number, self.listen(number, [host, 0], 4096)

    def connection(self, address: Any, family: int = socket.AF_INET) -> int:
        """A connected socket's number."""
        number = int(self.open_socket(family))
        self.connect(number, address)
        return number

    def wait_for_keepalive(self, number: int, seconds: float = 5) -> float | None:
        """How long it takes, in seconds, until SO_KEEPALIVE is on; None if it never is."""
        self.tell("wait_for_keepalive", number, seconds * PATIENCE)
        took: float | None = self.answer()
        return took

    def end(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


def entering(cgroup: Path | None) -> Callable[[], None]:
    """For preexec_fn: the process is in the cgroup before its first instruction."""

    def enter() -> None:
        if cgroup:
            (cgroup / "cgroup.procs").write_text("0")

    return enter


class Kabpfctl:
    """Runs kabpfctl in forks of a process that has imported it, because to start Python takes
    longer than most commands: on an emulated processor seconds."""

    def __init__(self, *python: str) -> None:
        self.channel, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end:
            subprocess.Popen([*python, PROGRAMS / "forker.py"], stdin=end)

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = list(map(str, arguments))
        message = json.dumps([{**os.environ, **environment}, os.getcwd(), *command])
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            files = [output.fileno(), errors.fileno()]
            socket.send_fds(self.channel, [message.encode()], files)
            status = int(self.channel.recv(16))
            output.seek(0)
            errors.seek(0)
            printed = output.read()
            if "--json" in command and printed:
                output_schema.held(command[0], printed)
            return subprocess.CompletedProcess(command, status, printed, errors.read())


def changed(kabpfctl: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, int]:
    """What an apply writes, in numbers; what it writes nothing of is left out."""
    done = json.loads(kabpfctl("apply", "--json").stdout)
    return {what: number for what, number in done["changes"].items() if number}


class Daemon:
    """A kabpfd that has said READY."""

    def __init__(self, directory: Path, *command: str) -> None:
        self.address = str(directory / f"notify-{next(numbers)}")
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(self.address)
        self.channel.settimeout(60 * PATIENCE)
        self.process = subprocess.Popen(
            command or [BIN / "kabpfd"],
            env={**os.environ, "NOTIFY_SOCKET": self.address},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word: str) -> str:
        """The first notification with this word in it."""
        while word not in (message := self.channel.recv(65536).decode()):
            pass
        return message

    def forget_notifications(self) -> None:
        """Leave out what it has said until now."""
        while select.select([self.channel], [], [], 0)[0]:
            self.channel.recv(65536)

    def reload(self) -> str:
        """Reload, and give back the status line that systemd would show."""
        self.process.send_signal(signal.SIGHUP)
        self.wait_for("RELOADING=1")
        return self.wait_for("READY=1").partition("STATUS=")[2]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60 * PATIENCE)


def options_of_new(peer: Callable[..., Peer], cgroup: Path) -> dict[str, int]:
    """The options of a new connection from a cgroup."""
    _, address = peer().listener()
    client = peer(cgroup)
    options: dict[str, int] = client.options(client.connection(address))
    return options


def set_sysctl(namespace: str, name: str, value: str) -> None:
    """Set a sysctl of a network namespace."""
    script = f"echo {value} > /proc/sys/net/ipv4/{name}"
    subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", script], check=True)


def refuse_bpf() -> None:
    """For preexec_fn: bpf(2) alone is answered, with EPERM."""
    _refuse(SYS_BPF)


def refuse_bpf_command(command: int, error: int) -> None:
    """The same for one command of bpf(2) alone, and another errno."""
    _filter(
        (0x20, 0, 0, 0),  # the system call's number
        (0x15, 0, 3, SYS_BPF),
        (0x20, 0, 0, 16),  # the lower half of its first argument
        (0x15, 0, 1, command),
        (0x06, 0, 0, 0x50000 | error),
        ALLOW,
    )


def refuse_perf_events() -> None:
    """The same for perf_event_open(2)."""
    _refuse({"x86_64": 298, "aarch64": 241}[os.uname().machine])


def _refuse(number: int) -> None:
    """By a filter (seccomp(2))."""
    _filter((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), ALLOW)


ALLOW = (0x06, 0, 0, 0x7FFF0000)


def _filter(*steps: tuple[int, int, int, int]) -> None:
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(program)
    filter = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, filter) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
