"""kabpfd's command line: the daemon, or what an option says in its place."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kabpf import __version__, output, streams
from kabpf.apply import reconcile, retrofit
from kabpf.daemon import prune
from kabpf.daemon.daemon import UNLOADED, Daemon
from kabpf.errors import BpfError, KabpfError, RefusedError, UnsupportedError
from kabpf.kernel import bcc, cgroups, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import PINS
from kabpf.runtime.locks import RUN, locked
from kabpf.runtime.pidlock import Alone, tell_changed
from kabpf.systemd.notify import notify

log = logging.getLogger("kabpfd")

# The exit status where the machine lacks something: kabpf.service is not started again then.
LACKING = 78  # EX_CONFIG of sysexits.h

NEW_MAX = 100_000  # values between two looks for some that refer to each other alone


def main() -> int:
    """Run the daemon, or the program that an option selects. Exit status 0, or 1 or LACKING with
    the reason on standard error, and in what systemd shows of a service."""
    streams.prepare()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger().handlers[0].setFormatter(_Lines("%(name)s: %(message)s"))
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return 1
    except KabpfError as error:
        lines = [*str(error).split("\n"), *_explained(error)]
        log.error("%s", "\n".join(lines))
        notify("STATUS=" + output.shown("; ".join(map(str.strip, lines))))
        return LACKING if isinstance(error, UnsupportedError) else 1
    return 0


def _explained(error: KabpfError) -> list[str]:
    """What doctor knows of a refusal of bpf(2), as far as the daemon's few rights let it look."""
    if not isinstance(error, BpfError):
        return []
    from kabpf.doctor import refusals  # here, because it takes all of doctor

    return refusals.explained(error)


class _Lines(logging.Formatter):
    """Lines of printable characters: strangers choose names that stand in them."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).expandtabs().split("\n")
        return "\n".join(map(output.shown, lines))


def _run() -> None:
    run = parser().parse_args().run
    if os.geteuid() != 0:
        raise RefusedError("must be run as root")
    run()


def parser() -> argparse.ArgumentParser:
    """The options of kabpfd. `run` is the program that they select."""
    parser = argparse.ArgumentParser("kabpfd", description="Keeps kabpf's policies active.")
    parser.add_argument("--version", action="version", version=f"kabpfd {__version__}")
    parser.set_defaults(run=_daemon)
    instead = parser.add_mutually_exclusive_group()
    for option, (run, help) in _PROGRAMS.items():
        instead.add_argument(option, dest="run", action="store_const", const=run, help=help)
    return parser


def _daemon() -> None:
    # A reload makes a hundred thousand values, and nothing that refers to itself: to look for that
    # after every 700 of them takes a fifth of the time.
    gc.set_threshold(NEW_MAX)
    # Signals first: a command that finds the daemon by its lock may send one.
    with Daemon(_tree()) as daemon, Alone(RUN) as lock:
        daemon.run(lock)


def _compile() -> None:
    with locked():
        bcc.require_compiler()
        bcc.compiled()


def _install_units() -> None:
    from kabpf.systemd import install  # here, because it takes 3 ms

    os.umask(0o022)  # for everybody to read
    for path in install.units(Path("/"), Path(sys.argv[0]).resolve().parent):
        print(f"wrote {path}")
    print("next: systemctl enable --now kabpf; for users' policies also kabpf-request.socket")


def _unload() -> None:
    tree = _tree()
    with locked():
        was_active = PINS.exists()
        reconcile.unload(tree)
        tell_changed()
    if was_active:
        log.info("%s", UNLOADED)


def _prune() -> None:
    prune.prune(_tree())


def _retrofit() -> None:
    retrofit.serve(sys.stdin.fileno(), _tree().mount)


def _request() -> None:
    from kabpf.requests import server  # here, because kabpfd itself needs nothing of it

    server.serve(sys.stdin.fileno(), log.info)


def _tree() -> CgroupTree:
    return cgroups.find_tree(mountinfo.own_mounts())


class _Program(NamedTuple):
    """What an option has kabpfd be in place of the daemon."""

    run: Callable[[], None]
    help: str


_PROGRAMS = {
    "--compile": _Program(
        _compile, "compile the programs for a kernel without BTF, if they are not yet, and exit"
    ),
    "--install-units": _Program(
        _install_units, "after pip install, write systemd's units for this kabpfd, and exit"
    ),
    "--unload": _Program(_unload, "unload every policy, and exit"),
    "--prune": _Program(
        _prune, "remove the policies of kabpfctl run whose cgroups have no process left, and exit"
    ),
    "--retrofit": _Program(
        _retrofit, "update open sockets for the kabpfd at the socket on standard input, and exit"
    ),
    "--request": _Program(
        _request, "serve one user request on the socket passed as standard input, and exit"
    ),
}
