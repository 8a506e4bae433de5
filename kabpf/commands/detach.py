"""kabpfctl detach: undoes attach, and with --all everything."""

from __future__ import annotations

import argparse
import contextlib
import os

from kabpf import live, output
from kabpf.apply import dropins, reconcile, waiting
from kabpf.apply.dropins import PERSISTENT, attached_file
from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, mountinfo
from kabpf.kernel.capabilities import require_root
from kabpf.policy import files
from kabpf.policy.files import ATTACHED
from kabpf.policy.of_commands import RUNTIME
from kabpf.requests import client
from kabpf.runtime import last_good, pidlock
from kabpf.runtime.locks import locked
from kabpf.systemd import names


def detach(arguments: argparse.Namespace) -> int:
    """Undo attach: as root by itself, else by kabpf-request."""
    if arguments.all:
        require_root("detach --all")
    tree = cgroups.find_tree(mountinfo.own_mounts())
    if os.geteuid() != 0:
        path = names.path(tree, arguments.cgroup)
        return output.answer(arguments, client.detach(path), f"{output.shown(path)}: detached")
    path = "/" if arguments.all else names.path(tree, arguments.cgroup)
    pattern = f"{ATTACHED}*.yaml" if arguments.all else attached_file(RUNTIME, path).name
    notes: tuple[str, ...] = ()
    with live.working("detaching"), locked():
        standing = None if arguments.all else waiting.look()
        removed = [
            file for directory in (RUNTIME, PERSISTENT) for file in sorted(directory.glob(pattern))
        ]
        if not arguments.all:
            with contextlib.suppress(RefusedError):  # gone, as it may be
                removed += dropins.owned(tree.find(path).id)
        if not removed and not arguments.all:
            raise RefusedError(f"{path} is not attached")
        with contextlib.ExitStack() as stack:
            for file in removed:
                stack.enter_context(dropins.written(file, None))
            active = standing.active(removed) if standing else None
        if active:
            with reconcile.open_or_load(active.snapshot.policies, tree) as loaded:
                left = dropins.activate(active.snapshot, loaded).left
            notes = (*left, *waiting.left_out(active.problem))
        else:
            reconcile.unload(tree)
            last_good.forget(removed)
            pidlock.tell_changed()
    output.warn(notes)
    text = f"{output.shown(path)}: detached"
    if arguments.all:
        count = len(files.paths(files.SYSTEM))
        stay = f"; {output.count(count, 'policy file')} kept for kabpfctl apply" if count else ""
        text = f"kabpf is unloaded{stay}"
    return output.answer(arguments, {"removed": [str(file) for file in removed]}, text)
