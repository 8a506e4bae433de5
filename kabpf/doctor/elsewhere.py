"""Units whose policy does not reach their sockets, because these are in other cgroups.

PAM moves processes into the scope of a session, engines run containers in cgroups of their own, and
a manager without BPF makes the listeners of its socket units in its own cgroup. And containers of
users, which no selector of containers names.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kabpf import proc
from kabpf.containers.names import OfUser, of_user
from kabpf.doctor.findings import Finding, Findings, note, warning
from kabpf.doctor.units import properties
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree, path_of_process
from kabpf.observe import containers, held
from kabpf.observe.sockets import Socket, units
from kabpf.output import count
from kabpf.plan.state import Cgroup
from kabpf.policy.model import Policy
from kabpf.systemd import scopes, unit_files

UNITS_MAX = 500  # asked for; each takes some 0.1 ms
HOLDERS_MAX = 2000  # processes that are looked at; each takes some 0.1 ms
ANSWER_S = 5
KEYS = ("Id", "ActiveState", "SubState", "MainPID", "ControlGroup", "ExecStart", "PAMName")

_ACTIVE = ("active", "activating", "reloading")
_SESSION = re.compile(r"/user\.slice/(user-[0-9]+\.slice)/session-[^/]+\.scope(/.*)?")
_ARGUMENTS = re.compile(r" argv\[\]=(.*?) ; ignore_errors=", re.DOTALL)
_USERS = re.compile(r"/user@[0-9]+\.service$")
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]+\.service")  # without globs
_PLAIN = re.compile(r"[A-Za-z0-9:_.@/-]*")
_ENGINES = ("docker", "podman", "nerdctl", "ctr")


@dataclass(frozen=True)
class Elsewhere:
    """A unit and why its policy does not reach its sockets; what to do about it."""

    unit: str
    process: int  # its main one, or 0
    text: str
    advice: str


def of_policies(policies: Iterable[Policy], tree: CgroupTree) -> list[Elsewhere]:
    """Of the units that policies select and that are active."""
    names = {
        each.text
        for policy in policies
        for each in policy.selectors
        if each.kind == "unit" and each.text.endswith(".service")
    }
    return of_units(sorted(names), tree)


def of_units(names: Sequence[str], tree: CgroupTree) -> list[Elsewhere]:
    """Of the units of these names and globs that are active; nothing where systemd can't be
    asked."""
    if not names or not scopes.is_booted():
        return []
    import subprocess  # here, because it takes 10 ms

    command = ["systemctl", "show", f"--property={','.join(KEYS)}", "--", *names[:UNITS_MAX]]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(judged(done.stdout.decode(errors="replace"), tree, path_of_process))


def judged(shown: str, tree: CgroupTree, place: Callable[[str], str]) -> Iterator[Elsewhere]:
    """From the output of `systemctl show` on KEYS; `place` finds the cgroup of a process."""
    for found in properties(shown):
        unit = dict.fromkeys(KEYS, "") | found
        if unit["ActiveState"] in _ACTIVE and unit["Id"].endswith(".service"):
            yield from _judged(unit, tree, place)


def _judged(
    unit: dict[str, str], tree: CgroupTree, place: Callable[[str], str]
) -> Iterator[Elsewhere]:
    name, main, own = unit["Id"], unit["MainPID"], unit["ControlGroup"]
    process = int(main) if main.isdecimal() else 0
    where = _place(main, place) if process else ""
    match = _ARGUMENTS.search(unit["ExecStart"])
    words = unit_files.words(match[1]) if match else []
    if where and own and not f"{where}/".startswith(f"{own}/"):
        text = f"{name} is active, but its main process {main} is in {where}"
        yield Elsewhere(name, process, text, _advice(where, words))
    elif _leaves(words):
        engine = _engine(words)
        text = f"{name} runs {engine}, whose containers are in cgroups of their own"
        yield Elsewhere(name, process, text, _container_advice(engine))
    elif not own or not tree.is_populated(Cgroup(0, 0, own)):
        text = f"{name} is active, but no process is in its cgroup{own and ' '}{own}"
        yield Elsewhere(name, process, text, f"systemctl status {name}")


def _place(process: str, place: Callable[[str], str]) -> str:
    try:
        return place(process)
    except RefusedError:  # it has ended, or can't be seen
        return ""


def _engine(words: list[str]) -> str:
    return next((word for word in map(os.path.basename, words) if word in _ENGINES), "")


def _leaves(words: list[str]) -> bool:
    """Whether a command has its work done in an engine's cgroup."""
    commands = [os.path.basename(word) for word in words]
    engine = next((at for at, word in enumerate(commands) if word in _ENGINES), None)
    if engine is None or not {"run", "start", "up", "compose"} & {*commands[engine + 1 :]}:
        return False
    return not {"--cgroups=split", "--cgroups=disabled"} & {*words}


def _advice(where: str, words: list[str]) -> str:
    if session := _SESSION.fullmatch(where):
        return (
            f"start it with User= and without PAM (setpriv, runuser -u), or select unit:"
            f" {session[1]}, which has all sessions of that user"
        )
    if _leaves(words) or "/libpod-" in where or "/docker" in where:
        return _container_advice(_engine(words) or "podman")
    return f"select cgroup: {where}"


def _container_advice(engine: str) -> str:
    if engine == "podman":
        return "add --cgroups=split to podman run, or select cgroup: /machine.slice/libpod-*.scope"
    return "select the containers: cgroup: /system.slice/docker-*.scope"


def managers(sockets: Iterable[Socket]) -> dict[str, list[int]]:
    """The ports of listeners in the cgroups of managers other than the machine's, which make them
    there for their socket units: users', and those in containers."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for each in sockets:
        path = each.cgroup or ""
        is_manager = path.endswith("/init.scope") and path != "/init.scope"
        if each.state == "listen" and is_manager and not each.is_removed:
            found[path].add(each.local.port)
    return {path: sorted(ports) for path, ports in sorted(found.items())}


def managers_above(path: str, tree: CgroupTree) -> Iterator[str]:
    """The cgroups of the managers above a cgroup, but for the machine's, the nearest first: each
    has its manager in a scope of its own. The first has made the cgroup, if that is a unit's."""
    above = path.rpartition("/")[0]
    while above:
        if os.path.isdir(tree.directory(f"{above}/init.scope")):
            yield above
        above = above.rpartition("/")[0]


def container(path: str, tree: CgroupTree) -> str:
    """The cgroup of the systemd in a container that a cgroup belongs to, or nothing."""
    managers = managers_above(path, tree)
    return next((each for each in managers if not _USERS.search(each)), "")


def of_manager(path: str, ports: list[int]) -> Elsewhere:
    """What there is to say of a manager's listeners."""
    shown = ", ".join(map(str, ports))
    text = (
        f"{path} has the listeners of its manager's socket units (port {shown}): a policy for"
        " such a unit does not reach what they accept"
    )
    return Elsewhere(path, 0, text, f"select cgroup: {path}")


def of_users(paths: Iterable[str]) -> list[Elsewhere]:
    """Of users' containers that these cgroups are of or in, one for each user: why no selector of
    containers names them, and which one does."""
    by_user: defaultdict[tuple[int, str], dict[str, OfUser]] = defaultdict(dict)
    for path in paths:
        if (found := of_user(path)) and not containers.of(path):
            by_user[found.user, found.manager][found.path] = found
    return [_of_user(user, manager, own) for (user, manager), own in sorted(by_user.items())]


def _of_user(user: int, manager: str, found: Mapping[str, OfUser]) -> Elsewhere:
    first, *more = sorted(found)
    others = f" and {count(len(more), 'more container')}" if more else ""
    are = "are containers" if more else "is a container"
    text = (
        f"{first}{others} {are} of user {user}, whose engine's store is in the user's home, which"
        " kabpf does not read: container: and pod: selectors do not name"
        f" {'them' if more else 'it'}"
    )
    selectors = {_selector_of(each) for each in found.values()}
    selector = selectors.pop() if len(selectors) == 1 else f"cgroup: {manager}/**"
    return Elsewhere(first, 0, text, f"select {selector}")


def _selector_of(container: OfUser) -> str:
    """One that names a user's container: by the unit that it is in, as with quadlet, or else with
    the others beside it. Users choose the names below their managers."""
    above, _, name = container.path.rpartition("/")
    unit = above.rpartition("/")[2]
    if len(above) > len(container.manager) and _UNIT.fullmatch(unit):
        return f"user_unit: {unit}"
    if _PLAIN.fullmatch(above):
        return f"cgroup: {above}/{name.replace(container.identity.id, '*')}"
    return f"cgroup: {container.manager}/**"


def foreign_listeners(
    sockets: Sequence[Socket], covered: Iterable[tuple[Cgroup, str]], tree: CgroupTree
) -> Findings:
    """The listeners of other cgroups that processes in these hold, where they have another policy
    or none; the cgroups come with the names of theirs."""
    where = {
        process: (path, name)
        for cgroup, name in covered
        if cgroup.name != "init.scope"  # a manager holds those of all its socket units
        for path in (cgroup.path,)  # which may be long
        for process in tree.processes([path])
    }
    told: set[tuple[str, int | None]] = set()  # workers hold what their parent does
    for process, listeners in held.listeners(sorted(where)[:HOLDERS_MAX], sockets):
        path, name = where[process]
        # Of several at one address any may be its own.
        own = {each.local for each in listeners if each.policy == name}
        others: defaultdict[int | None, list[Socket]] = defaultdict(list)
        for each in listeners:
            if each.local not in own:
                others[each.cgroup_id].append(each)
        for cgroup_id, found in others.items():
            if (path, cgroup_id) not in told:
                told.add((path, cgroup_id))
                yield _of_listeners(process, path, found)


def _of_listeners(process: int, where: str, found: list[Socket]) -> Finding:
    first = found[0]
    unit = next(reversed(units(where)), where)
    ports = ", ".join(map(str, sorted({each.local.port for each in found})))
    mark = " (removed)" if first.is_removed and first.cgroup else ""
    nameless = "a removed cgroup" if first.is_removed else "an unknown cgroup"
    whose = f"{first.cgroup or nameless}{mark}"
    text = (
        f"{unit} has listeners of another cgroup: process {process} listens at port {ports} for"
        f" {whose}, which has {f'policy {first.policy}' if first.policy else 'no policy'}"
    )
    if first.policy:
        return note(text, f"kabpfctl explain {process}")
    if first.cgroup is None:
        return warning(text, f"systemctl stop {unit}; systemctl start {unit}")
    selector = f"unit: {first.unit}" if first.unit else f"cgroup: {first.cgroup}"
    return warning(text, f"select {selector}")


def started(process: int, found: Iterable[Elsewhere]) -> Elsewhere | None:
    """The unit that started a process, directly or by others, of those found."""
    by_process = {each.process: each for each in found if each.process}
    while process > 1:
        if process in by_process:
            return by_process[process]
        process = _parent(process)
    return None


def _parent(process: int) -> int:
    try:
        (word,) = proc.fields(proc.read(f"/proc/{process}/status"), b"PPid")
        return proc.number(word)
    except (OSError, ValueError):
        return 0
