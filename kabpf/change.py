"""kabpfctl's verbs: attach, detach and apply change what is in force."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kabpf import cgroups, daemon, files, output, plan, policy, reconcile
from kabpf.cgroups import CgroupTree
from kabpf.dataplane import Dataplane
from kabpf.errors import RefusedError
from kabpf.policy import Policy
from kabpf.reconcile import Resolution

RUNTIME = Path("/run/kabpf/policy.d")
PERSISTENT = Path("/etc/kabpf/policy.d")
# Read last, so that what a person attaches by hand wins over a file that names the same path.
ATTACHED = "zz-attach-"

OPTION_KEYS = ("idle", "interval", "probes", "user_timeout")


def attach(arguments: argparse.Namespace) -> int:
    """Put a policy in force on one cgroup."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    options = {key: getattr(arguments, key) for key in OPTION_KEYS if getattr(arguments, key)}
    with reconcile.locked():
        cgroup = tree.find(arguments.cgroup)
        file = _attached_file(PERSISTENT if arguments.persist else RUNTIME, cgroup.path)
        if not arguments.persist and (PERSISTENT / file.name).exists():
            raise RefusedError(
                f"{cgroup.path} is attached by {PERSISTENT / file.name} already",
                hint="expected --persist to change it",
            )
        with _written(file, _attached_policy(cgroup.path, options, new_only=arguments.new_only)):
            stamp, policies = files.stamp(files.SYSTEM), files.load(files.SYSTEM)
            found = reconcile.preview(policies, tree, None).plan.cgroups.get(cgroup.id)
            if found is None:
                raise RefusedError(f"cgroup {cgroup.path} is gone", hint="expected it to stay")
            winner = found.policy
            if winner is None or winner.source.path != str(file):
                other = winner.source if winner else "a mask"
                raise RefusedError(
                    f"{cgroup.path} has its policy from {other}, which is read later",
                    hint="expected no other file to name this path",
                )
            loaded = reconcile.open_or_load(policies, tree, arguments.loader)
        with loaded:
            before = _retrofitted(loaded, winner)
            _reconcile(policies, tree, loaded, stamp)
            changed = _retrofitted(loaded, winner) - before
    result = {
        "cgroup": cgroup.path,
        "policy": winner.name,
        "file": str(file),
        "options": output.options_json(winner.rules.options),
        "retrofitted": changed,
    }
    options_text = output.options_text(winner.rules.options)
    count = output.count(changed, "open socket")
    what = f"{count} changed" if loaded.reaches_open_sockets else "open sockets are left alone"
    text = f"{output.shown(cgroup.path)}: {options_text}; {what}"
    return output.answer(arguments, result, text)


def _retrofitted(loaded: Dataplane, wanted: Policy) -> int:
    """How many open sockets a policy has changed; 0 for one that is not in the kernel yet."""
    ids = [id for id, found in loaded.records().items() if found == plan.record(wanted)]
    return sum(counters.retrofitted for counters in loaded.counters(ids).values())


def detach(arguments: argparse.Namespace) -> int:
    """Undo attach."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    path = "/" if arguments.all else tree.path(arguments.cgroup)
    pattern = f"{ATTACHED}*.yaml" if arguments.all else _attached_file(RUNTIME, path).name
    with reconcile.locked():
        removed = [
            file for directory in (RUNTIME, PERSISTENT) for file in sorted(directory.glob(pattern))
        ]
        if not removed and not arguments.all:
            raise RefusedError(f"{path} is not attached", hint="expected an attached cgroup")
        with contextlib.ExitStack() as stack:
            for file in removed:
                stack.enter_context(_written(file, None))
            stamp = files.stamp(files.SYSTEM)
            policies = () if arguments.all else files.load(files.SYSTEM)
        if arguments.all:
            reconcile.lift(tree)
            daemon.tell_changed()
        else:
            with reconcile.open_or_load(policies, tree) as loaded:
                _reconcile(policies, tree, loaded, stamp)
    text = f"{output.shown(path)}: detached"
    if arguments.all:
        count = len(files.paths(files.SYSTEM))
        stay = f"; {output.count(count, 'policy file')} left for kabpfctl apply" if count else ""
        text = f"kabpf is out of the kernel{stay}"
    return output.answer(arguments, {"removed": [str(file) for file in removed]}, text)


def apply(arguments: argparse.Namespace) -> int:
    """Put the policy files in force."""
    tree = cgroups.find_tree(cgroups.own_mounts())
    with reconcile.locked():
        stamp, policies = files.stamp(files.SYSTEM), files.load(files.SYSTEM)
        with reconcile.open_or_load(policies, tree, arguments.loader) as loaded:
            resolution = _reconcile(policies, tree, loaded, stamp)
    result = {
        "policies": len(resolution.plan.policies),
        "cgroups": len(resolution.cgroups),
        "covered": len(output.covered(resolution)),
        "changes": output.changes_json(resolution),
    }
    in_force = output.count(len(policies), "policy", "policies")
    covered = f"{result['covered']} of {output.count(len(resolution.cgroups), 'cgroup')} covered"
    text = f"{in_force} in force, {covered}; changed: {output.changes_text(resolution)}"
    return output.answer(arguments, result, text)


def _reconcile(
    policies: tuple[Policy, ...], tree: CgroupTree, loaded: Dataplane, stamp: str
) -> Resolution:
    try:
        return reconcile.reconcile(policies, tree, loaded, stamp)
    finally:
        daemon.tell_changed()


@contextlib.contextmanager
def _written(file: Path, content: bytes | None) -> Iterator[None]:
    """Replace a file, or with None remove it; where the block fails, put back what was there."""
    before = file.read_bytes() if file.exists() else None
    try:
        try:
            _write(file, content)
        except OSError as error:
            raise RefusedError(f"write {file}", error.errno or 0) from None
        yield
    except BaseException:
        _write(file, before)
        raise


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
    os.rename(fresh, file)


def _attached_file(directory: Path, path: str) -> Path:
    """The drop-in of an attached cgroup, named by its path, escaped as systemd-escape(1) does."""
    special = re.compile(rb"[^A-Za-z0-9:_./]")
    plain = special.sub(lambda match: b"\\x%02x" % ord(match[0]), os.fsencode(path[1:])).decode()
    escaped = plain.replace("/", "-")
    if len(escaped) > 200:
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
        escaped = f"{escaped[:180]}-{digest}"
    return directory / f"{ATTACHED}{escaped or '-'}.yaml"


def _attached_policy(path: str, options: dict[str, str], *, new_only: bool) -> bytes:
    if policy.GLOB.search(path) or not path.isprintable():
        raise RefusedError(f"cgroup {path!r}", hint="expected a printable path without *, ? and [")
    keepalive = "{" + ", ".join(f"{key}: {text}" for key, text in options.items()) + "}"
    # As it is: YAML knows no escape in two halves, as JSON has for what is beyond 16 bits.
    return (
        "# Written by kabpfctl attach; kabpfctl detach removes it.\n"
        f"select: [{{cgroup: {json.dumps(path, ensure_ascii=False)}}}]\n"
        f"keepalive: {keepalive if options else 'on'}\n" + "existing: false\n" * new_only
    ).encode()
