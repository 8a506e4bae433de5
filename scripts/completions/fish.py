"""Completions for fish."""

from __future__ import annotations

import argparse

from completions.arguments import (
    COMMAND,
    CONTAINERS,
    DIRECTORIES,
    FILES,
    POLICIES,
    UNITS,
    Argument,
    Command,
    commands,
    filled,
    helpers,
)

_FISH = """\
# Completions of {program}, made from its parser.

# Whether this is the command on the line; without an argument, whether there is none.
function __{program}_is
    set -l words (commandline -opc)
    for word in $words[2..]
        if not string match -q -- '-*' $word
            test "$word" = "$argv[1]"
            return
        end
    end
    test -z "$argv[1]"
end

{helpers}{another}complete -c {program} -f
"""

_FISH_HELPERS = {
    UNITS: """\
function __{program}_units
    {units}
end

""",
    POLICIES: """\
function __{program}_policies
    {policies}
end

""",
    CONTAINERS: """\
function __{program}_containers
    {containers}
end

""",
}
_FISH_FUNCTIONS = {DIRECTORIES: "__fish_complete_directories"}  # of fish itself

_FISH_COMMAND = """\
# The words of the command that {name} starts, as far as they are on the line.
function __{program}_{name}_words
    set -l words (commandline -opc) (commandline -ct)
    set -e words[1]
    argparse -s {specs} -- $words[2..] 2>/dev/null
    or return 1
    test -n "$argv[1]"; and not string match -q -- '-*' $argv[1]
    and string join0 -- $argv
end

function __{program}_{name}_complete
    set -l words (__{program}_{name}_words | string split0)
    __fish_complete_subcommand --commandline $words
end

"""


def script(parser: argparse.ArgumentParser) -> str:
    """What fish reads."""
    program = parser.prog
    all_commands = commands(parser)
    another, lines = "", []
    for command in all_commands:
        condition = f"__{program}_is {command.name}".rstrip()
        positional = command.positional
        if positional and COMMAND in positional.kinds:
            another = filled(_FISH_COMMAND, program, name=command.name, specs=_fish_specs(command))
            words = f"__{program}_{command.name}_words"
            completed = f"-x -a '(__{program}_{command.name}_complete)'"
            lines.append(f"complete -c {program} -n '{condition}' {completed}")
            condition += f"; and not {words} >/dev/null"
        elif positional:
            lines.append(_fish_line(program, condition, positional))
        lines += (_fish_line(program, condition, option) for option in command.options)
        if command.name:
            described = f"-a {command.name} -d {_fish_quoted(command.purpose)}"
            lines.append(f"complete -c {program} -n '__{program}_is' {described}")
    functions = helpers(_FISH_HELPERS, all_commands)
    return filled(_FISH, program, helpers=functions, another=another) + "\n".join([*lines, ""])


def _fish_line(program: str, condition: str, argument: Argument) -> str:
    said = [
        f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in argument.flags
    ]
    functions = [_FISH_FUNCTIONS.get(kind, f"__{program}_{kind}") for kind in argument.kinds]
    candidates = [f"({function})" for function in functions]
    if FILES in argument.kinds:
        said.append("-r -F" if argument.flags else "-F")
    elif argument.takes_value:
        said.append("-x")
        if candidates or argument.words:
            said.append(f"-a {_fish_quoted(' '.join([*candidates, *argument.words]))}")
    if argument.flags:
        said.append(f"-d {_fish_quoted(argument.purpose)}")
    return f"complete -c {program} -n '{condition}' {' '.join(said)}"


def _fish_specs(command: Command) -> str:
    """What argparse of fish has to know."""
    specs = []
    for option in command.options:
        names = sorted((flag.lstrip("-") for flag in option.flags), key=len)
        specs.append("/".join(names) + ("=" if option.takes_value else ""))
    return " ".join(specs)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
