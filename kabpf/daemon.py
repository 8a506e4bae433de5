"""kabpfd: keeps the kernel in line with the policy files; all it knows is in files and pins.

It wakes up for signals, and for births that only user space can resolve. SIGHUP reads the policy
files again, SIGTERM and SIGINT lift every policy, SIGUSR1 says that kabpfctl changed something.
Killed, it leaves everything in force, and the next one adopts it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kabpf import __version__, cgroups, dataplane, files, loading, reconcile
from kabpf.cgroups import CgroupTree
from kabpf.dataplane import Born, Dataplane
from kabpf.errors import KabpfError, RefusedError
from kabpf.libbpf import RingBuffer
from kabpf.policy import Policy

log = logging.getLogger("kabpfd")

# Between two looks at the whole tree, so many cgroups may be born that user space has to resolve.
BORN_MAX = 100_000

_FLOCK = struct.Struct("hhqqi")  # struct flock of fcntl(2) where off_t has 64 bits


def main() -> int:
    """Run until SIGTERM. Exit status 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser("kabpfd", description="Keeps kabpf's policies in force.")
    parser.add_argument("--version", action="version", version=f"kabpfd {__version__}")
    parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if os.geteuid() != 0:
            raise RefusedError("not root", hint="expected root")
        tree = cgroups.find_tree(cgroups.own_mounts())
        # Signals first: who finds the daemon by its lock may send one.
        with Daemon(tree) as daemon, alone(reconcile.RUN):
            daemon.run()
    except KabpfError as error:
        log.error("%s", error)
        return 1
    return 0


def running(run: Path = reconcile.RUN) -> int | None:
    """The process id of the daemon, or None."""
    try:
        with open(run / "kabpfd.lock", "rb") as file:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return None
    return None if kind == fcntl.F_UNLCK else pid


def tell_changed(run: Path = reconcile.RUN) -> None:
    """Have a running daemon look again at what is pinned. The caller holds the lock."""
    if pid := running(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Be the only daemon while the block runs, and be found by `running`."""
    run.mkdir(mode=0o755, exist_ok=True)
    # Closed to others: a read lock of theirs would keep the daemon out.
    descriptor = os.open(run / "kabpfd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"kabpfd runs already, as process {running(run)}") from None
        yield
    finally:
        os.close(descriptor)


class Daemon:
    """The event loop and what it holds open. A context manager; leaving it changes nothing."""

    SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, tree: CgroupTree) -> None:
        self._tree = tree
        self._cache: files.Cache = {}
        self._loaded: Dataplane | None = None
        self._identity = 0
        self._events: RingBuffer | None = None
        self._born: list[Born] = []
        self._asked_in_vain = 0
        self._policies: tuple[Policy, ...] | None = None  # the last good ones
        self._stamp = ""
        self._last: reconcile.Resolution | None = (
            None  # None after a failure: the kernel may differ
        )
        self._problem = ""
        self._signals: set[int] = set()
        self._poll = select.epoll()
        self._wake, self._wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Daemon:
        for number in self.SIGNALS:
            signal.signal(number, lambda number, _: self._signals.add(number))
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        self._poll.register(self._wake, select.EPOLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        signal.set_wakeup_fd(-1)
        self._poll.close()
        os.close(self._wake)
        os.close(self._wake_end)

    def run(self) -> None:
        """Put the policy in force, and keep it so until a signal says to stop.

        A policy that is in force already stays, even where a file is wrong now.
        """
        try:
            self._reload()
        except KabpfError as error:
            if not dataplane.PINS.exists():
                raise
            self._say_problem(error)
            self._adopt()
        self._say_ready()
        while not self._signals & {signal.SIGTERM, signal.SIGINT}:
            if signal.SIGHUP in self._signals:
                self._signals -= {signal.SIGHUP, signal.SIGUSR1}
                notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                self._attempt(self._reload)
                self._say_ready()
            elif signal.SIGUSR1 in self._signals:
                self._signals -= {signal.SIGUSR1}
                self._attempt(self._look_again)
            elif not self._born:
                self._poll.poll()
                self._drain_wake()
            self._attempt(self._resolve_born)
        notify("STOPPING=1")
        with reconcile.locked():
            self._close()
            reconcile.lift(self._tree)
        log.info("every policy is lifted; sockets keep the options they have")

    def _reload(self) -> None:
        with reconcile.locked():
            self._load_and_reconcile()

    def _look_again(self) -> None:
        with reconcile.locked():
            self._last = None
            if dataplane.PINS.exists():
                self._load_and_reconcile()
            else:
                self._close()
                log.info("kabpfctl lifted every policy; a reload puts them in force again")

    def _load_and_reconcile(self) -> None:
        # Together: the stamp of files that are wrong would be noted beside the last good policies.
        stamp, policies = files.stamp(files.SYSTEM), files.load(files.SYSTEM, self._cache)
        self._stamp, self._policies = stamp, policies
        if not self._is_open():
            self._watch(reconcile.open_or_load(self._policies, self._tree))
        self._reconcile(self._policies)

    def _adopt(self) -> None:
        with reconcile.locked(), contextlib.suppress(RefusedError):  # another version's
            if loaded := loading.open_if_loaded(dataplane.PINS, self._tree):
                self._watch(loaded)

    def _is_open(self) -> bool:
        """Whether the data plane that is pinned is the one that is open here, and in force."""
        if self._loaded:
            with contextlib.suppress(RefusedError):
                self._loaded.check()
                if self._loaded.identity() == self._identity:
                    return True
            self._close()
        return False

    def _watch(self, loaded: Dataplane) -> None:
        self._loaded = loaded
        self._identity = self._loaded.identity()
        self._events = self._loaded.events(self._born.append)
        self._poll.register(self._events, select.EPOLLIN)

    def _close(self) -> None:
        if self._events:
            self._poll.unregister(self._events)
            self._events.close()
        if self._loaded:
            self._loaded.close()
        self._events = self._loaded = self._last = None
        self._born.clear()

    def _reconcile(self, policies: tuple[Policy, ...]) -> None:
        assert self._loaded and self._events
        self._events.consume()
        self._born.clear()
        self._asked_in_vain = self._loaded.totals().asked_in_vain
        self._last = None
        self._last = reconcile.reconcile(policies, self._tree, self._loaded, self._stamp)
        self._problem = ""

    def _resolve_born(self) -> None:
        if not self._events or not self._loaded:
            return
        self._events.consume()
        if not self._born:
            return
        if self._policies is None:  # started beside wrong files: said at the start
            self._born.clear()
            return
        with reconcile.locked():
            if self._signals:
                return  # kabpfctl changed something before it gave up the lock: look at all of it
            born = self._born[:]
            self._born.clear()
            lost = self._loaded.totals().asked_in_vain != self._asked_in_vain
            last, self._last = self._last, None
            if (
                lost
                or last is None
                or len(last.cgroups) > BORN_MAX
                or not reconcile.resolve_born(born, last, self._tree, self._loaded)
            ):
                self._reconcile(self._policies)
            else:
                self._last = last

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except KabpfError as error:
            self._say_problem(error)
            notify(f"STATUS={self._problem}")

    def _say_problem(self, error: KabpfError) -> None:
        log.error("the last good policy stays in force: %s", error)
        # A line, because sd_notify() takes the next one for another assignment.
        self._problem = f"the last good policy stays in force: {error}".replace("\n", "; ")

    def _say_ready(self) -> None:
        status = self._problem
        if self._last and not status:
            covered = sum(1 for found in self._last.plan.cgroups.values() if found.policy)
            count, cgroups = len(self._last.plan.policies), len(self._last.cgroups)
            status = f"policies in force: {count}; cgroups covered: {covered} of {cgroups}"
            log.info("%s", status)
        notify(f"READY=1\nSTATUS={status}")


def notify(message: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        if address.startswith("@"):
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(message.encode(errors="replace"), address)


if __name__ == "__main__":
    sys.exit(main())
