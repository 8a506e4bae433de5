"""kabpfctl: the command line. Nouns read (show), verbs change (change).

Exit status: 0 done, 1 an expected failure (said on standard error), 2 wrong usage, 3 a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from kabpf import __version__, change, explain, options, output, show
from kabpf.errors import KabpfError, PolicyError, RefusedError
from kabpf.loading import Loader


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parsed = parser().parse_args(arguments)
    os.umask(0o022)  # root alone may write policy files, and everybody check them
    try:
        if parsed.needs_root and os.geteuid() != 0:
            raise RefusedError(f"{parsed.command}: not root", hint="expected root")
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except KabpfError as error:
        for line in f"kabpfctl: {error}".expandtabs().splitlines():
            print(output.shown(line), file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at exit
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        import traceback  # here, because it takes 3 ms

        traceback.print_exc()
        print("kabpfctl: this is a bug in kabpf; please report the lines above", file=sys.stderr)
        return 3


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        "kabpfctl",
        description="TCP keepalive by policy, for the sockets of selected cgroups.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kabpfctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    attach = _command(commands, "attach", change.attach, "put a policy in force on one cgroup")
    attach.set_defaults(needs_root=False)
    attach.add_argument("--cgroup", required=True, metavar="PATH", help="the cgroup's directory")
    for key in change.OPTION_KEYS:
        attach.add_argument(_flag(key), type=_option(key), metavar=_METAVARS[key], help=_HELP[key])
    attach.add_argument(
        "--persist", action="store_true", help=f"keep it over a reboot, in {change.PERSISTENT}"
    )
    attach.add_argument(
        "--new-only", action="store_true", help="leave the sockets alone that are open now"
    )
    _add_loader(attach)

    detach = _command(commands, "detach", change.detach, "undo attach; sockets keep their options")
    detach.set_defaults(needs_root=False)
    which = detach.add_mutually_exclusive_group(required=True)
    which.add_argument("--cgroup", metavar="PATH", help="the cgroup's directory")
    which.add_argument(
        "--all", action="store_true", help="undo every attach and take kabpf out of the kernel"
    )

    apply = _command(commands, "apply", change.apply, "put the policy files in force")
    _add_loader(apply)
    check = _command(commands, "check", show.check, "check policy files; needs no root")
    check.set_defaults(needs_root=False)
    _add_loader(check)
    check.add_argument("files", nargs="*", metavar="FILE", help="default: the installed ones")
    _command(commands, "plan", show.plan, "show which cgroup gets what, and what apply would do")
    _command(commands, "status", show.status, "show what is in force, and what it did")

    why = _command(commands, "explain", explain.explain, "say where a cgroup's policy comes from")
    why.set_defaults(needs_root=False)
    why.add_argument("what", metavar="PATH|UNIT|PID", help="a cgroup, a running unit, a process")
    presets = _command(commands, "presets", show.presets, "list middleboxes and what fits them")
    presets.set_defaults(needs_root=False)

    _command(
        commands,
        "import",
        _import,
        "look where libkeepalive and libdontdie are preloaded, print the policies that do the same"
        " and what to remove; changes nothing",
    )

    sockets = _command(
        commands, "sockets", show.sockets, "list TCP sockets, to root with their options"
    )
    sockets.set_defaults(needs_root=False)
    sockets.add_argument("--cgroup", metavar="PATH", help="only of this cgroup and all below it")
    sockets.add_argument("--unit", metavar="NAME", help="only of this unit; * stands for any text")
    sockets.add_argument("--policy", metavar="NAME", help="only of cgroups that have this policy")
    sockets.add_argument(
        "--without-keepalive", action="store_true", help="only where keepalive is off"
    )

    look = _command(
        commands,
        "doctor",
        _doctor,
        "look at everything that kabpf relies on, say what is odd and what to do; changes nothing;"
        " exit status 1 where something is an error",
    )
    look.set_defaults(needs_root=False)
    return parser


_METAVARS = {"idle": "TIME", "interval": "TIME", "probes": "N", "user_timeout": "TIME"}
_HELP = {
    "idle": "silence before the first probe: 60, 90s, 5m, 1h",
    "interval": "time between probes",
    "probes": "unanswered probes before the connection is given up",
    "user_timeout": "limit for unacknowledged data: a time, auto or off",
}


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], purpose: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=purpose, description=purpose, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, needs_root=True)
    return parser


def _add_loader(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loader",
        type=Loader,
        choices=tuple(Loader),
        metavar="|".join(Loader),
        help="default: the one in use; else libbpf, or bcc where the kernel has no BTF",
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from kabpf.doctor import doctor  # here, because the other commands need nothing of it

    return doctor(arguments)


def _import(arguments: argparse.Namespace) -> int:
    from kabpf.legacy import import_  # as above

    return import_(arguments)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _option(key: str) -> Callable[[str], str]:
    """A checker for argparse: the option's own rules, as policy files have them."""

    def checked(text: str) -> str:
        try:
            options.check(key, text)
        except PolicyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return checked


if __name__ == "__main__":
    sys.exit(main())
