"""The methods of io.kabpf, for callers who may: policies for cgroups of their own."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kabpf import __version__
from kabpf.apply import dropins, owned, reconcile, transient, waiting
from kabpf.apply.owned import Attached
from kabpf.apply.reconcile import Resolver
from kabpf.apply.transient import Ending
from kabpf.apply.waiting import Standing
from kabpf.errors import KabpfError, NotUpdatedError, PolicyError, RefusedError
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.plan.resolve import resolve_at
from kabpf.plan.state import FORMER_MAX, Cgroup, CgroupEntry, PolicyRecord
from kabpf.policy import files, limits, options, parser, writer
from kabpf.policy.files import Snapshot
from kabpf.policy.model import OPTIONS, Mode, Options, Policy, Rules, Selector, Until, options_json
from kabpf.policy.options import Draft
from kabpf.policy.parser import PolicyFile
from kabpf.policy.yaml import Node, Source
from kabpf.requests.interface import INTERFACES, denied, refused
from kabpf.requests.varlink import CallError
from kabpf.runtime import notes
from kabpf.runtime.locks import RUN, locked_for_user
from kabpf.runtime.notes import Applied, Begun
from kabpf.runtime.pidlock import tell_changed

log = logging.getLogger("kabpfd")

WAIT_S = 20  # for root's commands and other users' requests, which come first
POLICIES_MAX = 64  # of a user
ALL_POLICIES_MAX = 1024  # of all users, a quarter of what the kernel has room for
# In the kernel, with the former ones that cgroups remember: without a bound, a user who attaches
# and detaches one cgroup after the other would have those of everybody forgotten.
RECORDS_MAX = POLICIES_MAX * (1 + FORMER_MAX)
ALL_RECORDS_MAX = 2 * ALL_POLICIES_MAX

_NOT_ACTIVE = "kabpf is not active; ask an administrator to run: systemctl start kabpf"
_NOT_BY_BCC = "requests of users need BTF, which the bcc loader does without"
WRONG = "policy files are wrong; ask an administrator to run: kabpfctl check"


@dataclass(frozen=True)
class Request:
    """A call that is allowed, with its parameters checked."""

    uid: int
    cgroup: Cgroup
    parameters: Mapping[str, Any]


def drop_in(request: Request, parsed: list[PolicyFile]) -> bytes:
    """The drop-in that a request asks for. It has numbers alone: it can't become wrong by what is
    written elsewhere later, and nobody's words get into a file of root's."""
    given = request.parameters
    words = {key: given[key] for key in options.REQUEST_KEYS if key in given}
    keepalive = given.get("keepalive", "on")
    if keepalive not in ("on", "off") or (keepalive == "off" and words):
        raise CallError.of_service("InvalidParameter", parameter="keepalive")
    if given.get("mode", "fill") not in ("fill", "override"):
        raise CallError.of_service("InvalidParameter", parameter="mode")
    takes_defaults = given.get("defaults", True) and keepalive == "on"
    defaults = parser.defaults_of(parsed) if takes_defaults else options.NOTHING
    numbers = _numbers(words, defaults) if keepalive == "on" else Options(keepalive=False)
    file = dropins.owned_file(request.uid, request.cgroup.id)
    source = Source(str(file), 1)
    policy = Policy(
        file.stem,
        (Selector("cgroup", request.cgroup.path, source),),
        Rules(numbers, Mode(given.get("mode", "fill"))),
        source,
        existing=given.get("existing", True),
        until=Until(request.cgroup.path, request.cgroup.id),
        owner=request.uid,
    )
    comment = f"Written for uid {request.uid}; kabpfctl detach removes it."
    return writer.text(policy, comment).encode()


def get_info(_: Request) -> Mapping[str, Any]:
    """Which service this is, and its interfaces."""
    return {
        "vendor": "The kabpf authors",
        "product": "kabpf",
        "version": __version__,
        "url": "",
        "interfaces": list(INTERFACES),
    }


def get_description(request: Request) -> Mapping[str, Any]:
    """The description of one of INTERFACES. Raises CallError for another."""
    name = request.parameters["interface"]
    if name not in INTERFACES:
        raise CallError.of_service("InterfaceNotFound", interface=name)
    return {"description": INTERFACES[name]}


def attach(request: Request) -> Mapping[str, Any]:
    """Activate the policy that the request asks for, in place of one that it had put there.

    Returns when it is active. Raises CallError and KabpfError: then the files are as before, or it
    is active, and all that was refused is the update of open sockets.
    """
    tree = cgroups.find_tree(mountinfo.own_mounts())
    file = dropins.owned_file(request.uid, request.cgroup.id)
    with _active(tree) as active:
        loaded, found = active.loaded, active.standing.active()
        policies = found.snapshot.policies
        parsed = [policy_file for path, policy_file in found.parsed.items() if path != file]
        content = drop_in(request, parsed)
        _check_bounds(content, file, parsed)
        alive, over = _others(policies, tree, request.cgroup.id)
        _check_count([policy.owner for policy in alive], request.uid)
        _check_records(loaded.records().values(), over, request.uid)
        # Those of the cgroup's former owners, and what kabpfd removes where it runs.
        former = {*dropins.owned(request.cgroup.id), *(Path(each.source.path) for each in over)}
        paths = {each.until.id: each.until.path for each in over if each.until}
        with active.changing(request.cgroup, paths) as stack:
            for each in former - {file}:
                stack.enter_context(dropins.written(each, None))
            with dropins.written(file, content):
                snapshot = active.standing.active().snapshot
                resolver = active.resolver(snapshot)
                policy = dropins.winner(resolver, file, request.cgroup, tree)
                before = dropins.updated(loaded, policy)
                active.put(snapshot, Attached(request.cgroup, policy, resolver))
    active.update()
    return {
        "cgroup": request.cgroup.path,
        "policy": policy.name,
        "file": str(file),
        "options": options_json(policy.rules.options),
        "updated": max(0, _updated(policy, tree) - before),
    }


def detach(request: Request) -> Mapping[str, Any]:
    """Undo `attach`. Raises CallError, as where nothing is attached, and KabpfError."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with _active(tree) as active:
        removed = dropins.owned(request.cgroup.id)
        if not removed:
            raise refused(f"{request.cgroup.path} is not attached")
        with active.changing(request.cgroup) as stack:
            for file in removed:
                stack.enter_context(dropins.written(file, None))
            active.put(active.standing.active().snapshot)
    active.update()
    return {"removed": [str(file) for file in removed]}


def _updated(policy: Policy, tree: CgroupTree) -> int:
    with contextlib.suppress(RefusedError), loading.opened(PINS, tree) as loaded:
        if loaded:
            return dropins.updated(loaded, policy)
    return 0  # unloaded meanwhile, or another version's


@dataclass
class _Active:
    """The data plane and the policy files, under the lock."""

    tree: CgroupTree
    loaded: Dataplane
    standing: Standing
    paths: dict[int, str] = field(default_factory=dict)  # of cgroups whose policies change
    owed: dict[int, CgroupEntry] = field(default_factory=dict)

    @contextlib.contextmanager
    def changing(
        self, cgroup: Cgroup, paths: Mapping[int, str] | None = None
    ) -> Iterator[contextlib.ExitStack]:
        """Inside, files of users change that concern a cgroup, and others whose cgroups are at
        `paths`; where this process ends there, the next request knows."""
        self.paths = {**(paths or {}), cgroup.id: cgroup.path}
        by_text = {str(id): path for id, path in self.paths.items()}
        notes.keep_begun(Begun(cgroup.id, by_text), RUN)
        try:
            with contextlib.ExitStack() as stack:
                yield stack
        except BaseException:
            # The files are as they were, if not the same inodes; where that fails, for the next.
            with contextlib.suppress(KabpfError):
                self.put(self.standing.active().snapshot, again=True)
            raise

    def resolver(self, snapshot: Snapshot) -> Resolver:
        """What finds policies of those alone that count: since a call was allowed, or a request was
        killed, the cgroup may have become somebody else's."""
        policies = transient.without_former_owners(snapshot.policies, self.tree)
        return reconcile.resolver(policies, self.tree)

    def put(
        self, snapshot: Snapshot, attached: Attached | None = None, *, again: bool = False
    ) -> None:
        """Activate what files of users say; open sockets are left to `update`."""
        policies = transient.without_former_owners(snapshot.policies, self.tree)
        applied = notes.read_applied(RUN)
        try:
            owed = owned.activate(
                policies, self.loaded, self.tree, self.paths, attached, again=again
            )
            if owed is None or applied is None or not _follows(snapshot, applied):
                dropins.activate(snapshot, self.loaded)
            else:
                self.owed |= owed
                sources = {policy.name: str(policy.source) for policy in snapshot.policies}
                applied = applied._replace(stamp=snapshot.stamp, sources=sources)
                notes.keep_applied(applied, RUN)
            notes.forget_begun(RUN)
        finally:
            tell_changed()

    def finish(self, begun: Begun) -> None:
        """Activate what a request that was killed has left. Where that is refused its policy is
        taken back, or left to a look at everything, so that it keeps no other request out."""
        try:
            self._complete(begun)
        except NotUpdatedError:  # new sockets have it, and what is owed is noted
            notes.forget_begun(RUN)
        except RefusedError as error:
            self._take_back(begun, error)

    def _complete(self, begun: Begun) -> None:
        snapshot = self.standing.active().snapshot
        self.paths = {int(id): path for id, path in begun.paths.items()}
        resolver, attached = self.resolver(snapshot), None
        if policy := resolver.automaton.owned.get(begun.cgroup_id):
            cgroup = Cgroup(begun.cgroup_id, 0, self.paths[begun.cgroup_id])
            found = resolve_at(resolver.automaton, cgroup, resolver.containers)
            if found.policy is policy and self.tree.has(cgroup):
                attached = Attached(cgroup, policy, resolver)
        self.put(snapshot, attached, again=True)

    def _take_back(self, begun: Begun, problem: RefusedError) -> None:
        where = f"the rest of a killed request for {begun.paths[str(begun.cgroup_id)]}"
        try:
            for file in dropins.owned(begun.cgroup_id):
                file.unlink(missing_ok=True)
            self.put(self.standing.active().snapshot, again=True)
            log.warning("%s was taken back: %s", where, problem)
        except (RefusedError, OSError) as error:
            refused = f"{where} can't be taken back: {error}"
            log.warning("%s; try: kabpfctl apply", refused)
            if applied := notes.read_applied(RUN):
                notes.keep_applied(applied._replace(refused=refused), RUN)
            notes.forget_begun(RUN)
            tell_changed()  # kabpfd looks at everything

    def update(self) -> None:
        """Update the open sockets of what `put` has changed; without the lock."""
        owned.update(self.owed, self.tree, locked_for_user(WAIT_S))


@contextlib.contextmanager
def _active(tree: CgroupTree) -> Iterator[_Active]:
    """The data plane, under the lock, where it is ours, and the policy files: to activate what
    waits for an administrator, or another version, is not for users."""
    with (
        locked_for_user(WAIT_S),
        loading.opened(PINS, tree) as loaded,
    ):
        if loaded is None:
            raise refused(_NOT_ACTIVE)
        if loaded.needs_pins_per_cgroup:  # and kabpf-request makes none
            raise refused(_NOT_BY_BCC)
        active = _Active(tree, loaded, waiting.look())
        if begun := notes.read_begun(RUN):
            active.finish(begun)
        yield active


def _follows(snapshot: Snapshot, applied: Applied) -> bool:
    """Whether all of a snapshot is active but for users' policies: not what a command of root's has
    written that was killed."""
    if snapshot.stamp == waiting.STAMP:  # never counts as applied
        return True
    return files.differ_by_users_alone(applied.stamp, snapshot.stamp)


def _numbers(words: Mapping[str, str], defaults: Draft) -> Options:
    """The options that words and defaults come to, without ranges and what is set before the SYN:
    with the one active each setsockopt(2) of the machine is looked at, with the other each
    connection. Raises CallError for words that users may not ask for."""
    for key, word in words.items():
        try:
            options.check(key, word)
        except PolicyError:
            raise CallError.of_service("InvalidParameter", parameter=key) from None
        if ".." in word:
            raise CallError.of_service("InvalidParameter", parameter=key)
    draft = options.parse({key: Node(word, key, Source("", 0)) for key, word in words.items()})
    try:
        numbers, _ = options.finish(options.over(draft, defaults), "the request")
    except PolicyError as error:
        raise refused(str(error).removeprefix(":0: ")) from None
    not_theirs: dict[str, Any] = {row.field: None for row in OPTIONS if not row.for_users}
    return options.without_ranges(numbers)._replace(**not_theirs)


def _check_bounds(content: bytes, file: Path, parsed: list[PolicyFile]) -> None:
    (policy,) = parser.combine([parser.parse(content, str(file))])
    if reason := limits.denial(policy, parser.users_of(parsed)):
        raise denied(reason)


def _others(
    policies: Iterable[Policy], tree: CgroupTree, id: int
) -> tuple[list[Policy], list[Policy]]:
    """Users' policies for other cgroups: those active, and those whose cgroup is gone or somebody
    else's by now."""
    alive: list[Policy] = []
    over: list[Policy] = []
    for policy in policies:
        if policy.until and policy.owner is not None and policy.until.id != id:
            is_over = transient.is_over(Ending(policy.until, policy.owner), tree)
            (over if is_over else alive).append(policy)
    return alive, over


def _check_records(records: Iterable[PolicyRecord], over: Iterable[Policy], uid: int) -> None:
    """Those of one name are counted one by one."""
    gone = {policy.name for policy in over}
    names = [record.name for record in records if record.name not in gone]
    theirs = fnmatch.filter(names, dropins.owned_name(uid, "*"))
    everybodys = fnmatch.filter(names, dropins.owned_name("*", "*"))
    if len(theirs) >= RECORDS_MAX or len(everybodys) >= ALL_RECORDS_MAX:
        raise refused(
            "too many former policies are remembered; retry after some attached cgroups are removed"
        )


def _check_count(owners: list[int | None], uid: int) -> None:
    if owners.count(uid) >= POLICIES_MAX:
        raise denied(f"uid {uid} may attach at most {POLICIES_MAX} cgroups")
    if len(owners) >= ALL_POLICIES_MAX:
        raise refused(f"users may attach at most {ALL_POLICIES_MAX} cgroups")
