"""What the benchmarks run on: cgroups of their own, kabpf's commands and daemon, and sockets."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kabpf.kernel import abi, cgroups, dataplane, mountinfo
from kabpf.kernel.libbpf import links

POLICY = Path("/etc/kabpf/policy.yaml")
DROP_INS = Path("/etc/kabpf/policy.d")

READY_LIMIT_S = 30

BPF_PROG_TYPE_SOCK_OPS = 13
IDLE = bytes.fromhex("b7000000010000009500000000000000")  # return 1


@dataclass(frozen=True)
class Machine:
    """Where the benchmarks work. `cgroup` is a directory of the cgroup2 tree; they make it."""

    scratch: Path  # a directory, with the program made from sockets.c
    cgroup: Path
    quick: bool

    @property
    def sockets(self) -> Path:
        return self.scratch / "sockets"

    @property
    def tree(self) -> cgroups.CgroupTree:
        return cgroups.find_tree(mountinfo.own_mounts())

    def path(self, directory: Path) -> str:
        """The cgroup path of a directory."""
        return self.tree.path(str(directory))

    def foreign_programs(self) -> int:
        """How many sock_ops programs at the root of the tree are not ours."""
        with dataplane.opened_directory(self.tree.mount) as descriptor:
            return len(links.sock_ops_programs(descriptor)) - dataplane.PINS.exists()


@contextmanager
def cgroup(directory: Path) -> Iterator[Path]:
    """A new cgroup; it and what was made in it go when the block ends."""
    directory.mkdir()
    try:
        yield directory
    finally:
        for inside, _, _ in os.walk(directory, topdown=False):
            os.rmdir(inside)


@contextmanager
def policy_files(files: dict[Path, str]) -> Iterator[None]:
    """These policy files and no others."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    try:
        yield
    finally:
        for path in files:
            path.unlink()


def kabpfctl(*arguments: str) -> str:
    """What the command prints; it has to succeed."""
    command = [installed("kabpfctl"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def timed_kabpfctl(*arguments: str) -> float:
    """The seconds that the command takes."""
    began = time.monotonic()
    kabpfctl(*arguments)
    return time.monotonic() - began


@contextmanager
def kabpf_active(*, apply: bool = True) -> Iterator[None]:
    """kabpf is loaded, with the policy files as they are; without `apply` the block does that."""
    if apply:
        kabpfctl("apply")
    try:
        yield
    finally:
        kabpfctl("detach", "--all")


class Programs(NamedTuple):
    """Descriptors of kabpf's programs, with which they can be attached in microseconds."""

    sock_ops: int
    setsockopt: int
    idle: int  # a sock_ops program that does nothing
    root: int  # of the tree


@contextmanager
def taken_off(machine: Machine) -> Iterator[Programs]:
    """Take kabpf's programs off the root of the tree, where they stay off. Some policy has to need
    them all."""
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    with contextlib.ExitStack() as stack:

        def opened(what: str, program: int) -> int:
            if program < 0:
                raise SystemExit(f"{what}: {os.strerror(-program)}")
            stack.callback(os.close, program)
            return program

        def taken(name: str) -> int:
            pin = dataplane.PINS / name
            number = links.link_program(str(pin))
            found = opened(f"open the program of {pin}", library.bpf_prog_get_fd_by_id(number))
            pin.unlink()
            return found

        yield Programs(
            taken(dataplane.SOCK_OPS),
            taken(dataplane.SETSOCKOPT),
            opened(
                "load a program",
                library.bpf_prog_load(
                    BPF_PROG_TYPE_SOCK_OPS, b"idle", b"GPL", IDLE, len(IDLE) // 8, None
                ),
            ),
            stack.enter_context(dataplane.opened_directory(machine.tree.mount)),
        )


def look_before_syn(*, wanted: bool) -> None:
    """Have kabpf look at connections before the SYN, or not, whatever the policies need."""
    with dataplane.open_map(dataplane.PINS, "kabpf_totals") as totals:
        found = abi.CTotals.from_buffer_copy(totals.look_up(abi.key(0)) or b"")
        found.before_syn = wanted
        totals.update(abi.key(0), bytes(found))


class Sockets:
    """A run of the sockets program in a cgroup; it answers numbers. A context manager."""

    def __init__(
        self,
        machine: Machine,
        cgroup: Path,
        *arguments: object,
        env: dict[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        def enter() -> None:
            (cgroup / "cgroup.procs").write_text("0")

        command = [str(machine.sockets), *map(str, arguments)]
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | (env or {}),
            pass_fds=descriptors,
            preexec_fn=enter,
        )

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def say(self, number: int) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{number}\n")

    def answer(self) -> list[int]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._command}: no answer, expected a line of numbers")
        return [int(word) for word in line.split()]


class Daemon:
    """A run of kabpfd, which is READY when the constructor returns. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._address = directory / "notify"
        self._address.unlink(missing_ok=True)
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(self._address))
        self._ready: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        environment = os.environ | {"NOTIFY_SOCKET": str(self._address)}
        self._log = directory / "kabpfd.log"
        with self._log.open("w") as log:
            began = time.monotonic()
            self._process = subprocess.Popen([installed("kabpfd")], env=environment, stderr=log)
        self._wait_ready()
        self.start_s = time.monotonic() - began

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGTERM)

    def stop(self, number: signal.Signals) -> None:
        """SIGTERM unloads every policy, SIGKILL leaves them active."""
        self._process.send_signal(number)
        self._process.wait()
        self._channel.shutdown(socket.SHUT_RD)

    def reload(self) -> float:
        """The seconds from SIGHUP to READY."""
        began = time.monotonic()
        self._process.send_signal(signal.SIGHUP)
        self._wait_ready()
        return time.monotonic() - began

    def resident_kib(self) -> int:
        return self._status("VmRSS")

    def wake_ups(self, during_s: float, act: Callable[[], None] = lambda: None) -> int:
        """How often it slept and woke again, while something is done and for so long after."""
        before = self._status("voluntary_ctxt_switches")
        act()
        time.sleep(during_s)
        return self._status("voluntary_ctxt_switches") - before

    def _status(self, key: str) -> int:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(text.partition(f"\n{key}:")[2].split()[0])

    def _listen(self) -> None:
        # All the time: kabpfd waits where nobody takes what it says.
        with self._channel:
            while message := self._channel.recv(4096):
                if message.startswith(b"READY=1"):
                    self._ready.put(message)

    def _wait_ready(self) -> None:
        try:
            self._ready.get(timeout=READY_LIMIT_S)
        except queue.Empty:
            raise SystemExit(
                f"kabpfd: not ready after {READY_LIMIT_S} s:\n{self._log.read_text()}"
            ) from None


def installed(name: str) -> str:
    """Where a command of kabpf's is."""
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is missing, expected it in PATH: bench/run puts it there")
    return found
