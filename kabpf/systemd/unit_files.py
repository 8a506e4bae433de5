"""systemd's files as they are written: which ones make a service, and what they say.

The rules are those of systemd.unit(5), systemd.syntax(7) and systemd.exec(5). Nothing is asked of a
systemd that runs. Files that can't be read are taken for empty.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kabpf.policy.yaml import Source
from kabpf.systemd.units import unit_names

SERVICE = ".service"
SIZE_MAX = 1 << 20

# A word, of pieces with and without quotes.
_WORD = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\\.|[^\s"'\\])+)""")
_PIECE = re.compile(r"""(\\.)|"((?:\\.|[^"\\])*)"|'((?:\\.|[^'\\])*)'""")
# C's, as far as they are ASCII: no variable that is looked for holds others.
_ESCAPE = re.compile(r"\\(x(?!00)[0-7][0-9A-Fa-f]|(?!000)[01][0-7]{2}|.)")
_LETTERS = dict(zip("abfnrtvs", "\a\b\f\n\r\t\v ", strict=True))
# unit_name_is_valid() in systemd's src/basic/unit-name.c, but for hidden files.
_NAME = re.compile(r"(?!\.)[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\-]*)?\.service")
_CONTINUED = re.compile(r"(?<!\\)(\\\\)*\\$")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Lines:
    """Something that a file says on a line, or on several that are one by their ends."""

    path: str
    first: int
    last: int

    @property
    def numbers(self) -> range:
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return str(Source(self.path, self.first))


@dataclass(frozen=True)
class Setting:
    """A section's key and value."""

    section: str
    key: str
    value: str
    lines: Lines


@dataclass(frozen=True)
class Assignment:
    """A variable of an environment and where it is given; without a name a line of values."""

    name: str
    value: str
    lines: Lines

    def __str__(self) -> str:
        return f"{self.name}={self.value}" if self.name else self.value


class Services:
    """The services that have files in some directories, of which the first is the strongest."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._real = unit_names(directories)

    def names(self) -> list[str]:
        """Services, templates, instances, and beginnings of names (`foo-.service`), that have a
        file, drop-ins, or a link that starts them; no aliases, and nothing that is masked, hidden,
        or no name of a unit."""
        found = {real for name, real in self._real.items() if name.endswith(SERVICE)}
        for directory in self._directories:
            drop_ins = (path.name.removesuffix(".d") for path in directory.glob(f"?*{SERVICE}.d"))
            instances = (path.name for path in directory.glob(f"*.wants/*@?*{SERVICE}"))
            found.update(self._real.get(name, name) for name in (*drop_ins, *instances))
        return sorted(filter(_NAME.fullmatch, found))

    def files(self, name: str) -> list[Path]:
        """The file of a service and its drop-ins, in the order in which they are read."""
        template = re.sub(r"@.*(\.\w+)$", r"@\1", name)
        paths = (directory / each for each in (name, template) for directory in self._directories)
        aliases = [alias for alias, real in self._real.items() if real == name != alias]
        own = next((path for path in paths if path.is_file()), None)
        return [*([own] if own else []), *self._drop_ins([name, *aliases])]

    def shared(self) -> list[Path]:
        """The drop-ins of all services together, in the order in which they are read."""
        return self._drop_ins([])

    def _drop_ins(self, names: list[str]) -> list[Path]:
        folders = [
            directory / f"{each}.d"
            for name in names
            for directory in self._directories
            for each in (name, *broader(name))
        ]
        folders += [directory / "service.d" for directory in self._directories]
        return strongest(folders)


def broader(name: str) -> list[str]:
    """The names whose drop-ins a service has as well, the nearest first: its template, and what is
    left of it before its dashes."""
    found: list[str] = []
    prefix, at, instance = name.removesuffix(SERVICE).partition("@")
    nearest = [f"{prefix}@{SERVICE}"] if instance else []
    if (dash := prefix.rstrip("-").rfind("-")) > 0:
        nearest.append(f"{prefix[: dash + 1]}{at if instance else ''}{instance}{SERVICE}")
    for each in nearest:
        found += [each, *broader(each)]
    return list(dict.fromkeys(found))


def strongest(folders: Iterable[Path]) -> list[Path]:
    """The *.conf files of folders in the order of their names; of those of one name that of the
    first folder."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob("*.conf"):
            found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def settings(path: Path) -> Iterator[Setting]:
    """What a unit file, a drop-in or a file such as system.conf says."""
    section = ""
    for text, lines in _joined(path, " "):
        if text.startswith("["):
            section = text.strip("[] ")
        elif "=" in text:
            key, value = (part.strip() for part in text.split("=", 1))
            yield Setting(section, key, value, lines)


def words(value: str) -> list[str]:
    """The words of a value, without their quotes; those before what is wrong."""
    found = []
    position = 0
    while match := _WORD.match(value, position):
        bare = _PIECE.sub(lambda piece: piece[1] or piece[2] or piece[3] or "", match[1])
        found.append(_ESCAPE.sub(lambda escape: _character(escape[1]), bare))
        position = match.end()
    return found


def _character(escape: str) -> str:
    if len(escape) == 1:
        return _LETTERS.get(escape, escape)
    return chr(int(escape[1:], 16) if escape[0] == "x" else int(escape, 8))


def assignments(words: Iterable[str], lines: Lines) -> list[Assignment]:
    """Those of the words that are assignments."""
    matches = map(_ASSIGNMENT.fullmatch, words)
    return [Assignment(match[1], match[2], lines) for match in matches if match]


def environment_file(path: Path) -> list[Assignment]:
    """What an EnvironmentFile= assigns."""
    found = []
    for text, lines in _joined(path, ""):
        if "=" not in text:
            continue
        name, value = (part.strip() for part in text.split("=", 1))
        try:
            quoted = value[:1] in ("'", '"')
            bare = "".join(shlex.split(value)) if quoted else re.sub(r"\\(.)", r"\1", value)
        except ValueError:  # a quotation that goes over lines, which none of these variables has
            continue
        found += assignments([f"{name}={bare}"], lines)
    return found


def _joined(path: Path, glue: str) -> Iterator[tuple[str, Lines]]:
    """The lines of a file, without comments; those that end in a backslash with the next."""
    first, text = 0, ""
    lines = text_of(path).splitlines()
    for number, line in enumerate([*lines, ""], 1):  # as the last one may end in a backslash, too
        stripped = line if text and not glue else line.lstrip()
        if stripped.startswith(("#", ";")):
            continue
        first = first or number
        if _CONTINUED.search(stripped):
            text += stripped[:-1] + glue
            continue
        if text or stripped:
            yield text + stripped, Lines(str(path), first, min(number, len(lines)))
        first, text = 0, ""


def text_of(path: Path) -> str:
    """What a file holds, or nothing where it can't be read."""
    try:
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            return file.read(SIZE_MAX).decode(errors="replace").replace("\0", "")
    except OSError:
        return ""
