"""What a command substitution prints, where that is a path which files and known values decide:
scripts find their own directory so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from kabpf.migration.files import Files, absolute
from kabpf.migration.shell_words import Part, Token

_SEPARATORS = ("&&", ";", "\n")
_EXPANDED = re.compile(r"[\\*?\[~]")  # by one shell or another


def printed(
    found: Sequence[Token], value: Callable[[Sequence[Part]], str], directory: str, files: Files
) -> str | None:
    """What the commands print; None where one of them is not known here, or they are linked in
    another way than one after the other. `value` is what a word expands to, `directory` where the
    commands are run."""
    lines: list[str] = []
    words: list[str] = []
    for token in (*found, Token(";", (), 0, 0)):
        if not token.operator:
            words.append(value(token.parts))
            continue
        if token.operator not in _SEPARATORS or any("\0" in word for word in words):
            return None  # a NUL stands for what is not known
        if words and words[0] == "cd":
            operands = _operands(words)
            if len(operands) != 1:
                return None
            directory = os.path.normpath(absolute(operands[0], directory))
        elif words:
            line = _line(words, directory, files)
            if line is None:
                return None
            lines.append(line)
        words = []
    return "\n".join(lines).rstrip("\n")


def _line(words: Sequence[str], directory: str, files: Files) -> str | None:
    name, operands = words[0].rpartition("/")[2], _operands(words)
    if name == "pwd" and not operands:
        is_physical = "-P" in words
        return files.resolved(directory) if is_physical else directory
    if name == "echo":
        text = " ".join(words[1:])
        return None if words[1:2] == ["-e"] or _EXPANDED.search(text) else text
    if not operands:
        return None
    first = operands[0]
    if name == "dirname":
        return os.path.dirname(first.rstrip("/") or "/") or "."
    if name == "basename":
        suffix = operands[1] if len(operands) > 1 else ""
        return os.path.basename(first.rstrip("/") or "/").removesuffix(suffix)
    is_resolving = name == "realpath" or (
        name == "readlink" and any(word in ("-f", "-e", "-m") for word in words)
    )
    if not is_resolving:
        return None
    return files.resolved(os.path.normpath(absolute(first, directory)))


def _operands(words: Sequence[str]) -> list[str]:
    return [word for word in words[1:] if not (len(word) > 1 and word.startswith("-"))]
