"""What users may ask of kabpf: policies for cgroups of their own. Serves one connection (Varlink).

Who may call what is said by TABLE and nowhere else; what is not in it is denied. A cgroup is
named by its path, which leads to an open directory, and from there on is that directory: its
owner decides, and the policy is tied to its id.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from kabpf import (
    __version__,
    attaching,
    cgroups,
    files,
    language,
    libbpf,
    loading,
    notes,
    options,
    peers,
    reconcile,
    users,
    varlink,
)
from kabpf.cgroups import CgroupTree
from kabpf.channel import Channel
from kabpf.client import INTERFACE
from kabpf.dataplane import PINS, Dataplane
from kabpf.errors import KabpfError, PolicyError, RefusedError
from kabpf.language import RUNTIME, PolicyFile
from kabpf.nodes import Node, Source
from kabpf.options import Draft
from kabpf.peers import Peer
from kabpf.plan import FORMER_MAX, Cgroup
from kabpf.policy import GLOB, Policy, options_json
from kabpf.varlink import Call, CallError

SETTLE_S = 5  # for changes of an administrator to be applied
TALK_S = 10  # for all that the caller has to send and to take
CALLS_MAX = 16  # in a connection; varlinkctl makes three
CONNECTIONS_MAX = 4  # of a user at once; systemd counts them by users since version 256
PATH_MAX = 4095  # bytes of the directory's path, as the kernel's without the NUL
POLICIES_MAX = 64  # of a user
ALL_POLICIES_MAX = 1024  # of all users, a quarter of what the kernel has room for
# In the kernel, with the former ones that cgroups remember: without a bound, who attaches and
# detaches one cgroup after the other would have those of everybody forgotten.
RECORDS_MAX = POLICIES_MAX * (1 + FORMER_MAX)
ALL_RECORDS_MAX = 2 * ALL_POLICIES_MAX

DESCRIPTION = """\
# TCP keepalive by policy, for cgroups that belong to the caller.
interface io.kabpf

# Puts a policy in force on a cgroup and on what is below it, until the cgroup is removed. One that
# was put there before is replaced. The path is absolute in the cgroup2 tree. Options are spelled
# as in kabpf.yaml(5), but not as ranges: idle "60s", interval "10s", probes "6", user_timeout
# "90s", "auto" or "off", preset "aws-nlb". What is left out comes from the administrator's
# defaults, as they are now, unless defaults is false; and else stays as it is on each socket.
# Replies when the policy is in force; retrofitted is how many open sockets were changed, which
# existing false leaves alone.
method Attach(
  cgroup: string,
  keepalive: ?(on, off),
  idle: ?string,
  interval: ?string,
  probes: ?string,
  user_timeout: ?string,
  preset: ?string,
  defaults: ?bool,
  mode: ?(fill, override),
  existing: ?bool
) -> (
  cgroup: string,
  policy: string,
  file: string,
  options: object,
  retrofitted: int
)

# Undoes Attach. Sockets keep the options that they have.
method Detach(cgroup: string) -> (removed: []string)

# The caller may not do that: another's cgroup, or not what the administrator lets users have.
error Denied (reason: string)

# The caller may, but it can't be done now.
error Refused (reason: string)
"""

INTERFACES = {varlink.SERVICE: varlink.DESCRIPTION, INTERFACE: DESCRIPTION}

_NOT_IN_FORCE = (
    "kabpf is not in force, expected an administrator to have said: systemctl start kabpf"
)
_NOT_BY_BCC = "what users ask for takes BTF, which the bcc loader does without, expected root"
_NOT_APPLIED = (
    "policy files have changed, expected an administrator to have said: systemctl reload kabpf"
)


class Who(StrEnum):
    """What a caller is to the cgroup that a call names; to none, STRANGER or ROOT."""

    ROOT = "root"
    OWNER = "owner"
    STRANGER = "stranger"
    OUTSIDER = "outsider"  # not full: one of another user namespace, whatever its uid is


@dataclass(frozen=True)
class Request:
    """A call that is allowed, with its parameters checked."""

    uid: int
    cgroup: Cgroup
    parameters: Mapping[str, Any]
    tell_changed: Callable[[], None]


@dataclass(frozen=True)
class Rule:
    """Who may call a method, what its parameters are, and what does it."""

    callers: frozenset[Who]
    handle: Callable[[Request], Mapping[str, Any]]
    types: Mapping[str, type]
    required: tuple[str, ...]


def serve(descriptor: int, tell_changed: Callable[[], None], say: Callable[[str], None]) -> None:
    """Answer the calls that come by a connected socket, which is closed then.

    `tell_changed` lets a daemon know of changes, `say` is told what was done, and what was no
    message. Raises RefusedError where the descriptor is no Unix socket.
    """
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
        peer = peers.peer(connection)
    except OSError as error:
        raise RefusedError("read a request", error.errno or 0, "expected a Unix socket") from None
    os.umask(0o022)  # policy files are for everybody to read
    # Somebody in other user namespaces may have uids by the ten thousand.
    holder = peer.uid if peer.is_full else peers.OVERFLOW_UID
    with connection, _slot(holder) as is_free:
        if not is_free:
            return
        channel = Channel(connection, TALK_S)
        try:
            for _ in range(CALLS_MAX):
                if (message := channel.receive()) is None:
                    return
                call = varlink.read_call(message)
                answer = _answer(call, peer, tell_changed, say)
                if not call.oneway:
                    channel.send(answer)
        except ConnectionError:
            pass  # gone before its answer
        except (varlink.MessageError, TimeoutError) as problem:
            say(f"uid {peer.uid}: {problem}")


def allowed(call: Call, peer: Peer, tell_changed: Callable[[], None]) -> Request:
    """The call as a request. Raises CallError unless it is one of TABLE, well-formed, and allowed
    to who asks."""
    if call.interface not in INTERFACES:
        raise CallError.of_service("InterfaceNotFound", interface=call.interface)
    if call.method not in TABLE:
        raise CallError.of_service("MethodNotFound", method=call.method)
    rule = TABLE[call.method]
    if not peer.is_full and Who.OUTSIDER not in rule.callers:
        raise CallError.of_service("PermissionDenied")
    if call.upgrade:
        raise CallError.of_service("MethodNotImplemented", method=call.method)
    parameters = varlink.checked(call, rule.types, rule.required)
    cgroup, owner = NOWHERE, None
    if "cgroup" in rule.types:
        cgroup, owner = _opened(parameters["cgroup"], peer.uid)
    if who(peer, owner) not in rule.callers:
        raise _denied(f"{cgroup.path} belongs to uid {owner}, expected uid {peer.uid}")
    return Request(peer.uid, cgroup, parameters, tell_changed)


def who(peer: Peer, owner: int | None) -> Who:
    """What somebody is to a cgroup with this owner, or to none."""
    if not peer.is_full:
        return Who.OUTSIDER
    if peer.uid == 0:
        return Who.ROOT
    return Who.OWNER if peer.uid == owner else Who.STRANGER


def drop_in(request: Request, parsed: list[PolicyFile]) -> bytes:
    """The drop-in that a request asks for. It has numbers alone: it can't become wrong by what is
    written elsewhere later, and nobody's words get into a file of root's."""
    given = request.parameters
    words = {key: given[key] for key in options.KEYS if key in given}
    keepalive = given.get("keepalive", "on")
    if keepalive not in ("on", "off") or (keepalive == "off" and words):
        raise CallError.of_service("InvalidParameter", parameter="keepalive")
    if given.get("mode", "fill") not in ("fill", "override"):
        raise CallError.of_service("InvalidParameter", parameter="mode")
    takes_defaults = given.get("defaults", True) and keepalive == "on"
    defaults = language.defaults_of(parsed) if takes_defaults else options.NOTHING
    if numbers := _numbers(words, defaults):
        keepalive = "{" + ", ".join(f"{key}: {text}" for key, text in numbers.items()) + "}"
    path = json.dumps(request.cgroup.path, ensure_ascii=False)
    return (
        f"# Written for uid {request.uid}; kabpfctl detach removes it.\n"
        f"select: [{{cgroup: {path}}}]\n"
        f"keepalive: {keepalive}\n"
        f"mode: {given.get('mode', 'fill')}\n"
        f"existing: {str(given.get('existing', True)).lower()}\n"
        f"until: {{cgroup: {path}, id: {request.cgroup.id}}}\n"
        f"owner: {request.uid}\n"
    ).encode()


@contextlib.contextmanager
def _slot(uid: int) -> Iterator[bool]:
    """Whether the user has not too many connections already. Each has one byte of a file locked, of
    as many as a user may have; the lock goes with its process."""
    descriptor = reconcile.open_lock(reconcile.RUN, "request.lock")
    try:
        first = uid * CONNECTIONS_MAX
        yield any(_locked(descriptor, first + number) for number in range(CONNECTIONS_MAX))
    finally:
        os.close(descriptor)


def _locked(descriptor: int, byte: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except BlockingIOError:
        return False
    return True


def _answer(
    call: Call, peer: Peer, tell_changed: Callable[[], None], say: Callable[[str], None]
) -> bytes:
    try:
        try:
            request = allowed(call, peer, tell_changed)
            found = TABLE[call.method].handle(request)
        except PolicyError:
            raise _refused(_NOT_APPLIED) from None  # users may not read them
        except KabpfError as error:
            raise _refused(str(error)) from None
    except CallError as error:
        return varlink.error(error)
    if call.interface == INTERFACE:
        say(f"uid {peer.uid}: {call.method} {request.cgroup.path}")
    return varlink.reply(found)


def _opened(path: str, uid: int) -> tuple[Cgroup, int]:
    """The cgroup at a path, and the uid that owns its directory. Others than that, and than root,
    are told of none that is closed to them."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    names = path.split("/")[1:]
    if (
        not path.startswith("/")
        or not path.isprintable()
        or GLOB.search(path)
        or len(os.fsencode(tree.directory(path))) > PATH_MAX
        or any(name in ("", ".", "..") for name in names)  # the root, too
    ):
        raise CallError.of_service("InvalidParameter", parameter="cgroup")
    root = os.open(tree.mount, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            status = _status(root, path[1:])
        except RefusedError:
            _check_way(root, names, uid)
            raise
        if uid != status.st_uid:
            _check_way(root, names, uid)
    except RefusedError as error:
        raise RefusedError(
            f"cgroup {path}", error.error, "expected one of the cgroup2 tree"
        ) from None
    finally:
        os.close(root)
    return Cgroup(status.st_ino, 0, path), status.st_uid


def _status(root: int, path: str) -> os.stat_result:
    directory = libbpf.open_within(root, path)
    try:
        if not libbpf.is_cgroup2(directory):
            raise RefusedError("", errno.EXDEV)
        return os.fstat(directory)
    finally:
        os.close(directory)


def _check_way(root: int, names: list[str], uid: int) -> None:
    """Raises RefusedError where a directory on the way to the last of these names is closed to a
    user, or is not there. This process may look into all of them."""
    directory = os.dup(root)
    try:
        for name in names[:-1]:
            inner = libbpf.open_within(directory, name)
            os.close(directory)
            directory = inner
            status = os.fstat(directory)
            search = stat.S_IXUSR if status.st_uid == uid else stat.S_IXOTH
            if uid != 0 and not status.st_mode & search:
                raise RefusedError("", errno.EACCES)
    finally:
        os.close(directory)


def _get_info(_: Request) -> Mapping[str, Any]:
    return {
        "vendor": "The kabpf authors",
        "product": "kabpf",
        "version": __version__,
        "url": "",
        "interfaces": list(INTERFACES),
    }


def _get_description(request: Request) -> Mapping[str, Any]:
    name = request.parameters["interface"]
    if name not in INTERFACES:
        raise CallError.of_service("InterfaceNotFound", interface=name)
    return {"description": INTERFACES[name]}


def _attach(request: Request) -> Mapping[str, Any]:
    tree = cgroups.find_tree(cgroups.own_mounts())
    file = attaching.owned_file(request.uid, request.cgroup.id)
    with _in_force(tree, request) as (loaded, reading):
        _, policies = reading.read()
        parsed = [found for path, (_, found) in reading.cache.items() if path != file]
        content = drop_in(request, parsed)
        _check_bounds(content, file, parsed)
        alive, over = _others(policies, tree, request.cgroup.id)
        _check_count([policy.owner for policy in alive], request.uid)
        names = {record.name for record in loaded.records().values()}
        _check_records(names - {policy.name for policy in over}, request.uid)
        # Those of who owned the cgroup before, and what kabpfd removes where it runs.
        former = {*attaching.owned(request.cgroup.id), *(Path(each.source.path) for each in over)}
        with contextlib.ExitStack() as stack:
            for each in former - {file}:
                stack.enter_context(attaching.written(each, None))
            policy, changed = attaching.attach(
                file, content, request.cgroup, tree, request.tell_changed, reading.read, loaded
            )
    return {
        "cgroup": request.cgroup.path,
        "policy": policy.name,
        "file": str(file),
        "options": options_json(policy.rules.options),
        "retrofitted": changed or 0,
    }


def _detach(request: Request) -> Mapping[str, Any]:
    tree = cgroups.find_tree(cgroups.own_mounts())
    with _in_force(tree, request) as (loaded, reading):
        removed = attaching.owned(request.cgroup.id)
        if not removed:
            raise _refused(f"{request.cgroup.path} is not attached, expected an attached cgroup")
        with contextlib.ExitStack() as stack:
            for file in removed:
                stack.enter_context(attaching.written(file, None))
            stamp, policies = reading.read()
        attaching.put_in_force(policies, tree, loaded, stamp, request.tell_changed)
    return {"removed": [str(file) for file in removed]}


@dataclass(frozen=True)
class _Reading:
    """Reads the policy files as long as none changes but those of users, by requests."""

    own: frozenset[Path]
    others: str  # their stamp
    cache: files.Cache = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request) -> _Reading:
        file = attaching.owned_file(request.uid, request.cgroup.id)
        own = {RUNTIME, file, *attaching.owned("*")}
        return cls(frozenset(own), files.stamp(files.SYSTEM, own))

    def is_current(self) -> bool:
        return files.stamp(files.SYSTEM, self.own) == self.others

    def read(self) -> attaching.Read:
        found = files.stamp(files.SYSTEM), files.load(files.SYSTEM, self.cache)
        if not self.is_current():
            raise _refused(_NOT_APPLIED)
        return found


@contextlib.contextmanager
def _in_force(tree: CgroupTree, request: Request) -> Iterator[tuple[Dataplane, _Reading]]:
    """The data plane, under the lock, where it is ours and has what the policy files say, and how
    to read these: to put in force what waits for an administrator, or another version, is not for
    users."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        with (
            reconcile.locked(),
            loading.open_if_loaded(PINS, tree) or contextlib.nullcontext() as loaded,
        ):
            if loaded is None:
                raise _refused(_NOT_IN_FORCE)
            if not loaded.reaches_open_sockets:  # which takes pins, and kabpf-request makes none
                raise _refused(_NOT_BY_BCC)
            reading = _Reading.of(request)  # before the look at whether files have changed
            applied = notes.read_applied(reconcile.RUN)
            if applied and applied.stamp == files.stamp(files.SYSTEM):
                try:
                    yield loaded, reading
                except BaseException:
                    stamp = files.stamp(files.SYSTEM)
                    # Those of users are as they were, if not the same inodes.
                    if reading.is_current() and notes.read_applied(reconcile.RUN) == applied:
                        notes.keep_applied(replace(applied, stamp=stamp), reconcile.RUN)
                    raise
                return
        if time.monotonic() > deadline:
            raise _refused(_NOT_APPLIED)
        time.sleep(0.1)  # for kabpfd, which is told of changes


def _numbers(words: Mapping[str, str], defaults: Draft) -> dict[str, str]:
    """The options that words and defaults come to. Raises CallError for what users may not ask for,
    ranges for one: with a range in force, each setsockopt(2) of the machine is looked at."""
    for key, word in words.items():
        try:
            options.check(key, word)
        except PolicyError:
            raise CallError.of_service("InvalidParameter", parameter=key) from None
        if ".." in word:
            raise CallError.of_service("InvalidParameter", parameter=key)
    draft = options.read({key: Node(word, key, Source("", 0)) for key, word in words.items()})
    try:
        found, _ = options.finish(options.over(draft, defaults), "the request")
    except PolicyError as error:
        raise _refused(str(error).removeprefix(":0: ")) from None
    found = options.without_ranges(found)
    values = {
        "idle": (found.idle_s, "s"),
        "interval": (found.interval_s, "s"),
        "probes": (found.probes, ""),
        "user_timeout": (found.user_timeout_ms, "ms"),
        "jitter": (found.jitter_percent, "%"),
    }
    return {key: f"{value}{unit}" for key, (value, unit) in values.items() if value}


def _check_bounds(content: bytes, file: Path, parsed: list[PolicyFile]) -> None:
    (policy,) = language.combine([language.parse(content, str(file))])
    if reason := users.denial(policy, language.users_of(parsed)):
        raise _denied(reason)


def _others(
    policies: Iterable[Policy], tree: CgroupTree, id: int
) -> tuple[list[Policy], list[Policy]]:
    """Users' policies for other cgroups: those in force, and those whose cgroup is gone."""
    alive: list[Policy] = []
    over: list[Policy] = []
    for policy in policies:
        if policy.until and policy.owner is not None and policy.until.id != id:
            is_over = not tree.has(Cgroup(policy.until.id, 0, policy.until.path))
            (over if is_over else alive).append(policy)
    return alive, over


def _check_records(names: Iterable[str], uid: int) -> None:
    theirs = fnmatch.filter(names, attaching.owned_name(uid, "*"))
    everybodys = fnmatch.filter(names, attaching.owned_name("*", "*"))
    if len(theirs) >= RECORDS_MAX or len(everybodys) >= ALL_RECORDS_MAX:
        raise _refused("too many policies are remembered, expected cgroups to end that had some")


def _check_count(owners: list[int | None], uid: int) -> None:
    if owners.count(uid) >= POLICIES_MAX:
        raise _denied(f"{POLICIES_MAX} cgroups of uid {uid} are attached, expected no more")
    if len(owners) >= ALL_POLICIES_MAX:
        raise _refused(f"{ALL_POLICIES_MAX} cgroups of users are attached, expected no more")


def _denied(reason: str) -> CallError:
    return CallError(f"{INTERFACE}.Denied", reason=reason)


def _refused(reason: str) -> CallError:
    return CallError(f"{INTERFACE}.Refused", reason=reason)


NOWHERE = Cgroup(0, 0, "")
_EVERYBODY = frozenset(Who)
_OWNERS = frozenset({Who.ROOT, Who.OWNER})
_ATTACH = {
    "cgroup": str,
    **dict.fromkeys(("keepalive", *users.KEYS, "preset", "mode"), str),
    **dict.fromkeys(("defaults", "existing"), bool),
}

TABLE: Mapping[str, Rule] = {
    varlink.GET_INFO: Rule(_EVERYBODY, _get_info, {}, ()),
    varlink.GET_DESCRIPTION: Rule(_EVERYBODY, _get_description, {"interface": str}, ("interface",)),
    f"{INTERFACE}.Attach": Rule(_OWNERS, _attach, _ATTACH, ("cgroup",)),
    f"{INTERFACE}.Detach": Rule(_OWNERS, _detach, {"cgroup": str}, ("cgroup",)),
}
