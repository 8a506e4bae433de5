"""What an argparse parser knows, for completions of bash, zsh and fish.

shtab, which does this for bash and zsh, knows no values but files and directories, and that of
Debian 12 completes the commands of a parser wrongly in bash.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from kabpf.observe.events import KINDS
from kabpf.policy.model import ON_COMMAND_LINE
from kabpf.policy.presets import presets

# What a value may be; where it is one of some words, the parser or WORDS has them.
DIRECTORIES, FILES, UNITS, POLICIES = "directories", "files", "units", "policies"
CONTAINERS = "containers"  # that have sockets
COMMAND = "command"  # of another program, with its arguments

# By argparse's names of options and arguments.
KINDS_OF_VALUES: dict[str, tuple[str, ...]] = {
    "cgroup": (DIRECTORIES,),
    "container": (CONTAINERS,),
    "files": (FILES,),
    "with_file": (FILES,),
    "name": (POLICIES, UNITS),
    "policy": (POLICIES,),
    "unit": (UNITS,),
    "what": (UNITS, CONTAINERS, DIRECTORIES),
    "words": (COMMAND,),
}
WORDS: dict[str, tuple[str, ...]] = {
    "event": KINDS,
    "preset": tuple(presets()),
    **{row.key: row.words for row in ON_COMMAND_LINE if row.words},
}

# What prints candidates, a line each; the same in every shell. `command` as an alias may ask for a
# password.
UNITS_COMMAND = (
    "command systemctl list-units --all --full --plain --no-legend --no-pager --state=loaded"
    " --type=service,socket,scope,slice,mount,swap 2>/dev/null | cut -d ' ' -f 1"
)
# Of JSON with a string a line.
POLICIES_COMMAND = (
    "command kabpfctl check --json 2>/dev/null"
    r""" | sed -n '/"policies": \[$/,/\]/s/^ *"\([^"\\]*\)",*$/\1/p'"""
)
# Names of containers and of their pods, without those that a shell would take apart: an engine may
# have any. Root alone is told.
CONTAINERS_COMMAND = (
    "command kabpfctl sockets --json 2>/dev/null | sed -n"
    r""" '/"container": {$/,/}/s/^ *"name": "\([A-Za-z0-9_.][A-Za-z0-9_.-]*\)",*$/\1/p' | sort -u"""
)


@dataclass(frozen=True)
class Argument:
    """An option, or a positional argument."""

    flags: tuple[str, ...]
    purpose: str
    takes_value: bool
    metavar: str
    kinds: tuple[str, ...]
    words: tuple[str, ...]
    many: bool  # positional, any number; or an option, again and again


@dataclass(frozen=True)
class Command:
    """A command of the program; the name of the program's own options is empty."""

    name: str
    purpose: str
    options: tuple[Argument, ...]
    positional: Argument | None

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(flag for option in self.options for flag in option.flags)


def commands(parser: argparse.ArgumentParser) -> list[Command]:
    """What a parser knows; the first is the program without a command."""
    found = [_command("", "", parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for purpose in action._choices_actions:
                name, help = purpose.dest, purpose.help or ""
                found.append(_command(name, help, action.choices[name]))
    return found


def _command(name: str, purpose: str, parser: argparse.ArgumentParser) -> Command:
    arguments = [
        _argument(action)
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction)
    ]
    options = tuple(each for each in arguments if each.flags)
    positional = next((each for each in arguments if not each.flags), None)
    return Command(name, purpose, options, positional)


def _argument(action: argparse.Action) -> Argument:
    return Argument(
        flags=tuple(action.option_strings),
        purpose=(action.help or "").replace("%%", "%"),
        takes_value=action.nargs != 0,
        metavar=str(action.metavar or action.dest),
        kinds=KINDS_OF_VALUES.get(action.dest, ()) if action.nargs != 0 else (),
        words=tuple(action.choices or WORDS.get(action.dest, ())) if action.nargs != 0 else (),
        many=isinstance(action, argparse._AppendAction) or action.nargs == "*",
    )


def helpers(by_kind: dict[str, str], all_commands: list[Command]) -> str:
    """The functions of a script that some argument needs."""
    arguments = [
        argument
        for each in all_commands
        for argument in (*each.options, each.positional)
        if argument
    ]
    needed = {kind for argument in arguments for kind in argument.kinds}
    return "".join(text for kind, text in by_kind.items() if kind in needed)


def single_quoted(text: str) -> str:
    """For bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def filled(template: str, program: str, **parts: str) -> str:
    """Not str.format(): shells have braces of their own."""
    # Parts have those parts themselves that come last.
    parts |= {
        "units": UNITS_COMMAND,
        "policies": POLICIES_COMMAND,
        "containers": CONTAINERS_COMMAND,
        "program": program,
    }
    for name, part in parts.items():
        template = template.replace(f"{{{name}}}", part)
    return template
