"""kabpfctl: the command line. Each command is a file in commands/.

Exit status: 0 done, 1 an expected failure (said on standard error), 2 wrong usage, 3 a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from kabpf import __version__, streams
from kabpf.errors import LIMITS, BpfError, KabpfError, LimitError, PolicyError
from kabpf.kernel.capabilities import require_root
from kabpf.policy.model import ON_COMMAND_LINE

_CGROUP = "the cgroup: its directory, its path, or a running unit"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    streams.prepare()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except KabpfError as error:
        from kabpf import output  # here, because run does without

        for line in f"kabpfctl: {error}".expandtabs().split("\n"):
            print(output.shown(line), file=sys.stderr)
        if isinstance(error, BpfError):
            from kabpf.doctor import refusals  # here, because it takes all of doctor

            for line in refusals.explained(error):
                print(output.shown(line), file=sys.stderr)
        return error.status
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LIMITS:
            print(f"kabpfctl: {LimitError('open a file', error.errno)}", file=sys.stderr)
            return 1
        import traceback  # here, because it takes 3 ms

        traceback.print_exc()
        print("kabpfctl: this is a bug in kabpf; please report the lines above", file=sys.stderr)
        return 3


def _run(arguments: list[str]) -> int:
    parsed = parser(*arguments[:1]).parse_args(arguments)
    # Root alone may write policy files, and everybody check them.
    parsed.umask = os.umask(0o022)
    if parsed.needs_root:
        require_root(parsed.command)
    status: int = parsed.run(parsed)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Show arguments, which may be the names of strangers' files, as a terminal can take."""
        from kabpf import output  # here, because run does without

        super().error(output.shown(message))


class _CommandLine(argparse.HelpFormatter):
    """As wide as the terminal, but for the margin. Left to itself it imports shutil to ask, as each
    argument is added, which takes 2 ms."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        if not columns.isdecimal() or not int(columns):
            try:
                columns = str(os.get_terminal_size(1).columns)
            except OSError:
                columns = "80"
        super().__init__(prog, width=int(columns) - 2)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.REMAINDER:  # of which argparse shows dots
            return "[--] COMMAND [ARGUMENT...]"
        return super()._format_args(action, default_metavar)


def parser(command: str = "") -> argparse.ArgumentParser:
    """Every command with its options; or one alone, if `command` is its name: to build all of them
    takes 5 ms."""
    parser = _Parser(
        "kabpfctl",
        description="TCP keepalive by policy, for the sockets of selected cgroups.",
        allow_abbrev=False,
        formatter_class=_CommandLine,
    )
    parser.add_argument("--version", action="version", version=f"kabpfctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in _COMMANDS.items():
        if command == name or command not in _COMMANDS:
            add(commands)
    return parser


def _add_attach(commands: Any) -> None:
    attach = _command(commands, "attach", "apply a policy to one cgroup")
    attach.set_defaults(needs_root=False)
    attach.add_argument("--cgroup", type=_line, required=True, metavar="PATH", help=_CGROUP)
    _add_options(attach)
    attach.add_argument(
        "--persist", action="store_true", help="keep it over a reboot, in /etc/kabpf/policy.d"
    )
    attach.add_argument(
        "--new-only", action="store_true", help="do not update the sockets that are open now"
    )
    _add_loader(attach)


def _add_detach(commands: Any) -> None:
    detach = _command(commands, "detach", "undo attach; sockets keep their options")
    detach.set_defaults(needs_root=False)
    scope = detach.add_mutually_exclusive_group(required=True)
    scope.add_argument("--cgroup", type=_line, metavar="PATH", help=_CGROUP)
    scope.add_argument("--all", action="store_true", help="undo every attach and unload kabpf")


def _add_apply(commands: Any) -> None:
    _add_loader(_command(commands, "apply", "apply the policy files"))


def _add_edit(commands: Any) -> None:
    edit = _command(
        commands, "edit", "edit a policy file, and apply it when it is right", json=False
    )
    edit.set_defaults(json=False, loader=None)
    edit.add_argument("name", type=_line, metavar="NAME", help="a unit, a policy or a file")


def _add_check(commands: Any) -> None:
    check = _command(commands, "check", "check policy files; needs no root")
    check.set_defaults(needs_root=False)
    _add_loader(check)
    check.add_argument(
        "files", nargs="*", type=_given, metavar="FILE", help="default: the installed ones"
    )


def _add_plan(commands: Any) -> None:
    _add_wide(_command(commands, "plan", "show which cgroup gets what, and what apply would do"))


def _add_status(commands: Any) -> None:
    status = _command(commands, "status", "show what is active, and what it did")
    _add_wide(status)
    _add_watch(status)
    status.add_argument("policy", nargs="?", type=_line, metavar="POLICY", help="all of one policy")


def _add_verify(commands: Any) -> None:
    _command(
        commands,
        "verify",
        "exit status 0 where everything that the policy files say is active, else 1 and why",
    )


def _add_metrics(commands: Any) -> None:
    metrics = _command(
        commands, "metrics", "print counters and states, as Prometheus reads them", json=False
    )
    metrics.add_argument(
        "--sockets", action="store_true", help="with numbers of open sockets, which takes longer"
    )
    instead = metrics.add_mutually_exclusive_group()
    instead.add_argument(
        "--textfile",
        type=_given,
        metavar="FILE",
        help="replace this file, for node_exporter's textfile collector",
    )
    instead.add_argument(
        "--http",
        action="store_true",
        help="answer one HTTP request on the socket passed as standard input",
    )


def _add_explain(commands: Any) -> None:
    explain = _command(commands, "explain", "say where a cgroup's policy comes from")
    explain.set_defaults(needs_root=False)
    explain.add_argument(
        "what",
        type=_line,
        metavar="PATH|UNIT|CONTAINER|PID",
        help="a cgroup, a running unit, a container or pod, a process",
    )


def _add_presets(commands: Any) -> None:
    presets = _command(commands, "presets", "list middleboxes and what fits them")
    presets.set_defaults(needs_root=False)
    _add_wide(presets)


def _add_import(commands: Any) -> None:
    _command(
        commands,
        "import",
        "look where libkeepalive and libdontdie are preloaded, print the policies that do the same"
        " and what to remove; changes nothing",
    )


def _add_sockets(commands: Any) -> None:
    sockets = _command(commands, "sockets", "list TCP sockets (options are shown to root only)")
    sockets.set_defaults(needs_root=False)
    _add_wide(sockets)
    _add_watch(sockets)
    _add_filter(sockets)
    sockets.add_argument(
        "--without-keepalive", action="store_true", help="only where keepalive is off"
    )


def _add_audit(commands: Any) -> None:
    audit = _command(
        commands,
        "audit",
        "show which connections a middlebox would forget; exit status 1 where there are any",
    )
    audit.add_argument(
        "--timeout",
        action="append",
        type=_seconds(1, _IDLE_TIMEOUT),
        metavar="TIME",
        help="its idle timeout; may be given more than once (default: the shortest of the presets)",
    )
    audit.add_argument(
        "--preset",
        action="append",
        type=_option("preset"),
        metavar="NAME",
        help="a middlebox, as kabpfctl presets lists them; may be given more than once",
    )
    audit.add_argument(
        "--unit", type=_line, metavar="NAME", help="only this unit, and its connections at risk"
    )
    audit.add_argument(
        "--watch",
        type=_seconds(1, "a time (60, 90s, 5m, 1h)"),
        metavar="TIME",
        help="look again and again for so long, and show the most of all looks",
    )
    audit.add_argument(
        "--with",
        dest="with_file",
        type=_given,
        metavar="FILE",
        help="also with this policy file, as if it were installed and applied",
    )


def _add_suggest(commands: Any) -> None:
    suggest = _command(
        commands, "suggest", "print policy files for the connections that audit finds at risk"
    )
    middlebox = suggest.add_mutually_exclusive_group()
    middlebox.add_argument(
        "--timeout",
        type=_seconds(12, _IDLE_TIMEOUT),
        metavar="TIME",
        help="the middlebox's idle timeout (default: the shortest of the presets)",
    )
    middlebox.add_argument(
        "--preset",
        type=_option("preset"),
        metavar="NAME",
        help="a middlebox, as kabpfctl presets lists them",
    )
    suggest.add_argument("--unit", type=_line, metavar="NAME", help="only for this unit")
    suggest.add_argument(
        "--write", action="store_true", help="write them to /etc/kabpf/policy.d, over no other file"
    )


def _add_monitor(commands: Any) -> None:
    monitor = _command(
        commands, "monitor", "print what happens to sockets, a line each, as it happens"
    )
    _add_wide(monitor)
    _add_filter(monitor)
    monitor.add_argument(
        "--event",
        action="append",
        type=_event,
        metavar="EVENT",
        help="only of this kind; may be given more than once",
    )


def _add_doctor(commands: Any) -> None:
    doctor = _command(
        commands,
        "doctor",
        "check everything that kabpf relies on, and say how to fix it; changes nothing;"
        " exit status 1 where something is an error",
    )
    doctor.set_defaults(needs_root=False)


def _add_run(commands: Any) -> None:
    run = _command(commands, "run", "run one command under a policy of its own", json=False)
    run.set_defaults(needs_root=False, refuse=run.error)
    _add_options(run)
    instead = run.add_mutually_exclusive_group()
    instead.add_argument(
        "--preset",
        type=_option("preset"),
        metavar="NAME",
        help="options that fit a middlebox, as kabpfctl presets lists them",
    )
    instead.add_argument(
        "--policy", type=_line, metavar="NAME", help="use this policy from the policy files"
    )
    instead.add_argument("--off", action="store_true", help="no keepalive by any policy")
    run.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="with its arguments"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    for row in ON_COMMAND_LINE:
        flag = "--" + row.key.replace("_", "-")
        parser.add_argument(flag, type=_option(row.key), metavar=row.metavar, help=row.help)


def _command(
    commands: Any, name: str, purpose: str, *, json: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=purpose,
        allow_abbrev=False,
        formatter_class=_CommandLine,
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_late(name), needs_root=True)
    return parser


def _add_wide(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wide", action="store_true", help="every column, wider than the terminal where needed"
    )


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch", action="store_true", help="a live view with rates, until q or Ctrl-C"
    )
    parser.set_defaults(refuse=parser.error)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    """Which sockets are asked for, by where they are."""
    parser.add_argument(
        "--cgroup", type=_line, metavar="PATH", help="only of this cgroup and all below it"
    )
    parser.add_argument(
        "--unit", type=_line, metavar="NAME", help="only of this unit; * stands for any text"
    )
    parser.add_argument(
        "--container",
        type=_line,
        metavar="NAME",
        help="only of this container or pod, by name or the beginning of its id; * stands for any"
        " text",
    )
    parser.add_argument(
        "--policy", type=_line, metavar="NAME", help="only of cgroups that have this policy"
    )


def _add_loader(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loader",
        choices=("libbpf", "bcc"),
        metavar="libbpf|bcc",
        help="default: the one in use; else libbpf, or bcc where the kernel has no BTF",
    )


def _late(command: str) -> Callable[[argparse.Namespace], int]:
    """A command's function, in the module of its name, which is imported when it is called: to
    import all of them takes longer than most commands."""
    name = f"{command}_" if command == "import" else command  # a keyword of Python's

    def call(arguments: argparse.Namespace) -> int:
        return int(getattr(import_module(f"kabpf.commands.{name}"), name)(arguments))

    return call


def _given(text: str) -> str:
    """A name or a path, and not what is left where a variable of a script is empty."""
    if not text:
        raise argparse.ArgumentTypeError("nothing, expected a name")
    return text


def _line(text: str) -> str:
    """The name of a cgroup, a unit or a policy, as an error shows it on one line."""
    if "\n" in _given(text):
        raise argparse.ArgumentTypeError(f"{text!r} has a newline, expected a name")
    return text


def _event(text: str) -> str:
    from kabpf.observe.events import KINDS  # here, because the other commands need nothing of it

    kind = text.replace("-", "_")  # as options have hyphens
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(KINDS)}")
    return kind


def _option(key: str) -> Callable[[str], str]:
    """A checker for argparse: the option's own rules, as policy files have them."""

    def checked(text: str) -> str:
        from kabpf.policy import options  # here, because the other commands need nothing of it

        try:
            options.check(key, text)
        except PolicyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return checked


_IDLE_TIMEOUT = "the idle timeout of a middlebox in seconds (350, 350s, 4m, 1h)"


def _seconds(low: int, expected: str) -> Callable[[str], int]:
    """A checker for argparse: a time of at least so many seconds, at most five days."""

    def checked(text: str) -> int:
        from kabpf.policy import options  # as above
        from kabpf.policy.model import Range

        try:
            return options.seconds(text, Range(low, options.TIMEOUT_S.high), expected)
        except PolicyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


_COMMANDS = {  # in the order of the help
    "attach": _add_attach,
    "detach": _add_detach,
    "run": _add_run,
    "apply": _add_apply,
    "edit": _add_edit,
    "check": _add_check,
    "plan": _add_plan,
    "status": _add_status,
    "verify": _add_verify,
    "metrics": _add_metrics,
    "explain": _add_explain,
    "presets": _add_presets,
    "import": _add_import,
    "sockets": _add_sockets,
    "audit": _add_audit,
    "suggest": _add_suggest,
    "monitor": _add_monitor,
    "doctor": _add_doctor,
}


if __name__ == "__main__":
    sys.exit(main())
