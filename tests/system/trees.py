"""The file trees that machines boot: Debian with what the tests need, made once and kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUITES = ("bookworm", "trixie")  # Debian 12 and 13

PACKAGES = (
    # what kabpf depends on, because machines have no network
    *("libbpf1", "python3", "python3-yaml", "python3-rich", "python3-pyroute2", "python3-bpfcc"),
    *("systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd"),
    *("nginx", "postgresql", "redis-server"),
    *("podman", "crun"),
    *("ca-certificates", "iproute2", "procps", "util-linux"),
    *("bash-completion", "fish", "man-db", "zsh"),  # which people meet kabpf in
)

# A test starts what it is about, and nothing starts while it looks.
DISABLED = ("nginx.service", "postgresql.service", "redis-server.service")
MASKED = (
    *("podman.service", "podman.socket", "podman-auto-update.service", "podman-restart.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("podman-auto-update.timer", "e2scrub_reap.service", "fstrim.timer"),
)
PREPARE = (
    f'chroot "$1" systemctl --quiet disable {" ".join(DISABLED)}',
    f'chroot "$1" systemctl --quiet mask {" ".join(MASKED)}',
)

# Container engines. A test starts the one that it is about.
ENGINES = (
    *("libbpf1", "python3", "python3-yaml", "python3-grpcio"),
    *("systemd", "systemd-sysv", "dbus", "procps", "util-linux", "iproute2"),
    *("podman", "crun", "docker.io", "containerd", "runc"),
)
COMMAND_OF_DOCKER = {"bookworm": (), "trixie": ("docker-cli",)}  # docker.io's own in Debian 12
WITHOUT_ENGINES = (
    'chroot "$1" systemctl --quiet disable docker.service docker.socket containerd.service',
    f'chroot "$1" systemctl --quiet mask {" ".join(MASKED)}',
)

# A Prometheus server. A test starts it.
MONITORING = (
    *("libbpf1", "python3", "python3-yaml", "python3-prometheus-client"),
    *("systemd", "systemd-sysv", "dbus", "procps", "util-linux", "iproute2"),
    *("prometheus", "prometheus-node-exporter"),
)
WITHOUT_PROMETHEUS = (
    'chroot "$1" systemctl --quiet disable prometheus.service prometheus-node-exporter.service',
)

# Other people's tests; Go's are compiled once. Debian ships none of Node's and of Java's.
SUITES_OF_OTHERS = (
    *("libbpf1", "python3", "python3-yaml", "golang-go", "golang-src"),
    *("systemd", "systemd-sysv", "dbus", "procps", "iproute2"),
    *("ca-certificates", "netbase", "openssl", "tzdata"),
)
COMPILE = tuple(
    f'chroot "$1" sh -c "mkdir -p /opt/others && HOME=/root CGO_ENABLED=0 go test -c'
    f' -o /opt/others/{name}.test {package}"'
    for name, package in (("net", "net"), ("http", "net/http"))
)


def base(suite: str) -> Path:
    """The tree of a suite, which takes two minutes if it is not there yet.

    A tree that is there is complete, and nobody writes into it. Those of older lists stay: a
    cache may be removed by anybody at any time."""
    return _tree(suite, PACKAGES, PREPARE)


def engines(suite: str) -> Path:
    """The tree of a suite with container engines."""
    return _tree(suite, (*ENGINES, *COMMAND_OF_DOCKER[suite]), WITHOUT_ENGINES)


def monitoring(suite: str) -> Path:
    """The tree of a suite with a Prometheus server."""
    return _tree(suite, MONITORING, WITHOUT_PROMETHEUS)


def others(suite: str) -> Path:
    """The tree of a suite with other people's tests."""
    python = {"bookworm": "3.11", "trixie": "3.13"}[suite]
    return _tree(suite, (*SUITES_OF_OTHERS, f"libpython{python}-testsuite"), COMPILE)


def minimal(suite: str) -> Path:
    """The tree of a suite with essential packages and apt, the least that a fresh machine has."""
    return _tree(suite, (), ())


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say on the terminal of tests/run that something begins which takes minutes, and its end."""
    began = time.monotonic()
    _tell(f"{what} ...")
    yield
    _tell(f"{what}: done after {time.monotonic() - began:.0f} s")


def last_line(said: str) -> str:
    """What a command says last where it fails, which mostly is why."""
    return said.rstrip().rpartition("\n")[2]


def _tell(line: str) -> None:
    """On a line of its own, as pytest goes on with dots."""
    if terminal := os.environ.get("KABPF_TERMINAL"):
        with suppress(OSError), open(terminal, "w") as shown:
            shown.write(f"\r\n== {line}\r\n")


def _tree(suite: str, packages: tuple[str, ...], hooks: tuple[str, ...]) -> Path:
    made_of = "\n".join([suite, *packages, *hooks])
    cache = Path(os.environ.get("XDG_CACHE_HOME", "/var/cache"), "kabpf-tests")
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / f"{suite}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    with open(cache / f"{suite}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            unfinished = tree.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            with told(f"making {tree.name}, a tree of Debian for the system tier"):
                _make(suite, unfinished, packages, hooks)
            unfinished.rename(tree)
    return tree


def _make(suite: str, target: Path, packages: tuple[str, ...], hooks: tuple[str, ...]) -> None:
    command = [
        *("unshare", "--mount", "--propagation", "private"),  # its mounts go with it
        *("mmdebstrap", "--quiet", "--variant=apt"),
        *([f"--include={','.join(packages)}"] if packages else ()),
        *(f"--customize-hook={hook}" for hook in hooks),
        *(suite, str(target)),
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        problem = f"mmdebstrap of {suite}: {last_line(done.stderr)}"
        raise RuntimeError(f"{problem}\n{' '.join(command)}\n{done.stderr}")
