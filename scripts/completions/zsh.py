"""Completions for zsh's compinit."""

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
    single_quoted,
)

_ZSH = """\
#compdef {program}
# Completions of {program}, made from its parser.

{helpers}_{program}() {
	local context state state_descr line
	local -A opt_args
{cases}}

_{program} "$@"
"""

_ZSH_HELPERS = {
    UNITS: """\
__{program}_units() {
	local -a units
	units=(${(f)"$({units})"})
	compadd "$@" -a units
}

""",
    POLICIES: """\
__{program}_policies() {
	local -a policies
	policies=(${(f)"$({policies})"})
	compadd "$@" -a policies
}

""",
    CONTAINERS: """\
__{program}_containers() {
	local -a containers
	containers=(${(f)"$({containers})"})
	compadd "$@" -a containers
}

""",
}
_ZSH_FUNCTIONS = {DIRECTORIES: "_directories", FILES: "_files"}  # of zsh itself

_ZSH_CASES = """\
	local -a names # not `commands`, which is zsh's own
	names=(
{commands}	)
	_arguments -C -A '-*' \\
{top}		'1:command:->command' '*::argument:->argument' && return
	case $state in
	command) _describe -t commands command names ;;
	argument)
		case $words[1] in
{cases}		esac
		;;
	esac
"""


def script(parser: argparse.ArgumentParser) -> str:
    """What zsh reads."""
    all_commands = commands(parser)
    top, *below = all_commands
    if below:
        cases = filled(
            _ZSH_CASES,
            parser.prog,
            commands="".join(
                f"\t\t{single_quoted(f'{each.name}:{each.purpose}')}\n" for each in below
            ),
            top=_zsh_specs(parser.prog, top, "\t\t"),
            cases="".join(_zsh_case(parser.prog, each) for each in below),
        )
    else:
        cases = f"\t_arguments \\\n{_zsh_specs(parser.prog, top, '		')}\t\t&& return\n"
    functions = helpers(_ZSH_HELPERS, all_commands)
    return filled(_ZSH, parser.prog, cases=cases, helpers=functions)


def _zsh_case(program: str, command: Command) -> str:
    # After the first word of another command nothing is an option of ours.
    stop = " -S -A '-*'" if command.positional and COMMAND in command.positional.kinds else ""
    specs = _zsh_specs(program, command, "\t\t\t\t")
    return f"\t\t{command.name})\n\t\t\t_arguments{stop} \\\n{specs}\t\t\t\t&& return\n\t\t\t;;\n"


def _zsh_specs(program: str, command: Command, indent: str) -> str:
    specs: list[str] = []
    for option in command.options:
        value = _zsh_value(program, option) if option.takes_value else ""
        for flag in option.flags:
            again = "*" if option.many else ""
            text = f"[{_zsh_brackets(option.purpose)}]"
            specs.append(f"{again}{flag}{'=' if value else ''}{text}{value}")
    positional = command.positional
    if positional and COMMAND in positional.kinds:
        specs += ["(-)1:command: _command_names -e", "(-)*::argument: _normal"]
    elif positional:
        value = _zsh_value(program, positional)
        specs.append(f"*{value}" if positional.many else f"1{value}")
    return "".join(f"{indent}{single_quoted(spec)} \\\n" for spec in specs)


def _zsh_value(program: str, argument: Argument) -> str:
    message = _zsh_colons(argument.metavar)
    functions = [_ZSH_FUNCTIONS.get(kind, f"__{program}_{kind}") for kind in argument.kinds]
    if argument.words:
        return f":{message}:({' '.join(argument.words)})"
    if len(functions) > 1:
        tried = " ".join(
            f"{kind}\\:{kind}\\:{function}"
            for kind, function in zip(argument.kinds, functions, strict=True)
        )
        return f":{message}:_alternative {tried}"
    return f":{message}:{functions[0] if functions else ' '}"


def _zsh_colons(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:")


def _zsh_brackets(text: str) -> str:
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
