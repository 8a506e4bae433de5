"""Keeps the kernel in line with the policy files; every change is made under the lock."""

from __future__ import annotations

import contextlib
import functools
import logging
import select
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kabpf.apply import births, owned, reconcile, single, transient, waiting
from kabpf.apply.transient import Ending
from kabpf.daemon import status
from kabpf.daemon.cgroup_ends import Ends
from kabpf.daemon.open_dataplane import OpenDataplane
from kabpf.daemon.policy_files import PolicyFiles
from kabpf.daemon.socket_log import SocketLog
from kabpf.daemon.socket_updates import SocketUpdates
from kabpf.errors import KabpfError, NotUpdatedError, PolicyError, RefusedError
from kabpf.kernel import dataplane, loading, syscalls
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Born
from kabpf.plan.state import Changes
from kabpf.policy import files
from kabpf.policy.files import Snapshot
from kabpf.runtime import last_good, notes
from kabpf.runtime.locks import RUN, locked
from kabpf.runtime.pace import Pace

if TYPE_CHECKING:
    from kabpf.daemon.new_containers import NewContainers

log = logging.getLogger("kabpfd")

# Between two looks at the whole tree, so many cgroups may be born that user space has to resolve.
BORN_MAX = 100_000

UNPLACED_MAX = 10_000  # births that wait for a look at the tree; of more it is as if they were lost


class ActivePolicies:
    """The policies that are active, and what the daemon holds open for them. A context manager;
    leaving it changes nothing. `meanwhile` is called while other commands have the lock.

    Steps raise KabpfError. What was active before such a step stays so, as far as it can.
    """

    def __init__(self, tree: CgroupTree, poll: select.epoll, meanwhile: Callable[[], None]) -> None:
        self._tree, self._poll = tree, poll
        self._locked = functools.partial(locked, meanwhile=meanwhile)
        self.files = PolicyFiles(files.SYSTEM)
        self.dataplane = OpenDataplane(poll)
        self.log = SocketLog(tree, poll)
        self.ends = Ends()
        self.updates = SocketUpdates(tree, poll)
        self.containers: NewContainers | None = None  # while a selector is of containers
        # None after a failure: the kernel may differ.
        self._last: reconcile.Resolution | None = None
        self.problem: KabpfError | None = None  # the last one, until all is active
        self._refused: set[int] = set()  # cgroups whose containers' wishes were refused in the log
        self._looks = Pace()  # at the whole tree for births
        self._unplaced: list[Born] = []  # births that wait for one
        self._is_late = False  # for a look at all of it, which nothing else is done before
        self._files_wait = False  # as far as the last look at them says
        self._owes_reload = False

    def __enter__(self) -> ActivePolicies:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.ends.close()

    def reload(self) -> None:
        """Make active what the files say."""
        with self._locked():
            self._prune()
            snapshot = self._read()
            self._owes_reload = True  # until what was read is active
            self._activate(snapshot)
            self._owes_reload = False

    def restore(self) -> bool:
        """Make active what was applied last, before the boot or the stop; False where that is not
        known."""
        with self._locked():
            self._prune()
            try:
                kept = last_good.read()
                snapshot = self.files.restore(kept) if kept else None
            except KabpfError as error:
                log.warning("the last good policies can't be used: %s", error)
                return False
            if kept is None or snapshot is None:
                return False
            applied_at = last_good.time_text(kept.applied_at)
            log.warning("the policies that were applied at %s become active again", applied_at)
            self._activate(snapshot)
            return True

    def look_again(self) -> bool:
        """Follow another process that changed something, or take back what is over: reload, but for
        files that wait for it, or let go where everything was unloaded. False where it was."""
        with self._locked():
            self._last = None
            before = files.stamp(files.SYSTEM)
            over = self._prune()
            if dataplane.PINS.exists():
                known = self.files.good.stamp if self.files.good else ""
                snapshot = self._read_again()
                if over and self._is_open():
                    self._take_back(over, before, snapshot)
                self._follow(snapshot, known)
                return True
            self._close()
            self.dataplane.is_damaged, self.problem = False, None
            log.info("every policy was unloaded; a reload activates them again")
            return False

    def is_any_over(self, endings: Iterable[Ending] | None = None) -> bool:
        """Whether there is something for `look_again` to take back, of these or of all that ends
        with a cgroup."""
        try:
            among = transient.standing().values() if endings is None else endings
        except PolicyError:  # of a directory, which the next look at the files says
            return False
        return any(transient.is_over(each, self._tree) for each in among)

    def look_for_waiting_files(self) -> None:
        """Say once that files wait for a reload: of those that a link leads to no event tells."""
        try:
            waits = self.dataplane.loaded is not None and self.files.are_waiting()
        except KabpfError:  # which a reload says
            waits = True
        if waits and not self._files_wait:
            log.warning("%s", status.WAITING)
        self._files_wait = waits

    def renew_sockets(self) -> None:
        """Make anew what was removed of the daemon's own in its directory."""
        if self.containers:
            self.containers.renew()

    def needs_repair(self) -> bool:
        """Whether `repair` may mend something; lets go of a data plane that is not active."""
        if self.dataplane.loaded and not self._is_open():
            log.warning("pinned programs are no longer attached; reloading")
            self.dataplane.is_damaged = True
        self.log.keep_up()
        # Without BTF nothing tells of a cgroup that was removed and made again.
        is_blind = self.dataplane.loaded is not None and not self.dataplane.loaded.sees_births
        if isinstance(self.problem, RefusedError) or self.dataplane.is_damaged or is_blind:
            return True
        # A command that was to update open sockets was killed, or some were held; files that are
        # wrong by now keep none of them waiting.
        return bool(self.dataplane.loaded and self.dataplane.loaded.owes())

    def repair(self) -> None:
        """Do again what was refused, or is not there any more; files that wait for a reload wait,
        and where they are wrong now the last good policies come back."""
        if not self._owes_reload and self._updates_alone():
            return
        try:
            if self._owes_reload:
                self.reload()
                return
        except PolicyError as error:
            if self.files.good is None:
                raise
            self.problem = error
        with self._locked():
            self._prune()
            self._activate(self._read_again())

    def _updates_alone(self) -> bool:
        """Have open sockets updated that wait, without the lock, as a process may hold one for as
        long as it likes; whether that is all there is to do."""
        loaded = self.dataplane.loaded
        if (
            isinstance(self.problem, NotUpdatedError | PolicyError)
            and loaded
            and loaded.sees_births
            and self._is_open()
            and (owed := loaded.owed())
        ):
            self.updates.add(owed)
            return True
        return False

    def settle_updates(self) -> bool:
        """Begin the update of open sockets that waits for one, or write what one has done; whether
        one has ended."""
        done = self.updates.take()
        if done is None:
            return False
        if not done.refused:
            owned.settle(done.owed, done.left, self._tree, self._locked())
        if left := done.refused or done.left.refused:
            if self.problem is None or isinstance(self.problem, NotUpdatedError):
                self._note_left(left)
        elif done.is_of_all and isinstance(self.problem, NotUpdatedError):
            with self._locked():
                self._prune()
                self._activate(self._read_again())
        return True

    def _note_left(self, left: str) -> None:
        if left != str(self.problem):
            log.warning("%s", left)
        self.problem = NotUpdatedError(left)

    def adopt(self) -> None:
        """Open what is active, whatever the files say."""
        if self.dataplane.loaded:  # and something of what they say was refused
            return
        with self._locked(), contextlib.suppress(RefusedError):  # another version's
            if loaded := loading.open_if_loaded(dataplane.PINS, self._tree):
                self.dataplane.open(loaded)
                self.log.listen(policies=sum(each.log for each in loaded.records().values()))

    def resolve_births(self, is_outdated: Callable[[], bool]) -> None:
        """Give cgroups that were born the policies that only user space can find, unless
        `is_outdated` says under the lock that a look at all of it is due."""
        if not self.dataplane.loaded or not self._hears_births():
            return
        if self.files.good is None:  # started beside wrong files: said at the start
            self.dataplane.take_births()
            return
        with self._locked():
            if is_outdated():
                return
            try:
                found = self._resolve(self.files.good)
            except KabpfError as error:
                if self.containers:  # or else they would be due again at once, and for ever
                    self.containers.refuse(str(error))
                raise
        if found and found.owed:
            self.updates.add(found.owed, self._tree.processes(found.paths))

    def _resolve(self, good: Snapshot) -> births.Handled | None:
        assert self.dataplane.loaded
        self._unplaced += self.dataplane.take_births()
        last = self._last_if_whole()
        if last is None:
            self._look_at_all(good)
            return None
        born, self._unplaced, self._last = self._unplaced, [], None
        if self.containers:
            born = [*dict.fromkeys((*born, *self.containers.births()))]
        containers = self.containers.containers() if self.containers else None
        found = births.resolve(born, last, self.dataplane.loaded, containers, self._may_look)
        if found is None:
            self._unplaced = born
            self._look_at_all(good)
            return None
        self._last = last  # has all that is written, whatever becomes of open sockets
        self._say_refused(found.refusals)
        self._unplaced = [*found.unplaced]
        if self.containers and containers:
            self.containers.looked(born, containers.unknown)
        return found

    def _look_at_all(self, good: Snapshot) -> None:
        """Now, or when the pace of that allows it."""
        self._is_late = not self._looks.is_due
        if not self._is_late:
            with self._looks.taken():
                self._reconcile(good, self.containers.births() if self.containers else ())

    def _last_if_whole(self) -> reconcile.Resolution | None:
        """The last look at everything, if births can be resolved by it."""
        if self.dataplane.has_lost_births() or len(self._unplaced) > UNPLACED_MAX:
            return None
        return self._last if self._last and len(self._last.cgroups) <= BORN_MAX else None

    def _may_look(self) -> contextlib.AbstractContextManager[None] | None:
        return self._looks.taken() if self._looks.is_due else None

    @property
    def due(self) -> Iterable[float | None]:
        """Times at which `resolve_births`, `settle_updates` or the log has something to do, or
        None."""
        looks = self._looks.due if self._is_late or self._unplaced else None
        containers = self.containers.due if self.containers and not self._is_late else None
        return self.log.due, self.updates.due, looks, containers

    def _hears_births(self) -> bool:
        """Receive births; whether there is something to do about them now."""
        heard = self.dataplane.hear_births()
        heard = (self.containers is not None and self.containers.hear()) or heard
        if not self._looks.is_due and self._is_late:
            born = self.dataplane.take_births()
            self._unplaced += born[: max(0, UNPLACED_MAX - len(self._unplaced))]
            return False
        return heard or self._is_late or (bool(self._unplaced) and self._looks.is_due)

    def unload(self) -> None:
        """Take everything out of the kernel; sockets keep their options."""
        with self._locked():
            self._close()
            reconcile.unload(self._tree)

    def status(self) -> str:
        """What is active, and what went wrong last, on one line."""
        text = status.text(self.dataplane.loaded, self.files.good, self.problem)
        return f"{text}; {status.WAITING}" if self._files_wait else text

    def _read(self) -> Snapshot:
        self._files_wait = False
        snapshot = self.files.read()
        self.problem = None
        return snapshot

    def _read_again(self) -> Snapshot:
        snapshot = self.files.follow()
        if snapshot.stamp != waiting.STAMP:  # all files as they are
            self._files_wait, self.problem = False, None
        return snapshot

    def _prune(self) -> dict[str, Ending]:
        over = transient.prune(self._tree)
        self.ends.watch(self._tree, transient.standing().values())
        return over

    def _activate(self, snapshot: Snapshot) -> None:
        if not self._is_open():
            self.dataplane.is_damaged = True  # until it is loaded
            self.dataplane.open(reconcile.open_or_load(snapshot.policies, self._tree))
        try:
            self._reconcile(snapshot)
        finally:
            syscalls.trim_heap()  # of 50 MiB, with a thousand policies, it gives back 8

    def _take_back(self, over: Mapping[str, Ending], before: str, snapshot: Snapshot) -> None:
        """Take back policies whose files were removed, with a look at nothing else; `before` was
        the stamp. What can't be done so the next reconcile does."""
        assert self.dataplane.loaded
        commands = {name for name, ending in over.items() if ending.owner is None}
        if commands and not single.forget(commands, self.dataplane.loaded, (before, before)):
            return
        if users := over.keys() - commands:
            paths = {over[name].until.id: over[name].until.path for name in users}
            policies = transient.without_former_owners(snapshot.policies, self._tree)
            # Of which some sockets may be open still, of whoever has the cgroup now.
            if owned.activate(policies, self.dataplane.loaded, self._tree, paths) != {}:
                return
        notes.keep_pruned(before, snapshot.stamp, over.keys(), RUN)

    def _follow(self, snapshot: Snapshot, known: str) -> None:
        """Activate a snapshot; where another process has made all of it active already, and only
        users' files have changed since the stamp `known`, look at nothing again: their requests may
        come one after the other. What such a process left is done at the next beat."""
        applied = notes.read_applied(RUN)
        is_by_users = files.differ_by_users_alone(snapshot.stamp, known)
        # A snapshot beside files that wait has no stamp of its own; containers can't wait.
        if (
            not applied
            or snapshot.stamp == waiting.STAMP
            or not (applied.stamp == snapshot.stamp and is_by_users)
            or self.containers
            or not self._is_open()
        ):
            self._activate(snapshot)
            return
        self._listen(snapshot)
        if applied.refused and not isinstance(self.problem, PolicyError):
            self.problem = NotUpdatedError(applied.refused)

    def _reconcile(self, snapshot: Snapshot, born: Collection[Born] = ()) -> None:
        """Look at all of it, and so at births that were heard of (`born`)."""
        assert self.dataplane.loaded
        born = [*born, *self._unplaced, *self.dataplane.forget_births()]
        self._last, self._unplaced, self._is_late = None, [], False
        self._listen(snapshot)
        done = reconcile.reconcile(snapshot, self.dataplane.loaded)
        self._last = replace(done, changes=Changes())  # which may take a megabyte
        self._hear_of_containers(wanted=self._last.automaton.containers is not None)
        self._refused &= self._last.refusals.keys()
        self._say_refused(self._last.refusals)
        if self.containers:
            self.containers.looked(born, self._last.unknown)
        if isinstance(self.problem, PolicyError):  # which only other files mend
            return
        if left := "; ".join(self._last.left):
            self._note_left(left)
        else:
            self.problem = None

    def _say_refused(self, refusals: Mapping[int, str]) -> None:
        """Say once of each container why the options that it asks for do not count."""
        for text in [text for id, text in refusals.items() if id not in self._refused]:
            log.warning("%s", text)
        self._refused |= refusals.keys()

    def forget_unused(self) -> None:
        """Remove what containers have asked for and none has any more; others may wait for the
        room."""
        last, loaded, good = self._last, self.dataplane.loaded, self.files.good
        naming = last.automaton.containers if last else None
        if not (last and loaded and good and naming and naming.asked and self._is_open()):
            return
        with self._locked():
            was_full = naming.is_full
            if births.forget_unused(last, loaded) and was_full:
                self._reconcile(good)

    def _hear_of_containers(self, *, wanted: bool) -> None:
        if self.containers and not wanted:
            self.containers.close()
            self.containers = None
        elif wanted and not self.containers:
            from kabpf.daemon.new_containers import NewContainers  # as most do without

            self.containers = NewContainers(self._tree, self._poll)

    def _listen(self, snapshot: Snapshot) -> None:
        assert self.dataplane.loaded
        tells = self.dataplane.loaded.reports_events
        logging = sum(policy.log for policy in snapshot.policies)
        self.log.listen(policies=logging if tells else 0)

    def _is_open(self) -> bool:
        """Whether what is pinned is open here, and active; anything else is open no more."""
        if self.dataplane.is_current():
            return True
        self._close()
        return False

    def _close(self) -> None:
        self._hear_of_containers(wanted=False)
        self.log.close()
        self.updates.close()
        self.dataplane.close()
        self._last, self._unplaced, self._is_late = None, [], False
