"""kabpfd: keeps the kernel in line with the policy files; all it knows is in files and pins.

It wakes up for signals, for births that only user space can resolve, once more a second after a
reload, and to tell systemd's watchdog that all is well. SIGHUP reads the policy files again,
SIGTERM and SIGINT unload every policy, SIGUSR1 says that another process changed something. After
SIGUSR2, or killed, it leaves everything active, and the next one adopts it.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import select
import signal
import time
from collections.abc import Callable

from kabpf.daemon import status
from kabpf.daemon.active import ActivePolicies
from kabpf.daemon.signals import Signals
from kabpf.daemon.timers import Timer, Timers
from kabpf.errors import KabpfError, PolicyError
from kabpf.kernel import dataplane
from kabpf.kernel.cgroups import CgroupTree
from kabpf.runtime.pidlock import Alone
from kabpf.systemd.notify import notify, watchdog_s

log = logging.getLogger("kabpfd")

UNLOADED = "every policy is unloaded; sockets keep the options they have"

# What somebody who removes the daemon's directory removes with it.
RESTART = "try: systemctl restart kabpf-retrofit.socket kabpf-request.socket"

# How long after a reload the files are looked at once more: kabpf-reload.path is blind until the
# reload that it asked for is done.
SETTLE_S = 1


class Daemon:
    """The event loop. A context manager; leaving it changes nothing."""

    UNLOAD = frozenset({signal.SIGTERM, signal.SIGINT})
    LEAVE = frozenset({signal.SIGUSR2})
    SIGNALS = UNLOAD | LEAVE | {signal.SIGHUP, signal.SIGUSR1}

    def __init__(self, tree: CgroupTree) -> None:
        self._beat_s = watchdog_s()
        self._timers = Timers()
        self._signals = Signals(self.SIGNALS)
        self._poll = select.epoll()
        self._active = ActivePolicies(tree, self._poll, self._wait)

    def __enter__(self) -> Daemon:
        # The end of each user's policy takes a descriptor; systemd lets a service have 1,024 first.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._poll)
            stack.enter_context(self._signals)
            stack.enter_context(self._active)
            self._poll.register(self._signals, select.EPOLLIN)
            self._poll.register(self._active.ends, select.EPOLLIN)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, lock: Alone) -> None:
        """Activate the policy, and keep it so until a signal says to stop.

        Where a file is wrong now, a policy that is active already stays; else the last good ones
        become active. Raises RefusedError where it can't be found by its lock any more.
        """
        self._start()
        while not self._signals.arrived & (self.UNLOAD | self.LEAVE):
            if lock.renew():
                log.warning("%s was removed, and is made again; %s", lock.path, RESTART)
                self._active.renew_sockets()
            self._do_next()
            self._active.log.write()
            if not self._attempt(self._resolve_births):
                self._say_status()
            self._settle_updates()
        self._stop()

    def _start(self) -> None:
        try:
            self._active.reload()
        except KabpfError as error:
            if dataplane.PINS.exists():
                self._active.adopt()
            elif isinstance(error, PolicyError):
                self._restore()
            else:
                raise
            self._note(error)
        self._say_ready()
        self._beat()

    def _restore(self) -> None:
        try:
            self._active.restore()
        except KabpfError as error:
            if not dataplane.PINS.exists():
                raise
            self._note(error)

    def _do_next(self) -> None:
        """Do the most urgent thing that is due, or rest until something is."""
        arrived = self._signals.arrived
        if signal.SIGHUP in arrived:
            arrived.difference_update({signal.SIGHUP, signal.SIGUSR1})
            self._reload()
        elif signal.SIGUSR1 in arrived:
            arrived.remove(signal.SIGUSR1)
            self._update(self._active.look_again)
        elif self._timers.take(Timer.REST):
            if self._active.is_any_over():
                self._take_back()
        elif self._timers.take(Timer.END):
            if self._active.is_any_over():
                self._update(self._active.look_again)
        elif self._timers.take(Timer.LOOK):
            self._reload_if_changed()
        elif self._timers.take(Timer.BEAT):
            self._beat()
        elif news := self._active.ends.news():  # of which users can make more without a rest
            # A user's policy ends with the cgroup, which its manager removes in a moment.
            self._timers.start(Timer.END, SETTLE_S)
            # At most once in a second, as a user may have cgroups come and go all the time.
            if not self._timers.runs(Timer.REST) and self._active.is_any_over(news):
                self._take_back()
        elif not self._active.dataplane.has_births:
            self._poll.poll(self._timers.rest_s(*self._active.due))
            self._signals.drain()

    def _take_back(self) -> None:
        self._timers.start(Timer.REST, SETTLE_S)
        self._update(self._active.look_again)

    def _reload(self) -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._attempt(self._active.reload)
        self._say_ready()
        self._timers.start(Timer.LOOK, SETTLE_S)

    def _reload_if_changed(self) -> None:
        try:
            changed = self._active.files.have_changed()
        except KabpfError:
            changed = True  # for the reload to say what is wrong
        if changed:
            self._signals.arrived.add(signal.SIGHUP)

    def _update(self, step: Callable[[], bool]) -> None:
        """Follow what others have changed, by a step that returns False where they unloaded all."""
        try:
            if not step():
                self._timers.stop(Timer.LOOK)
        except KabpfError as error:
            self._note(error)
        self._say_status()

    def _beat(self) -> None:
        """Tell the watchdog that the data plane is alive; load it anew where it is not, and do
        again what was refused."""
        if self._beat_s is None:
            return
        self._timers.start(Timer.BEAT, self._beat_s)
        self._active.renew_sockets()
        if self._active.needs_repair():
            self._attempt(self._active.repair)
        self._attempt(self._active.forget_unused)
        if not self._active.files.have_been_good:  # a mount may have come with the rest of them
            self._reload_if_changed()
        # As a user's cgroup that was removed long after its last process.
        if self._active.is_any_over():
            self._update(self._active.look_again)
        self._active.look_for_waiting_files()
        alive = "" if self._active.dataplane.is_damaged else "WATCHDOG=1"
        notify(f"{alive}\nSTATUS={self._active.status()}")

    def _wait(self) -> None:
        """Tell the watchdog that the daemon lives, while another command has the lock."""
        if self._beat_s is not None and self._timers.take(Timer.BEAT):
            self._timers.start(Timer.BEAT, self._beat_s)
            notify("WATCHDOG=1")

    def _resolve_births(self) -> None:
        # kabpfctl changed something before it gave up the lock: look at all of it.
        self._active.resolve_births(is_outdated=lambda: bool(self._signals.arrived))

    def _settle_updates(self) -> None:
        try:
            has_ended = self._active.settle_updates()
        except KabpfError as error:
            self._note(error)
            has_ended = True
        if has_ended:
            self._say_status()

    def _stop(self) -> None:
        notify("STOPPING=1")
        if self._signals.arrived & self.UNLOAD:
            self._active.unload()
            log.info("%s", UNLOADED)
        elif self._active.dataplane.loaded:
            log.info("ended; the policies stay active")
        else:
            log.info("ended")

    def _attempt(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except KabpfError as error:
            self._note(error)
            return False
        return True

    def _note(self, error: KabpfError) -> None:
        self._active.problem = error
        log.error("%s", status.of_problem(error))

    def _say_ready(self) -> None:
        text = self._active.status()
        if not self._active.problem:
            log.info("%s", text)
        notify(f"READY=1\nSTATUS={text}")

    def _say_status(self) -> None:
        notify(f"STATUS={self._active.status()}")
