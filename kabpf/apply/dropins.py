"""Drop-ins that commands write: one for each attached cgroup, put in force or taken back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kabpf.apply import reconcile
from kabpf.apply.reconcile import Resolution
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Dataplane
from kabpf.kernel.loading import Loader
from kabpf.plan.state import Cgroup, record
from kabpf.policy import files
from kabpf.policy.model import Policy
from kabpf.policy.parser import RUNTIME

PERSISTENT = Path("/etc/kabpf/policy.d")
# Read last, so that what a person attaches by hand wins over a file that names the same path.
ATTACHED = "zz-attach-"


Read = tuple[str, tuple[Policy, ...]]
"""The stamp of all policy files, and what they said after it was taken."""


def read() -> Read:
    """Read the system's policy files."""
    return files.stamp(files.SYSTEM), files.load(files.SYSTEM)


def attach(
    file: Path,
    content: bytes,
    cgroup: Cgroup,
    tree: CgroupTree,
    tell_changed: Callable[[], None],
    read: Callable[[], Read] = read,
    loaded: Dataplane | None = None,
    loader: Loader | None = None,
) -> tuple[Policy, int | None]:
    """Write a drop-in that names one cgroup, and put it in force, under the lock; the policy, and
    how many open sockets it has changed, or None where the data plane leaves those alone. The data
    plane is loaded where none is given, by `loader` if that is said.

    Raises RefusedError, and leaves what was there, where the cgroup has another policy then.
    """
    with written(file, content):
        stamp, policies = read()
        found = reconcile.preview(policies, tree, None).plan.cgroups.get(cgroup.id)
        if found is None:
            raise RefusedError(f"cgroup {cgroup.path} is gone", hint="expected it to stay")
        winner = found.policy
        if winner is None or winner.source.path != str(file):
            other = winner.source if winner else "a mask"
            raise RefusedError(
                f"{cgroup.path} has its policy from {other}, which is stronger",
                hint="expected no other file to name this path",
            )
        opened = loaded or reconcile.open_or_load(policies, tree, loader)
    try:
        before = _retrofitted(opened, winner)
        put_in_force(policies, tree, opened, stamp, tell_changed)
        changed = _retrofitted(opened, winner) - before
        return winner, changed if opened.reaches_open_sockets else None
    finally:
        if opened is not loaded:
            opened.close()


def put_in_force(
    policies: tuple[Policy, ...],
    tree: CgroupTree,
    loaded: Dataplane,
    stamp: str,
    tell_changed: Callable[[], None],
) -> Resolution:
    """Reconcile, and let a running daemon know, also of what went wrong."""
    try:
        return reconcile.reconcile(policies, tree, loaded, stamp)
    finally:
        tell_changed()


def attached_file(directory: Path, path: str) -> Path:
    """The drop-in of an attached cgroup, named by its path, escaped as systemd-escape(1) does."""
    special = re.compile(rb"[^A-Za-z0-9:_./]")
    plain = special.sub(lambda match: b"\\x%02x" % ord(match[0]), os.fsencode(path[1:])).decode()
    escaped = plain.replace("/", "-")
    if len(escaped) > 200:
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
        escaped = f"{escaped[:180]}-{digest}"
    return directory / f"{ATTACHED}{escaped or '-'}.yaml"


def owned_name(uid: int | str, cgroup_id: int | str) -> str:
    """The name of a user's policy for a cgroup."""
    return f"user-{uid}-{cgroup_id}"


def owned_file(uid: int, cgroup_id: int) -> Path:
    """The drop-in that has it."""
    return RUNTIME / f"{owned_name(uid, cgroup_id)}.yaml"


def owned(cgroup_id: int | str) -> list[Path]:
    """The drop-ins of users for a cgroup: one, unless it had another owner before."""
    return sorted(RUNTIME.glob(f"{owned_name('*', cgroup_id)}.yaml"))


@contextlib.contextmanager
def written(file: Path, content: bytes | None) -> Iterator[None]:
    """Replace a file, or with None remove it; where the block fails, put back what was there."""
    before = file.read_bytes() if file.exists() else None
    try:
        _write(file, content)
    except OSError as error:
        raise RefusedError(f"write {file}", error.errno or 0) from None
    try:
        yield
    except BaseException:
        _write(file, before)
        raise


def _retrofitted(loaded: Dataplane, wanted: Policy) -> int:
    """How many open sockets a policy has changed; 0 for one that is not in the kernel yet."""
    ids = [id for id, found in loaded.records().items() if found == record(wanted)]
    return sum(counters.retrofitted for counters in loaded.counters(ids).values())


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        os.rename(fresh, file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
