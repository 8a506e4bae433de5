"""The kernel tier: real cgroups, network namespaces and sockets, read back by those who hold them.

The whole session runs in a mount namespace of its own, with its own /etc/kabpf, /run/kabpf and BPF
file system: a kabpf of the machine is neither seen nor touched, and nothing of that survives the
session. Each test has to leave no program, map, link, pin, cgroup or process behind.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyroute2
import pytest

PROGRAMS = Path(__file__).parent / "programs"
BIN = Path(sys.executable).parent
PINS = Path("/sys/fs/bpf/kabpf")
DROP_INS = Path("/etc/kabpf/policy.d")
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000

# What a socket has that nobody touched, with the sysctls' defaults.
UNTOUCHED = {"keepalive": 0, "idle": 7200, "interval": 75, "probes": 9, "user_timeout": 0}

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def own_mounts() -> Iterator[None]:
    """A mount namespace of our own for the whole session."""
    created = [path for path in (Path("/etc/kabpf"), Path("/run/kabpf")) if not path.exists()]
    for path in created:
        path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: bytes, target: bytes, kind: bytes, flags: int = 0) -> None:
        if libc.mount(
            source, target, kind, flags, b"mode=755" if kind in (b"tmpfs", b"bpf") else None
        ):
            raise OSError(ctypes.get_errno(), f"mount {target.decode()}")

    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(b"none", b"/", b"", MS_REC | MS_PRIVATE)
    for target in (b"/etc/kabpf", b"/run/kabpf"):
        mount(b"tmpfs", target, b"tmpfs")
    mount(b"bpf", b"/sys/fs/bpf", b"bpf")
    mount(b"proc", b"/proc", b"proc")  # a container may have a /proc/sys that can't be written
    yield
    for target in (b"/proc", b"/etc/kabpf", b"/run/kabpf", b"/sys/fs/bpf"):
        libc.umount(target)
    for path in created:
        path.rmdir()


@pytest.fixture(autouse=True)
def nothing_left(own_mounts: None) -> Iterator[None]:
    """Fails the test that leaves anything of kabpf in the kernel, a pin, or a cgroup."""
    before = _left()
    yield
    subprocess.run([BIN / "kabpfctl", "detach", "--all"], check=True, capture_output=True)
    for file in Path("/etc/kabpf").rglob("*.yaml"):
        file.unlink()
    deadline = time.monotonic() + 5
    while (after := _left()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after == before, "the test left something behind"


def _left() -> dict[str, list[Any]]:
    """As bpftool and listings have it; an unpinned object goes a little after its last user."""
    left: dict[str, list[Any]] = {
        "pins": sorted(os.listdir("/sys/fs/bpf")),
        "cgroups": sorted(path.name for path in cgroup_root().glob("kabpf-test-*")),
    }
    for kind in ("prog", "map"):
        listed = json.loads(subprocess.check_output(["bpftool", kind, "list", "--json"]))
        left[kind] = [one["id"] for one in listed if one.get("name", "").startswith("kabpf")]
    programs = set(left["prog"])
    listed = json.loads(subprocess.check_output(["bpftool", "link", "list", "--json"]) or b"[]")
    left["link"] = [one["id"] for one in listed if one.get("prog_id") in programs]
    return left


def cgroup_root() -> Path:
    """Where the cgroup2 tree is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    raise AssertionError("no cgroup2 tree")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """Wait for something that has no event of its own."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.fixture
def make_cgroup() -> Iterator[Callable[[str], Path]]:
    """Makes cgroups below one of this test's own; all go at its end with their processes."""
    top = cgroup_root() / f"kabpf-test-{os.getpid()}-{next(_numbers)}"
    top.mkdir()

    def make(name: str = "") -> Path:
        path = top / name if name else top
        path.mkdir(parents=True, exist_ok=True)
        return path

    yield make
    (top / "cgroup.kill").write_text("1")
    wait_until(lambda: "populated 0" in (top / "cgroup.events").read_text(), "the processes' end")
    for directory, _, _ in os.walk(top, topdown=False):
        os.rmdir(directory)


@pytest.fixture
def cgroup(make_cgroup: Callable[[str], Path]) -> Path:
    """A cgroup."""
    return make_cgroup("covered")


@pytest.fixture
def other_cgroup(make_cgroup: Callable[[str], Path]) -> Path:
    """Another one beside it."""
    return make_cgroup("other")


def path_of(directory: Path) -> str:
    """A directory's cgroup path."""
    return f"/{directory.relative_to(cgroup_root())}"


class Peer:
    """A process running programs/peer.py; a function of that is a method here."""

    def __init__(self, cgroup: Path | None, namespace: str | None = None) -> None:
        command = [sys.executable, str(PROGRAMS / "peer.py")]
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


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Starts peers in cgroups and network namespaces."""
    peers: list[Peer] = []

    def start(cgroup: Path | None = None, namespace: str | None = None) -> Peer:
        peers.append(Peer(cgroup, namespace))
        return peers[-1]

    yield start
    for one in peers:
        one.end()


@pytest.fixture
def kabpfctl() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs kabpfctl; it has to succeed unless `status` says otherwise."""

    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [BIN / "kabpfctl", *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def write_policy() -> Callable[[str, str], Path]:
    """Writes a drop-in."""

    def write(name: str, text: str) -> Path:
        DROP_INS.mkdir(exist_ok=True)
        (DROP_INS / name).write_text(text)
        return DROP_INS / name

    return write


class Daemon:
    """A kabpfd that has said READY."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / f"notify-{next(_numbers)}")
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(self.address)
        self.channel.settimeout(20)
        self.process = subprocess.Popen(
            [BIN / "kabpfd"],
            env={**os.environ, "NOTIFY_SOCKET": self.address},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word: str) -> str:
        """The first notification with this word in it."""
        while word not in (message := self.channel.recv(65536).decode()):
            pass
        return message

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)
        self.wait_for("RELOADING=1")
        self.wait_for("READY=1")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def kabpfd(tmp_path: Path) -> Iterator[Callable[[], Daemon]]:
    """Starts kabpfd and waits for READY."""
    daemons: list[Daemon] = []

    def start() -> Daemon:
        daemons.append(Daemon(tmp_path))
        daemons[-1].wait_for("READY=1")
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait()
        daemon.process.stderr.close()
        daemon.channel.close()


@pytest.fixture
def make_namespace() -> Iterator[Callable[[], str]]:
    """Makes network namespaces whose loopback is up; their names."""
    names: list[str] = []

    def make() -> str:
        names.append(f"kabpf-test-{os.getpid()}-{next(_numbers)}")
        pyroute2.netns.create(names[-1])
        with pyroute2.NetNS(names[-1]) as inside:
            inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")
        return names[-1]

    yield make
    for name in names:
        pyroute2.netns.remove(name)


@pytest.fixture
def namespace(make_namespace: Callable[[], str]) -> str:
    """A network namespace of the test's own."""
    return make_namespace()


def set_sysctl(namespace: str, name: str, value: str) -> None:
    """Set a sysctl of a network namespace."""
    script = f"echo {value} > /proc/sys/net/ipv4/{name}"
    subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", script], check=True)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a program of programs/ with clang."""

    def compile(source: str, *flags: str) -> Path:
        target = tmp_path_factory.mktemp("compiled") / source.replace(".c", "")
        if ".bpf." in source:
            include = f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}"
            flags = ("-g", "-target", "bpf", "-c", include)
            target = target.with_suffix(".bpf.o")
        command = ["clang", "-O2", *flags, str(PROGRAMS / source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    return compile
