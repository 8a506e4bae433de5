"""Where `kabpfctl run` moves its process: into a cgroup of its own.

In a unit's cgroup it is made below that, by hand: the unit's limits hold on, its end ends the
command, and logind finds the session. Elsewhere systemd is asked for a scope.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kabpf.apply import transient
from kabpf.errors import RefusedError
from kabpf.faults import fault_point
from kabpf.kernel import cgroups
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import Cgroup
from kabpf.policy import files
from kabpf.runtime import pidlock
from kabpf.runtime.locks import RUN, locked
from kabpf.systemd import scopes

TRIES = 5  # at a new cgroup that is removed before it is entered


@contextlib.contextmanager
def entered(tree: CgroupTree, name: str, program: str) -> Iterator[Cgroup]:
    """Move this process, root's, into a new cgroup, which goes with its last process, and hold the
    lock. Where the block fails, there is nothing left of it. Raises RefusedError."""
    above = cgroups.path_of_process("self")
    if scopes.is_booted() and not _is_made_by_hand(tree, above):
        with _watched(tree) as watch:
            path = _scope(name, program)
            with locked():
                watch(path)
                yield tree.find(path)
        return
    path = f"{above.rstrip('/')}/{name}"
    # Elsewhere than under systemd nobody else removes the cgroup, whatever becomes of a daemon. The
    # watcher's home is the root, so as to outlive what is killed with the cgroup above.
    watched = _watched(tree, "/") if scopes.is_booted() else transient.watcher(tree, RUN, home="/")
    with watched as watch, locked():
        watch(path)
        with _made(tree, above, path):
            yield tree.find(path)


@contextlib.contextmanager
def entered_by_user(tree: CgroupTree, name: str, program: str) -> Iterator[str]:
    """The same for a user, whose policy ends with the cgroup; its path."""
    above = cgroups.path_of_process("self")
    if not scopes.is_booted() or not _is_made_by_hand(tree, above):
        yield _scope(name, program)
        return
    path = f"{above}/{name}"
    with _made(tree, above, path):
        yield path


def _is_made_by_hand(tree: CgroupTree, above: str) -> bool:
    """Whether a cgroup is made below this one. Raises RefusedError where a service would lose its
    process."""
    unit = scopes.unit_of(above)
    closed = _closed(tree, above)
    if not unit or not closed:
        return bool(unit)
    if unit.endswith(".scope"):  # as a user's session, which is root's
        return False
    raise RefusedError(
        f"run inside of {unit}: {closed} can't be written to",
        hint=f"write a policy for the unit: {files.SYSTEM.drop_ins[0]}/{unit}.yaml",
    )


def _closed(tree: CgroupTree, above: str) -> str:
    """What a unit's settings keep this process from writing to, as ProtectControlGroups= and
    ProtectSystem=strict do, or nothing."""
    if not os.access(tree.directory(above), os.W_OK):
        return "its cgroup"
    is_closed = os.geteuid() == 0 and RUN.exists() and not os.access(RUN, os.W_OK)
    return str(RUN) if is_closed else ""


def _watched(tree: CgroupTree, home: str = "") -> contextlib.AbstractContextManager[Any]:
    """A watcher where no daemon waits for the end. What neither may remove systemd removes with the
    unit, if no other run does before."""
    return contextlib.nullcontext(str) if pidlock.running() else transient.watcher(tree, RUN, home)


def _scope(name: str, program: str) -> str:
    """The cgroup path of a new scope, in which this process is then."""
    shown = re.sub(r"[^A-Za-z0-9._+-]", "_", os.path.basename(program))
    return scopes.enter(name, f"kabpfctl run {shown}")


@contextlib.contextmanager
def _made(tree: CgroupTree, above: str, path: str) -> Iterator[None]:
    """Inside, the cgroup is there and this process in it."""
    transient.remove_ended(tree, above)
    _enter_new(tree, path)
    try:
        yield
    except BaseException:
        _move(tree, above)
        os.rmdir(tree.directory(path))
        raise


def _enter_new(tree: CgroupTree, path: str) -> None:
    """Users have no lock: another run of theirs may take the cgroup for one that has ended."""
    for tries_left in reversed(range(TRIES)):
        fault_point("make the cgroup")
        try:
            os.mkdir(tree.directory(path))
        except OSError as error:
            raise RefusedError(
                f"make cgroup {path}", error.errno or 0, "the cgroup2 tree must be writable"
            ) from None
        try:
            _move(tree, path)
            return
        except RefusedError as error:
            if error.error != errno.ENOENT or not tries_left:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(tree.directory(path))
                raise


def _move(tree: CgroupTree, path: str) -> None:
    fault_point("enter the cgroup")
    try:
        Path(tree.directory(path), "cgroup.procs").write_text("0")
    except OSError as error:
        raise RefusedError(f"enter cgroup {path}", error.errno or 0) from None
