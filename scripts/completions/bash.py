"""Completions for bash, with bash-completion or without."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

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

_BASH = """\
# Completions of {program}, made from its parser. Debian's bash-completion loads them by name.

__{program}_match() { # a line is a candidate; of the caller: current
	local word
	while read -r word; do
		[[ $word != "$current"* ]] || COMPREPLY+=("$word")
	done
}

__{program}_words() { __{program}_match < <(printf '%s\\n' "$@"); }

{helpers}_{program}() {
	local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command= at
	COMPREPLY=()
	# Readline makes three words of --option=value.
	if [ "$current" = = ]; then
		current=
	elif [ "$before" = = ]; then
		before=${COMP_WORDS[COMP_CWORD - 2]}
	fi
	for ((at = 1; at < COMP_CWORD; at++)); do
		case ${COMP_WORDS[at]} in
		-*) ;;
		*)
			command=${COMP_WORDS[at]}
			break
			;;
		esac
	done
	case $command in
{cases}	esac
}

complete -F _{program} {program}
"""

_BASH_PATHS = """\
__{program}_{kind}() {
	compopt -o filenames 2>/dev/null
	mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen {action} -- "$current")
}

"""

_BASH_HELPERS = {
    DIRECTORIES: _BASH_PATHS.replace("{kind}", DIRECTORIES).replace("{action}", "-d"),
    FILES: _BASH_PATHS.replace("{kind}", FILES).replace("{action}", "-f"),
    UNITS: """\
__{program}_units() {
	compopt -o filenames 2>/dev/null # which quotes what has a backslash
	__{program}_match < <({units})
}

""",
    POLICIES: """\
__{program}_policies() { __{program}_match < <({policies}); }

""",
    CONTAINERS: """\
__{program}_containers() { __{program}_match < <({containers}); }

""",
    COMMAND: """\
__{program}_command() { # the index of its first word
	if declare -F _comp_command_offset >/dev/null; then # bash-completion since 2.12
		_comp_command_offset "$1"
	elif declare -F _command_offset >/dev/null; then
		_command_offset "$1"
	elif (($1 == COMP_CWORD)); then
		mapfile -t COMPREPLY < <(compgen -c -- "$current")
	else
		mapfile -t COMPREPLY < <(compgen -f -- "$current")
	fi
}

""",
}

# The words of another command begin after options with their values.
_BASH_COMMAND = """\
		for ((at++; at < COMP_CWORD; at++)); do
			case ${COMP_WORDS[at]} in
			--)
				((at++))
				break
				;;
			{valued})
				if [ "${COMP_WORDS[at + 1]}" = = ]; then ((at += 2)); else ((at++)); fi
				;;
			-*) ;;
			*) break ;;
			esac
		done
		if ((at < COMP_CWORD)) || { ((at == COMP_CWORD)) && [[ $current != -* ]]; }; then
			__{program}_command "$at"
			return
		fi
"""


def script(parser: argparse.ArgumentParser) -> str:
    """What bash reads."""
    all_commands = commands(parser)
    cases = "".join(_bash_case(parser.prog, each, all_commands[1:]) for each in all_commands)
    functions = helpers(_BASH_HELPERS, all_commands)
    return filled(_BASH, parser.prog, cases=cases, helpers=functions)


def _bash_case(program: str, command: Command, below: list[Command]) -> str:
    lines = [f"\t{command.name or single_quoted('')})\n"]
    if command.positional and COMMAND in command.positional.kinds:
        valued = [flag for each in command.options if each.takes_value for flag in each.flags]
        lines.append(filled(_BASH_COMMAND, program, valued=" | ".join(valued)))
    flags_by_calls: dict[tuple[str, ...], list[str]] = {}
    for option in command.options:
        if option.takes_value:
            calls = tuple(_bash_calls(program, option))
            flags_by_calls.setdefault(calls, []).extend(option.flags)
    if flags_by_calls:
        lines.append("\t\tcase $before in\n")
        for calls, valued in flags_by_calls.items():
            lines.append(f"\t\t{' | '.join(valued)})\n")
            lines += (f"\t\t\t{call}\n" for call in (*calls, "return"))
            lines.append("\t\t\t;;\n")
        lines.append("\t\tesac\n")
    flags = f"__{program}_words {' '.join(command.flags)}"
    others: list[str] = []
    if command.positional:
        others = list(_bash_calls(program, command.positional))
    elif not command.name and below:
        others = [f"__{program}_words {' '.join(each.name for each in below)}"]
    if others:
        lines.append(f"\t\tcase $current in\n\t\t-*) {flags} ;;\n\t\t*)\n")
        lines += (f"\t\t\t{call}\n" for call in others)
        lines.append("\t\t\t;;\n\t\tesac\n")
    else:
        lines.append(f"\t\t{flags}\n")
    return "".join([*lines, "\t\t;;\n"])


def _bash_calls(program: str, argument: Argument) -> Iterator[str]:
    for kind in argument.kinds:
        if kind != COMMAND:
            yield f"__{program}_{kind}"
    if argument.words:
        yield f"__{program}_words {' '.join(argument.words)}"
