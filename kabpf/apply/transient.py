"""Policies that end with their cgroup, and the cgroups that `kabpfctl run` makes by hand.

`run` writes a drop-in for its cgroup into /run/kabpf/transient.d. Whoever reads the policy files
prunes first: what is over goes, and with it the cgroup, where systemd has not made it. A process
that dies at any step so leaves nothing that the next one does not find.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kabpf import root_files
from kabpf.errors import RefusedError
from kabpf.faults import fault_point
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import Cgroup
from kabpf.policy import files, writer
from kabpf.policy.model import Policy, Until
from kabpf.policy.of_commands import RUNTIME, TRANSIENT
from kabpf.systemd import scopes

# With .scope behind it where systemd has made it.
NAME = re.compile(r"kabpf-run-[0-9]+-[0-9a-f]{8}")


def new_name() -> str:
    """A name for this process's cgroup that no other has, or had."""
    return f"kabpf-run-{os.getpid()}-{os.urandom(4).hex()}"


def drop_in(name: str) -> Path:
    """The policy file of the cgroup of this name."""
    return TRANSIENT / f"{name}.yaml"


def text(policy: Policy) -> bytes:
    """The drop-in of a policy that ends with its cgroup, as `kabpfctl run` writes it. Raises
    RefusedError where it can't be spelled."""
    return writer.text(policy, "Written by kabpfctl run; it goes with the cgroup.").encode()


@contextlib.contextmanager
def watcher(tree: CgroupTree, run: Path, home: str = "") -> Iterator[Callable[[str], object]]:
    """Starts a process that stays where this one is now, or moves to the cgroup `home` if it may,
    and is nobody's child. Tell it the path of a cgroup that has, or under the lock is to have, its
    processes: it prunes when the last one is gone. It ends where the block ends before.
    """
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        raise RefusedError("start a watcher", error.errno or 0) from None
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.close(writer)
                _watch(tree, reader, run, home)
        finally:
            os._exit(0)
    os.close(reader)
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
        os.waitpid(child, 0)

    def tell(path: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # killed
            os.write(writer, os.fsencode(path))

    try:
        yield tell
    finally:
        os.close(writer)


def _watch(tree: CgroupTree, reader: int, run: Path, home: str) -> None:
    if home:
        with contextlib.suppress(OSError):
            Path(tree.directory(home), "cgroup.procs").write_text("0")
    path = os.fsdecode(os.read(reader, 1 << 16))
    if path:
        prune = (sys.executable, "-P", "-m", "kabpf.daemon", "--prune")
        program = str(Path(__file__).with_name("watcher.py"))
        about = (tree.directory(path), str(drop_in(os.path.basename(path))), str(run))
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.closerange(3, 1 << 16)
        os.execve(
            sys.executable,
            [sys.executable, "-I", "-S", program, *about, *prune],
            {},
        )


class Ending(NamedTuple):
    """What a drop-in says of its end."""

    until: Until
    owner: int | None = None  # the user whose policy it is


def prune(tree: CgroupTree) -> dict[str, Ending]:
    """Remove the drop-ins that are over, and empty cgroups made by hand; these policies by name.
    The caller holds the lock, under which such a cgroup is made, entered and named."""
    for cgroup in () if scopes.is_booted() else reversed(tree.cgroups()):
        if NAME.fullmatch(cgroup.name) and not tree.is_populated(cgroup):
            remove(tree, cgroup)
    for unfinished in TRANSIENT.glob(".*"):
        with contextlib.suppress(OSError):
            unfinished.unlink()
    over = {file: ending for file, ending in standing().items() if is_over(ending, tree)}
    for file, (until, _) in over.items():
        fault_point("remove the drop-in")
        file.unlink(missing_ok=True)
        if NAME.fullmatch(os.path.basename(until.path)):
            remove(tree, Cgroup(until.id, 0, until.path))
    return {file.stem: ending for file, ending in over.items()}


def remove_ended(tree: CgroupTree, above: str) -> None:
    """Remove the cgroups right below one that were made by hand and have no process."""
    for name in filter(NAME.fullmatch, os.listdir(tree.directory(above))):
        cgroup = Cgroup(0, 0, f"{above.rstrip('/')}/{name}")
        if not tree.is_populated(cgroup):
            remove(tree, cgroup)


def remove(tree: CgroupTree, cgroup: Cgroup) -> None:
    """Remove a cgroup and those below, unless a process lives there, or this one may not: kabpfd
    only looks at the tree."""
    for one in reversed((cgroup, *tree.below(cgroup))):
        fault_point("remove the cgroup")
        with contextlib.suppress(OSError):
            os.rmdir(tree.directory(one.path))


def standing() -> dict[Path, Ending]:
    """The drop-ins of policies that end with a cgroup. Only what commands have written is looked
    for, which spares the parser; what is wrong is said when the policy is loaded."""
    endings = {}
    for file in (*files.entries(RUNTIME), *files.entries(TRANSIENT)):
        with contextlib.suppress(OSError, ValueError):
            if not files.has_policy_name(file.name):
                continue
            text = root_files.read(file, files.FILE_SIZE_MAX).decode()
            if until := writer.until_of(text):
                endings[file] = Ending(until, writer.owner_of(text))
    return endings


def is_over(ending: Ending, tree: CgroupTree) -> bool:
    """Whether the cgroup is gone, or does not belong to the policy's user any more, or is one of
    `kabpfctl run` and has no process left."""
    cgroup = Cgroup(ending.until.id, 0, ending.until.path)
    if ending.owner:  # and root may ask for anybody
        return not tree.belongs_to(cgroup, ending.owner)
    return not tree.has(cgroup) or (ending.owner is None and not tree.is_populated(cgroup))


def without_former_owners(policies: tuple[Policy, ...], tree: CgroupTree) -> tuple[Policy, ...]:
    """The policies that count: a user's does while the cgroup is that user's."""
    return tuple(
        policy
        for policy in policies
        if not policy.owner
        or policy.until is None
        or tree.belongs_to(Cgroup(policy.until.id, 0, policy.until.path), policy.owner)
    )
