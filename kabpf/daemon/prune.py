"""kabpfd --prune: takes back what `kabpfctl run` has left, where no daemon does it."""

from __future__ import annotations

from kabpf.apply import single, transient
from kabpf.kernel import dataplane
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Dataplane
from kabpf.policy import files
from kabpf.runtime.locks import locked
from kabpf.runtime.pidlock import running, tell_changed


def prune(tree: CgroupTree) -> None:
    """Remove the policies that are over from the files and from the kernel, and tell a daemon."""
    with locked():
        before = files.stamp(files.SYSTEM)
        names = transient.prune(tree)
        if not names or not dataplane.PINS.exists():
            return
        try:
            with Dataplane(dataplane.PINS, tree, any_build=True) as loaded:
                if single.forget(names, loaded, (before, files.stamp(files.SYSTEM))):
                    return
            if running():
                return
            from kabpf.apply import reconcile, waiting  # here, because most commands leave little

            snapshot = waiting.look().active().snapshot
            with reconcile.open_or_load(snapshot.policies, tree) as loaded:
                reconcile.reconcile(snapshot, loaded)
        finally:
            tell_changed()
