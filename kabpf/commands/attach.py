"""kabpfctl attach: activates a policy on one cgroup."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from kabpf import live, output
from kabpf.apply import dropins, reconcile, waiting
from kabpf.apply.dropins import PERSISTENT, attached_file
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, mountinfo
from kabpf.kernel.capabilities import require_root
from kabpf.kernel.cgroups import CgroupTree
from kabpf.policy import model, writer
from kabpf.policy.model import ON_COMMAND_LINE, Options, Policy, Rules, Selector
from kabpf.policy.of_commands import RUNTIME
from kabpf.policy.yaml import Source
from kabpf.requests import client
from kabpf.runtime.locks import locked
from kabpf.systemd import names


def attach(arguments: argparse.Namespace) -> int:
    """Activate a policy on one cgroup: as root by itself, else by kabpf-request."""
    if arguments.persist:
        require_root("attach --persist")
    tree = cgroups.find_tree(mountinfo.own_mounts())
    given = {row.key: getattr(arguments, row.key) for row in ON_COMMAND_LINE}
    options = {key: word for key, word in given.items() if word}
    if os.geteuid() == 0:
        result = _attach(arguments, tree, options)
    else:
        path = names.path(tree, arguments.cgroup)
        result = client.attach(path, options, existing=not arguments.new_only)
    options_text = output.options_text(model.options_of(result["options"]))
    changed = result["updated"]
    count = "open sockets unchanged"
    if changed is not None:
        count = f"{output.count(changed, 'open socket')} updated"
    text = f"{output.shown(result['cgroup'])}: {options_text}; {count}"
    return output.answer(arguments, result, text)


def _attach(
    arguments: argparse.Namespace, tree: CgroupTree, options: dict[str, str]
) -> dict[str, Any]:
    with live.working("attaching the policy"), locked():
        cgroup = names.find(tree, arguments.cgroup)
        file = attached_file(PERSISTENT if arguments.persist else RUNTIME, cgroup.path)
        if not arguments.persist and (PERSISTENT / file.name).exists():
            raise RefusedError(
                f"{cgroup.path} is already attached by {PERSISTENT / file.name}",
                hint="change it with --persist",
            )
        standing = waiting.look()
        content = _attached_policy(file, cgroup.path, options, new_only=arguments.new_only)
        with contextlib.ExitStack() as stack:
            if arguments.persist:  # another one, until the next boot, counts no longer
                stack.enter_context(dropins.written(RUNTIME / file.name, None))
            stack.enter_context(dropins.written(file, content))
            snapshot, _, problem = standing.active({file, RUNTIME / file.name})
            winner = dropins.winner(reconcile.resolver(snapshot.policies, tree), file, cgroup, tree)
            loaded = reconcile.open_or_load(snapshot.policies, tree, arguments.loader)
        with loaded:
            changed, left = dropins.attach(winner, snapshot, loaded)
    output.warn((*left, *waiting.left_out(problem)))
    return {
        "cgroup": cgroup.path,
        "policy": winner.name,
        "file": str(file),
        "options": model.options_json(winner.rules.options),
        "updated": changed,
    }


def _attached_policy(file: Path, path: str, options: dict[str, str], *, new_only: bool) -> bytes:
    if model.GLOB.search(path) or not path.isprintable():
        raise RefusedError(f"cgroup {path!r}", hint="expected a printable path without *, ? and [")
    source = Source(str(file), 1)
    select = (Selector("cgroup", path, source),)
    policy = Policy(file.stem, select, Rules(Options()), source, existing=not new_only)
    comment = "Written by kabpfctl attach; kabpfctl detach removes it."
    return writer.text(policy, comment, options).encode()
