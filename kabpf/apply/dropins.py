"""Drop-ins that commands write: one for each attached cgroup, activated or removed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kabpf import root_files
from kabpf.digests import blake2b
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Dataplane
from kabpf.plan.state import Cgroup, record
from kabpf.policy import files
from kabpf.policy.files import ATTACHED, FILE_SIZE_MAX, OF_USER, Snapshot
from kabpf.policy.model import Policy
from kabpf.policy.of_commands import RUNTIME
from kabpf.runtime.pidlock import tell_changed

if TYPE_CHECKING:
    from kabpf.apply.reconcile import Resolution, Resolver

PERSISTENT = Path("/etc/kabpf/policy.d")


def winner(resolver: Resolver, file: Path, cgroup: Cgroup, tree: CgroupTree) -> Policy:
    """The policy of a cgroup, which is that of the drop-in `file`. Raises RefusedError where it has
    another one, or is gone."""
    from kabpf.plan.resolve import resolve_at  # here, because run does without

    if not tree.has(cgroup):
        raise RefusedError(f"cgroup {cgroup.path} was removed while being attached")
    policy = resolve_at(resolver.automaton, cgroup, resolver.containers).policy
    if policy is None or policy.source.path != str(file):
        raise RefusedError(
            f"{cgroup.path} has its policy from {policy.source if policy else 'a mask'},"
            " which is stronger",
            hint="change that one instead",
        )
    return policy


def attach(
    policy: Policy, snapshot: Snapshot, loaded: Dataplane
) -> tuple[int | None, tuple[str, ...]]:
    """Activate a drop-in's policy, with all others, under the lock; how many open sockets it
    has changed, or None where the data plane leaves those alone, and why some are unchanged."""
    before = updated(loaded, policy)
    left = activate(snapshot, loaded).left
    changed = updated(loaded, policy) - before
    return (changed if loaded.updates_open_sockets else None), left


def updated(loaded: Dataplane, policy: Policy) -> int:
    """How many open sockets a policy has changed; 0 for one that is not in the kernel yet."""
    own = record(policy).kept
    ids = [id for id, each in loaded.records().items() if each == own]
    return sum(counters.updated for counters in loaded.counters(ids).values())


def activate(snapshot: Snapshot, loaded: Dataplane) -> Resolution:
    """Reconcile, and let a running daemon know, also of what went wrong."""
    from kabpf.apply import reconcile  # as above

    try:
        return reconcile.reconcile(snapshot, loaded)
    finally:
        tell_changed()


def attached_file(directory: Path, path: str) -> Path:
    """The drop-in of an attached cgroup, named by its path, escaped as systemd-escape(1) does."""
    special = re.compile(rb"[^A-Za-z0-9:_./]")
    plain = special.sub(lambda match: b"\\x%02x" % ord(match[0]), os.fsencode(path[1:])).decode()
    escaped = plain.replace("/", "-")
    if len(escaped) > 200:
        digest = blake2b(os.fsencode(path), digest_size=8).hexdigest()
        escaped = f"{escaped[:180]}-{digest}"
    return directory / f"{ATTACHED}{escaped or '-'}.yaml"


def owned_name(uid: int | str, cgroup_id: int | str) -> str:
    """The name of a user's policy for a cgroup."""
    return f"{OF_USER}{uid}-{cgroup_id}"


def owned_file(uid: int, cgroup_id: int) -> Path:
    """The drop-in of a user's policy for a cgroup."""
    return RUNTIME / f"{owned_name(uid, cgroup_id)}.yaml"


def owned(cgroup_id: int | str) -> list[Path]:
    """The drop-ins of users for a cgroup: one, unless it had another owner before."""
    return sorted(RUNTIME.glob(f"{owned_name('*', cgroup_id)}.yaml"))


@contextlib.contextmanager
def written(file: Path, content: bytes | None) -> Iterator[None]:
    """Replace a file, or with None remove it; where the block fails, put back what was there."""
    try:
        before = root_files.read(file, FILE_SIZE_MAX) if os.path.lexists(file) else None
        _write(file, content)
    except OSError as error:
        raise RefusedError(f"write {file}", error.errno or 0) from None
    try:
        yield
    except BaseException:
        _write(file, before)
        raise


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
        return
    # A user's names a cgroup, perhaps below a directory that is closed to others.
    mode = 0o600 if files.is_of_user(file) else 0o644
    root_files.replace(file, content, mode=mode, sync=True)
