"""What env(1) makes of its words: an environment, and the command that it starts."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# With an argument of their own, without one, and with one that may be left out.
_TAKES = {"-u": "--unset", "-C": "--chdir", "-S": "--split-string", "-a": "--argv0"}
_FLAGS = {"-i": "--ignore-environment", "-0": "--null", "-v": "--debug"}
_MAYBE = ("--block-signal", "--default-signal", "--ignore-signal")
_LONG = (*_TAKES.values(), *_FLAGS.values(), *_MAYBE, "--list-signal-handling")
_SPLITS_MAX = 16  # -S inside of -S

_ASSIGNMENT = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_PIECE = re.compile(r"""\\(.)|\$\{(\w+)\}|(["'])|(\s+)|([^\\$"'\s]+|\$)""", re.DOTALL)
_ESCAPES = {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "_": " "}
_ESCAPES |= {letter: letter for letter in "#$\\\"'"}


@dataclass
class Evaluated:
    """What is left of the environment, what is added, and the command; where the words are wrong,
    env(1) starts nothing and there is none."""

    clears: bool = False
    unsets: list[str] = field(default_factory=list)
    sets: dict[str, str] = field(default_factory=dict)
    directory: str = ""
    command: list[str] = field(default_factory=list)


def evaluate(words: Sequence[str], environment: Mapping[str, str]) -> Evaluated:
    """What the words after `env` say. The environment is for `${NAME}` in -S."""
    found = Evaluated()
    rest = deque(words)
    splits = 0
    while rest and rest[0].startswith("-"):
        word = rest.popleft()
        if word == "--":
            break
        if word == "-":  # as -i; the last option
            found.clears = True
            break
        name, argument = _option(word)
        if name == "-i":
            found.clears = True
        if name in _FLAGS and argument is not None:  # several in one word
            rest.appendleft(f"-{argument}")
        if name in _TAKES:
            if argument is None:
                argument = rest.popleft() if rest else ""
            if name == "-u":
                found.unsets.append(argument)
            elif name == "-C":
                found.directory = argument
            elif name == "-S":
                splits += 1
                parts = split(argument, environment)
                if parts is None or splits > _SPLITS_MAX:
                    return Evaluated()
                rest.extendleft(reversed(parts))
        elif not name:
            return Evaluated()
    while rest and (match := _ASSIGNMENT.fullmatch(rest[0])):
        found.sets[match[1]] = match[2]
        rest.popleft()
    found.command = [*rest]
    return found


def _option(word: str) -> tuple[str, str | None]:
    """The short name of an option, and its argument if the same word has one; no name for what is
    none of env's. Long ones may be shortened."""
    if not word.startswith("--"):
        name, rest = word[:2], word[2:]
        return (name if name in _TAKES or name in _FLAGS else "", rest or None)
    long, equals, argument = word.partition("=")
    names = [each for each in _LONG if each.startswith(long)]
    if len(names) != 1 and long not in names:
        return "", None
    full = long if long in names else names[0]
    short = {value: key for key, value in (_TAKES | _FLAGS).items()}
    return short.get(full, full), argument if equals else None


def split(text: str, environment: Mapping[str, str]) -> list[str] | None:
    """The words of -S; None where env(1) refuses them."""
    found: list[str] = []
    word: str | None = None
    quote = ""
    position = 0
    while position < len(text):
        match = _PIECE.match(text, position)
        if match is None:  # a backslash at the end
            return None
        position = match.end()
        escape, name, mark, blank, plain = match.groups()
        if plain == "$" and quote != "'":  # only ${NAME} is known
            return None
        if quote == "'" and mark != "'" and escape not in ("\\", "'"):
            word = (word or "") + match[0]
        elif escape is not None:
            if escape == "c" and not quote:
                break
            if escape == "_" and not quote:
                found += [] if word is None else [word]
                word = None
            elif escape not in _ESCAPES:
                return None
            else:
                word = (word or "") + _ESCAPES[escape]
        elif name is not None:
            word = (word or "") + environment.get(name, "")
        elif mark is not None and (not quote or mark == quote):
            quote = "" if quote else mark
            word = word or ""
        elif blank is not None and not quote:
            found += [] if word is None else [word]
            word = None
        elif plain is not None and plain.startswith("#") and word is None and not quote:
            break  # a comment
        else:
            word = (word or "") + match[0]
    if quote:
        return None
    return [*found, *([] if word is None else [word])]
