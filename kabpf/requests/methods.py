"""The methods of io.kabpf, for callers who may: policies for cgroups of their own."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kabpf import __version__
from kabpf.apply import dropins, transient, waiting
from kabpf.apply.transient import Ending
from kabpf.apply.waiting import Standing
from kabpf.errors import PolicyError
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS, Dataplane
from kabpf.plan.state import FORMER_MAX, Cgroup
from kabpf.policy import files, options, parser, user_limits, writer
from kabpf.policy.model import OPTIONS, Mode, Options, Policy, Rules, Selector, Until, options_json
from kabpf.policy.options import Draft
from kabpf.policy.parser import PolicyFile
from kabpf.policy.yaml import Node, Source
from kabpf.requests.interface import INTERFACES, denied, refused
from kabpf.requests.varlink import CallError
from kabpf.runtime import notes
from kabpf.runtime.locks import RUN, locked_for_user

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

    Returns when it is active. Raises CallError and KabpfError, and then the files are as before.
    """
    tree = cgroups.find_tree(mountinfo.own_mounts())
    file = dropins.owned_file(request.uid, request.cgroup.id)
    with _active(tree) as (loaded, standing):
        policies = (before := standing.active()).snapshot.policies
        parsed = [policy_file for path, policy_file in before.parsed.items() if path != file]
        content = drop_in(request, parsed)
        _check_bounds(content, file, parsed)
        alive, over = _others(policies, tree, request.cgroup.id)
        _check_count([policy.owner for policy in alive], request.uid)
        names = {record.name for record in loaded.records().values()}
        _check_records(names - {policy.name for policy in over}, request.uid)
        # Those of the cgroup's former owners, and what kabpfd removes where it runs.
        former = {*dropins.owned(request.cgroup.id), *(Path(each.source.path) for each in over)}
        with contextlib.ExitStack() as stack:
            for each in former - {file}:
                stack.enter_context(dropins.written(each, None))
            with dropins.written(file, content):
                snapshot = standing.active().snapshot
                policy = dropins.winner(snapshot.policies, file, request.cgroup, tree)
            changed, _ = dropins.attach(policy, snapshot, loaded)
    return {
        "cgroup": request.cgroup.path,
        "policy": policy.name,
        "file": str(file),
        "options": options_json(policy.rules.options),
        "updated": changed or 0,
    }


def detach(request: Request) -> Mapping[str, Any]:
    """Undo `attach`. Raises CallError, as where nothing is attached, and KabpfError."""
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with _active(tree) as (loaded, standing):
        removed = dropins.owned(request.cgroup.id)
        if not removed:
            raise refused(f"{request.cgroup.path} is not attached")
        with contextlib.ExitStack() as stack:
            for file in removed:
                stack.enter_context(dropins.written(file, None))
            snapshot = standing.active().snapshot
        dropins.activate(snapshot, loaded)
    return {"removed": [str(file) for file in removed]}


@contextlib.contextmanager
def _active(tree: CgroupTree) -> Iterator[tuple[Dataplane, Standing]]:
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
        before, applied = files.stamp(files.SYSTEM), notes.read_applied(RUN)
        try:
            yield loaded, waiting.look()
        except BaseException:
            now = files.stamp(files.SYSTEM)
            # Those of users are as they were, if not the same inodes.
            is_as_before = files.differ_by_users_alone(now, before)
            is_whole = applied and applied.stamp == before and notes.read_applied(RUN) == applied
            if applied and is_whole and is_as_before:
                notes.keep_applied(applied._replace(stamp=now), RUN)
            raise


def _numbers(words: Mapping[str, str], defaults: Draft) -> Options:
    """The options that words and defaults come to, without ranges and what is set before the SYN:
    with the one active each setsockopt(2) of the machine is looked at, with the other each
    connection. Raises
    CallError for words that users may not ask for."""
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
    if reason := user_limits.denial(policy, parser.users_of(parsed)):
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


def _check_records(names: Iterable[str], uid: int) -> None:
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
