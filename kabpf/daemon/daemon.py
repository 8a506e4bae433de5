"""kabpfd: keeps the kernel in line with the policy files; all it knows is in files and pins.

It wakes up for signals, for births that only user space can resolve, once more a second after a
reload, and to tell systemd's watchdog that all is well. SIGHUP reads the policy files again,
SIGTERM and SIGINT lift every policy, SIGUSR1 says that another process changed something. After
SIGUSR2, or killed, it leaves everything in force, and the next one adopts it.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import select
import signal
import time
from collections.abc import Callable

from kabpf.apply import reconcile, transient
from kabpf.daemon.cgroup_ends import Ends
from kabpf.daemon.policy_files import PolicyFiles
from kabpf.daemon.signals import Signals
from kabpf.daemon.socket_log import SocketLog
from kabpf.daemon.timers import Timer, Timers
from kabpf.errors import KabpfError, PolicyError, RefusedError, UnvisitedError
from kabpf.kernel import dataplane, loading
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Born, Dataplane
from kabpf.kernel.libbpf.buffers import RingBuffer
from kabpf.policy import files
from kabpf.policy.files import Snapshot
from kabpf.runtime.locks import locked
from kabpf.systemd.notify import notify, watchdog_s

log = logging.getLogger("kabpfd")

# Between two looks at the whole tree, so many cgroups may be born that user space has to resolve.
BORN_MAX = 100_000


# How long after a reload the files are looked at once more: kabpf-reload.path is blind until the
# reload that it asked for is done.
SETTLE_S = 1

_STAYS = "the last good policy stays in force"


class Daemon:
    """The event loop and what it holds open. A context manager; leaving it changes nothing."""

    LIFT = frozenset({signal.SIGTERM, signal.SIGINT})
    LEAVE = frozenset({signal.SIGUSR2})
    SIGNALS = LIFT | LEAVE | {signal.SIGHUP, signal.SIGUSR1}

    def __init__(self, tree: CgroupTree) -> None:
        self._tree = tree
        self._files = PolicyFiles(files.SYSTEM)
        self._loaded: Dataplane | None = None
        self._identity = 0
        self._events: RingBuffer | None = None
        self._born: list[Born] = []
        self._events_dropped = 0
        # None after a failure: the kernel may differ.
        self._last: reconcile.Resolution | None = None
        self._problem: KabpfError | None = None
        self._is_damaged = False
        self._beat_s = watchdog_s()
        self._timers = Timers()
        self._signals = Signals(self.SIGNALS)
        self._poll = select.epoll()
        self._ends = Ends()
        self._log = SocketLog(tree, self._poll)

    def __enter__(self) -> Daemon:
        # The end of each user's policy takes a descriptor; systemd lets a service have 1,024 first.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with contextlib.ExitStack() as stack:
            stack.callback(self._ends.close)
            stack.enter_context(self._poll)
            stack.enter_context(self._signals)
            stack.callback(self._close)
            self._poll.register(self._signals, select.EPOLLIN)
            self._poll.register(self._ends, select.EPOLLIN)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Put the policy in force, and keep it so until a signal says to stop.

        A policy that is in force already stays, even where a file is wrong now.
        """
        try:
            self._reload()
        except KabpfError as error:
            if not dataplane.PINS.exists():
                raise
            self._note(error)
            self._adopt()
        self._say_ready()
        self._beat()
        while not self._signals.arrived & (self.LIFT | self.LEAVE):
            if signal.SIGHUP in self._signals.arrived:
                self._signals.arrived -= {signal.SIGHUP, signal.SIGUSR1}
                notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                self._attempt(self._reload)
                self._say_ready()
                self._timers.start(Timer.LOOK, SETTLE_S)
            elif signal.SIGUSR1 in self._signals.arrived:
                self._signals.arrived -= {signal.SIGUSR1}
                self._attempt(self._look_again)
                notify(f"STATUS={self._status()}")
            elif self._ends.happened():
                self._timers.start(Timer.END, SETTLE_S)  # systemd removes it in a moment
                self._attempt(self._end)
                notify(f"STATUS={self._status()}")
            elif self._timers.take(Timer.END):
                if self._is_any_over():
                    self._attempt(self._end)
                    notify(f"STATUS={self._status()}")
            elif self._timers.take(Timer.LOOK):
                self._reload_if_changed()
            elif self._timers.take(Timer.BEAT):
                self._beat()
            elif not self._born:
                self._poll.poll(self._timers.rest_s(self._log.due))
                self._signals.drain()
            self._log.write()
            if not self._attempt(self._resolve_born):
                notify(f"STATUS={self._status()}")
        notify("STOPPING=1")
        if not self._signals.arrived & self.LIFT:
            log.info("ended; what is in force stays so" if self._loaded else "ended")
            return
        with locked():
            self._close()
            reconcile.lift(self._tree)
        log.info("every policy is lifted; sockets keep the options they have")

    def _reload(self) -> None:
        with locked():
            self._prune()
            self._put_in_force(self._files.read())

    def _look_again(self) -> None:
        with locked():
            self._last = None
            self._prune()
            if dataplane.PINS.exists():
                self._put_in_force(self._files.read())
            else:
                self._close()
                self._is_damaged, self._problem = False, None
                self._timers.stop(Timer.LOOK)
                log.info("every policy was lifted; a reload puts them in force again")

    def _end(self) -> None:
        """Take back what is over. Files that wait for a reload wait on."""
        if self._files.good is None or not self._files.have_changed():
            self._look_again()
            return
        with locked():
            good = self._files.forget(self._prune())
            if dataplane.PINS.exists():
                self._put_in_force(good)

    def _is_any_over(self) -> bool:
        return any(transient.is_over(each, self._tree) for each in transient.standing().values())

    def _prune(self) -> list[str]:
        over = transient.prune(self._tree)
        standing = transient.standing().values()
        self._ends.watch(self._tree, (each.until for each in standing))
        return over

    def _put_in_force(self, snapshot: Snapshot) -> None:
        if not self._is_open():
            self._is_damaged = True  # until it is loaded
            self._watch(reconcile.open_or_load(snapshot.policies, self._tree))
        self._reconcile(snapshot)

    def _reload_if_changed(self) -> None:
        try:
            changed = self._files.have_changed()
        except KabpfError:
            changed = True  # for the reload to say what is wrong
        if changed:
            self._signals.arrived.add(signal.SIGHUP)

    def _beat(self) -> None:
        """Tell the watchdog that the data plane is alive; load it anew where it is not, and do
        again what was refused."""
        if self._beat_s is None:
            return
        self._timers.start(Timer.BEAT, self._beat_s)
        if self._loaded and not self._is_open():
            log.warning("what is pinned is not in force any more; loading it anew")
            self._is_damaged = True
        self._log.keep_up()
        # Without BTF nothing tells of a cgroup that was removed and made again.
        is_blind = self._loaded is not None and not self._loaded.sees_births
        if self._is_damaged or is_blind or isinstance(self._problem, RefusedError):
            self._attempt(self._repair)
        notify(f"{'' if self._is_damaged else 'WATCHDOG=1'}\nSTATUS={self._status()}")

    def _repair(self) -> None:
        """Do again what was refused; where the files are wrong now, with the last good policies."""
        try:
            self._reload()
        except PolicyError as error:
            if self._files.good is None:
                raise
            with locked():
                self._put_in_force(self._files.good)
            self._problem = error

    def _adopt(self) -> None:
        with locked(), contextlib.suppress(RefusedError):  # another version's
            if loaded := loading.open_if_loaded(dataplane.PINS, self._tree):
                self._watch(loaded)
                self._log.listen(wanted=any(each.log for each in loaded.records().values()))

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
        self._loaded, self._is_damaged = loaded, False
        self._identity = self._loaded.identity()
        self._events = self._loaded.events(self._born.append)
        self._poll.register(self._events, select.EPOLLIN)

    def _close(self) -> None:
        self._log.close()
        if self._events:
            self._poll.unregister(self._events)
            self._events.close()
        if self._loaded:
            self._loaded.close()
        self._events = self._loaded = self._last = None
        self._born.clear()

    def _reconcile(self, snapshot: Snapshot) -> None:
        assert self._loaded and self._events
        self._events.consume()
        self._born.clear()
        self._events_dropped = self._loaded.totals().events_dropped
        self._last = None
        tells = self._loaded.reports_events
        self._log.listen(wanted=tells and any(policy.log for policy in snapshot.policies))
        self._last = reconcile.reconcile(snapshot, self._loaded)
        self._problem = None

    def _resolve_born(self) -> None:
        if not self._events or not self._loaded:
            return
        self._events.consume()
        if not self._born:
            return
        if self._files.good is None:  # started beside wrong files: said at the start
            self._born.clear()
            return
        with locked():
            if self._signals.arrived:
                return  # kabpfctl changed something before it gave up the lock: look at all of it
            born = self._born[:]
            self._born.clear()
            lost = self._loaded.totals().events_dropped != self._events_dropped
            last, self._last = self._last, None
            if (
                lost
                or last is None
                or len(last.cgroups) > BORN_MAX
                or not reconcile.resolve_born(born, last, self._loaded)
            ):
                self._reconcile(self._files.good)
            else:
                self._last = last

    def _attempt(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except KabpfError as error:
            self._note(error)
            return False
        return True

    def _note(self, error: KabpfError) -> None:
        self._problem = error
        log.error("%s%s", f"{_STAYS}: " if self._stays() else "", error)

    def _stays(self) -> bool:
        """Whether the problem kept what was in force before it."""
        return dataplane.PINS.exists() and not isinstance(self._problem, UnvisitedError)

    def _say_ready(self) -> None:
        status = self._status()
        if not self._problem:
            log.info("%s", status)
        notify(f"READY=1\nSTATUS={status}")

    def _status(self) -> str:
        counts = "what is in force is another version's"
        if not dataplane.PINS.exists():
            counts = "nothing is in force"
        elif self._loaded:
            usage = self._loaded.usage()
            # Beside wrong files at the start only those are known that cgroups have.
            good = self._files.good
            known = len(good.policies) if good else len(usage.keys() - {0})
            covered = usage.total() - usage[0]
            counts = f"policies in force: {known}; cgroups covered: {covered} of {usage.total()}"
        if not self._problem:
            return counts
        # A line, because sd_notify() takes the next one for another assignment.
        lines = str(self._problem).splitlines()
        stays = f", and {_STAYS}" if self._stays() else ""
        return f"{counts}; errors: {len(lines)}{stays}: {'; '.join(lines)}"
