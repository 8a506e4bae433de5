"""A Debian of its own that a test boots: a container with systemd, without network."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import held
from harness import (
    PROGRAMS,
    UNTOUCHED,
    Peer,
    cgroup_root,
    end_processes,
    entering,
)

# A policy of which no number is anybody's default, and what it gives an application's socket.
KEEPALIVE = "keepalive: {idle: 61, interval: 7, probes: 5}\n"
COVERED = UNTOUCHED | {"keepalive": 1, "idle": 61, "interval": 7, "probes": 5}

PROGRAMS_INSIDE = "/opt/programs"
BOOT_S = 90

# Arguments: a directory, an upper layer ("" for one in memory), the lower layers, nspawn's command.
# All mounts go with the process.
_ASSEMBLE = """
set -e
directory=$1 upper=$2 lower=$3; shift 3
mkdir -p /run/systemd/nspawn
mount -t tmpfs -o mode=755 kabpf-test /run/systemd/nspawn
mount -t tmpfs -o mode=755 kabpf-test "$directory"
if [ -z "$upper" ]; then upper=$directory/layer; mkdir "$upper"; fi
mkdir -p "$directory/root" "$directory/bpf" "$upper/upper" "$upper/work"
mount -t bpf -o mode=700 kabpf-test "$directory/bpf"
mount -t overlay -o "lowerdir=$lower,upperdir=$upper/upper,workdir=$upper/work" kabpf-test \\
    "$directory/root"
exec "$@"
"""

_NSPAWN = (
    *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe"),
    *("--capability=all", "--system-call-filter=bpf pidfd_getfd", "--private-network"),
    *("--link-journal=no", "--resolv-conf=off", "--timezone=off", "--hostname=machine"),
    f"--bind-ro={PROGRAMS}:{PROGRAMS_INSIDE}",
)

_numbers = itertools.count()


class Machine:
    """A context manager: inside, the machine is up. What it wrote is gone afterwards.

    `layers` are directories, the uppermost first; `directory` is made, and files beside it."""

    def __init__(self, layers: list[Path], directory: Path, *options: str) -> None:
        self._options = options  # more of nspawn's
        self._layers = layers
        self._directory = directory
        directory.mkdir()
        self._held = ExitStack()
        self.console = directory.with_suffix(".console")

    def __enter__(self) -> Machine:
        with ExitStack() as stack:
            top = stack.enter_context(_cgroup())
            self.cgroups = top / "payload"
            self.leader = self._boot(top)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _boot(self, top: Path) -> int:
        """Returns the process id of the machine's systemd when that has started everything."""
        address = str(self._directory.with_suffix(".notify"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.bind(address)
            channel.settimeout(1)
            arguments = (*self._options, "--boot", "--notify-ready=yes")
            process = _assemble(
                *(self._layers, self._directory, top, self.console, *arguments),
                NOTIFY_SOCKET=address,
            )
            said = ""
            deadline = time.monotonic() + BOOT_S
            while not re.search("^READY=1", said, re.MULTILINE):
                assert process.poll() is None and time.monotonic() < deadline, (
                    f"the machine did not boot\n{said}{self.console.read_text()}"
                )
                with contextlib.suppress(TimeoutError):
                    said += channel.recv(65536).decode() + "\n"
        return int(re.findall(r"X_NSPAWN_LEADER_PID=(\d+)", said)[0])

    @property
    def root(self) -> Path:
        """Its file tree; absolute symbolic links in it lead astray."""
        return Path(f"/proc/{self.leader}/root")

    def start(self, *command: str, **how: Any) -> subprocess.Popen[str]:
        """Start a command in init.scope, which no policy of a test selects."""
        return subprocess.Popen(
            [*self.entering(), *command],
            text=True,
            preexec_fn=entering(self.cgroups / "init.scope"),
            **how,
        )

    def entering(self) -> tuple[str, ...]:
        """What goes before a command that is to run inside; the cgroup stays the caller's."""
        enter = ("nsenter", f"--target={self.leader}")
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        clean = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root")
        return (*enter, *namespaces, *clean)

    def attempt(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        process = self.start(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            try:
                out, err = process.communicate(stdin, timeout=120)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command that has to succeed; what it printed, without the last newline."""
        done = self.attempt(*command, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout.removesuffix("\n")

    def write(self, path: str, text: str) -> None:
        """Write a file, and the directories above it."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def drop_in(self, name: str, text: str) -> None:
        """Write a policy file and activate it."""
        self.write(f"/etc/kabpf/policy.d/{name}", text)
        self.run("systemctl", "reload", "kabpf.service")

    def cgroup(self, unit: str) -> Path:
        """The directory of a unit's cgroup, outside."""
        return self.cgroups / self.show(unit, "ControlGroup").removeprefix("/")

    def objects(self) -> dict[str, dict[int, str]]:
        """What of kabpf this machine has in the kernel."""
        return held.objects(self.cgroups.parent, self.root / "sys/fs/bpf")

    def pins(self) -> list[str]:
        """What is in its BPF file system, but for the kernel's own two files."""
        find = ("find", "/sys/fs/bpf", "-mindepth", "1", "!", "-name", "*.debug")
        return self.run(*find).splitlines()

    def count_accepted(self) -> int:
        """How many TCP connections its network namespace has accepted."""
        lines = Path(f"/proc/{self.leader}/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("PassiveOpens")])

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit)


class Inside(Peer):
    """A peer inside the machine; `starter` is the command that starts it, as systemd-run."""

    def __init__(self, machine: Machine, *starter: str) -> None:
        command = (*starter, "python3", f"{PROGRAMS_INSIDE}/peer.py")
        self.process = machine.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def pair(self) -> tuple[int, int]:
        """A connection to itself; the numbers of both ends."""
        listener, address = self.listener()
        return self.connection(address), int(self.accept(listener))


def postgresql(machine: Machine) -> tuple[str, int]:
    """The unit and the port of PostgreSQL's cluster; the port is one that was free where the tree
    was made."""
    version, name, port = machine.run("pg_lsclusters", "--no-header").split()[:3]
    return f"postgresql@{version}-{name}.service", int(port)


def layer(layers: list[Path], directory: Path, files: list[Path], *command: str) -> Path:
    """A layer of what a command changes that runs as root over the layers, without a boot.

    `files` are in /mnt meanwhile; `directory` is an empty one, which keeps the layer."""
    upper, mountpoint, console = (directory / name for name in ("layer", "machine", "console"))
    upper.mkdir()
    mountpoint.mkdir()
    binds = [f"--bind-ro={file}:/mnt/{file.name}" for file in files]
    with _cgroup() as top:
        process = _assemble(layers, mountpoint, top, console, *binds, *command, upper=str(upper))
        assert process.wait() == 0, f"{' '.join(command)}\n{console.read_text()}"
    return upper / "upper"


@contextmanager
def _cgroup() -> Iterator[Path]:
    """A cgroup; it goes with its processes."""
    top = cgroup_root() / f"kabpf-system-{os.getpid()}-{next(_numbers)}"
    top.mkdir()
    try:
        yield top
    finally:
        _remove(top)


def _remove(top: Path) -> None:
    """End all processes below a cgroup, and remove it."""
    end_processes(top)
    # In hybrid mode nspawn makes the same directories in systemd's own hierarchy.
    for tree in (top, top.parent.with_name("systemd") / top.name):
        for directory, _, _ in os.walk(tree, topdown=False):
            os.rmdir(directory)


def remove_stale() -> None:
    """Remove the machines of test sessions that are gone."""
    for top in cgroup_root().glob("kabpf-system-*"):
        if not Path("/proc", top.name.split("-")[2]).exists():
            with contextlib.suppress(FileNotFoundError):  # another worker is at it
                _remove(top)


def _assemble(
    layers: list[Path],
    directory: Path,
    cgroup: Path,
    console: Path,
    *arguments: str,
    upper: str = "",
    **environment: str,
) -> subprocess.Popen[str]:
    command = [
        *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"),
        *("sh", "-c", _ASSEMBLE, "assemble", str(directory), upper, ":".join(map(str, layers))),
        *(*_NSPAWN, f"--machine={cgroup.name}", f"--directory={directory}/root"),
        # As systemd mounts it where it boots no container.
        *(f"--bind={directory}/bpf:/sys/fs/bpf", *arguments),
    ]
    with open(console, "w") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            preexec_fn=entering(cgroup),
        )
