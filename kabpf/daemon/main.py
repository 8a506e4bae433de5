"""kabpfd's command line: the daemon, or what an option says in its place."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from kabpf import __version__
from kabpf.apply import reconcile, retrofit, transient
from kabpf.daemon.daemon import Daemon
from kabpf.errors import KabpfError, RefusedError
from kabpf.kernel import bcc, cgroups, dataplane, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Dataplane
from kabpf.policy import files
from kabpf.runtime.locks import RUN, locked
from kabpf.runtime.pidlock import alone, tell_changed

log = logging.getLogger("kabpfd")


def main() -> int:
    """Be the daemon, or do what the option says. Exit status 0, or 1 with the reason on standard
    error."""
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if os.geteuid() != 0:
            raise RefusedError("not root", hint="expected root")
        if arguments.compile:
            with locked():
                bcc.require_compiler()
                bcc.compiled()
            return 0
        if arguments.retrofit:
            retrofit.serve(sys.stdin.fileno())
            return 0
        if arguments.request:
            from kabpf.requests import server  # here, because kabpfd itself needs nothing of it

            server.serve(sys.stdin.fileno(), log.info)
            return 0
        if arguments.install_units:
            from kabpf.systemd import install  # here, because it takes 3 ms

            os.umask(0o022)  # for everybody to read
            for path in install.units(Path("/"), Path(sys.argv[0]).resolve().parent):
                print(f"wrote {path}")
            print("next: systemctl enable --now kabpf")
            return 0
        tree = cgroups.find_tree(mountinfo.own_mounts())
        if arguments.prune:
            _prune(tree)
            return 0
        if arguments.lift:
            with locked():
                reconcile.lift(tree)
                tell_changed()
            return 0
        # Signals first: who finds the daemon by its lock may send one.
        with Daemon(tree) as daemon, alone(RUN):
            daemon.run()
    except KabpfError as error:
        log.error("%s", error)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of kabpfd."""
    parser = argparse.ArgumentParser("kabpfd", description="Keeps kabpf's policies in force.")
    parser.add_argument("--version", action="version", version=f"kabpfd {__version__}")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compile",
        action="store_true",
        help="compile the programs for a kernel without BTF, if they are not yet, and exit",
    )
    instead.add_argument(
        "--install-units",
        action="store_true",
        help="after pip install, write systemd's units for this kabpfd, and exit",
    )
    instead.add_argument("--lift", action="store_true", help="lift every policy, and exit")
    instead.add_argument(
        "--prune",
        action="store_true",
        help="remove the policies of kabpfctl run whose cgroups have no process left, and exit",
    )
    instead.add_argument(
        "--retrofit",
        action="store_true",
        help="do what a kabpfd asks for at the socket on standard input, and exit",
    )
    instead.add_argument(
        "--request",
        action="store_true",
        help="do what a user asks for at the socket on standard input, and exit",
    )
    return parser


def _prune(tree: CgroupTree) -> None:
    with locked():
        before = files.stamp(files.SYSTEM)
        names = transient.prune(tree)
        if not names or not dataplane.PINS.exists():
            return
        try:
            with Dataplane(dataplane.PINS, tree, any_build=True) as loaded:
                if reconcile.forget(names, loaded, (before, files.stamp(files.SYSTEM))):
                    return
            snapshot = files.snapshot(files.SYSTEM)
            with reconcile.open_or_load(snapshot.policies, tree) as loaded:
                reconcile.reconcile(snapshot, loaded)
        finally:
            tell_changed()
