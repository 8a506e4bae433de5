"""kabpfctl's verbs: attach, detach and apply change what is in force."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from kabpf import attaching, cgroups, client, files, output, policy, presence, reconcile, transient
from kabpf.cgroups import CgroupTree
from kabpf.errors import RefusedError
from kabpf.language import RUNTIME

PERSISTENT = Path("/etc/kabpf/policy.d")
# Read last, so that what a person attaches by hand wins over a file that names the same path.
ATTACHED = "zz-attach-"

OPTION_KEYS = ("idle", "interval", "probes", "user_timeout")


def attach(arguments: argparse.Namespace) -> int:
    """Put a policy in force on one cgroup: as root by itself, else by kabpf-request."""
    if arguments.persist:
        _require_root("attach --persist")
    tree = cgroups.find_tree(cgroups.own_mounts())
    options = {key: getattr(arguments, key) for key in OPTION_KEYS if getattr(arguments, key)}
    if os.geteuid() == 0:
        result = _attach(arguments, tree, options)
    else:
        path = tree.path(arguments.cgroup)
        result = client.attach(path, options, existing=not arguments.new_only)
    options_text = output.options_text(policy.options_of(result["options"]))
    changed = result["retrofitted"]
    count = "open sockets are left alone"
    if changed is not None:
        count = f"{output.count(changed, 'open socket')} changed"
    text = f"{output.shown(result['cgroup'])}: {options_text}; {count}"
    return output.answer(arguments, result, text)


def _attach(
    arguments: argparse.Namespace, tree: CgroupTree, options: dict[str, str]
) -> dict[str, Any]:
    with reconcile.locked():
        cgroup = tree.find(arguments.cgroup)
        file = _attached_file(PERSISTENT if arguments.persist else RUNTIME, cgroup.path)
        if not arguments.persist and (PERSISTENT / file.name).exists():
            raise RefusedError(
                f"{cgroup.path} is attached by {PERSISTENT / file.name} already",
                hint="expected --persist to change it",
            )
        content = _attached_policy(cgroup.path, options, new_only=arguments.new_only)
        winner, changed = attaching.attach(
            file, content, cgroup, tree, presence.tell_changed, loader=arguments.loader
        )
    return {
        "cgroup": cgroup.path,
        "policy": winner.name,
        "file": str(file),
        "options": policy.options_json(winner.rules.options),
        "retrofitted": changed,
    }


def detach(arguments: argparse.Namespace) -> int:
    """Undo attach: as root by itself, else by kabpf-request."""
    if arguments.all:
        _require_root("detach --all")
    tree = cgroups.find_tree(cgroups.own_mounts())
    if os.geteuid() != 0:
        path = tree.path(arguments.cgroup)
        return output.answer(arguments, client.detach(path), f"{output.shown(path)}: detached")
    path = "/" if arguments.all else tree.path(arguments.cgroup)
    pattern = f"{ATTACHED}*.yaml" if arguments.all else _attached_file(RUNTIME, path).name
    with reconcile.locked():
        removed = [
            file for directory in (RUNTIME, PERSISTENT) for file in sorted(directory.glob(pattern))
        ]
        if not arguments.all:
            with contextlib.suppress(RefusedError):  # gone, as it may be
                removed += attaching.owned(tree.find(path).id)
        if not removed and not arguments.all:
            raise RefusedError(f"{path} is not attached", hint="expected an attached cgroup")
        with contextlib.ExitStack() as stack:
            for file in removed:
                stack.enter_context(attaching.written(file, None))
            stamp = files.stamp(files.SYSTEM)
            policies = () if arguments.all else files.load(files.SYSTEM)
        if arguments.all:
            reconcile.lift(tree)
            presence.tell_changed()
        else:
            with reconcile.open_or_load(policies, tree) as loaded:
                attaching.put_in_force(policies, tree, loaded, stamp, presence.tell_changed)
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
        transient.prune(tree)
        stamp, policies = files.stamp(files.SYSTEM), files.load(files.SYSTEM)
        with reconcile.open_or_load(policies, tree, arguments.loader) as loaded:
            resolution = attaching.put_in_force(
                policies, tree, loaded, stamp, presence.tell_changed
            )
    result = {
        "policies": len(resolution.plan.policies),
        "cgroups": len(resolution.cgroups),
        "covered": len(output.covered(resolution)),
        "changes": output.changes_json(resolution),
    }
    if any(policy.log for policy in policies):
        presence.wait_for_log()
    in_force = output.count(len(policies), "policy", "policies")
    covered = f"{result['covered']} of {output.count(len(resolution.cgroups), 'cgroup')} covered"
    text = f"{in_force} in force, {covered}; changed: {output.changes_text(resolution)}"
    return output.answer(arguments, result, text)


def _require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise RefusedError(f"{what}: not root", hint="expected root")


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
