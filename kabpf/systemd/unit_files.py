"""systemd's files as they are written: which ones make a unit, and what they say.

The rules are those of systemd.unit(5), systemd.syntax(7) and systemd.exec(5). Nothing is asked of a
systemd that runs. What is parsed may be a stranger's: no parser takes longer than in proportion to
the text.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kabpf.policy.yaml import Source
from kabpf.systemd.units import template_of, unit_names

SERVICE = "service"

_BLANKS = " \t\n\r"  # WHITESPACE of systemd's src/basic/string-util.h; Unicode's are letters

# A word, of pieces with and without quotes.
_WORD = re.compile(
    r"""[ \t\n\r]*+((?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|'[^'\\]*+(?:\\.[^'\\]*+)*+'"""
    r"""|\\.|[^ \t\n\r"'\\]++)++)""",
    re.DOTALL,
)
_PIECE = re.compile(r"""(\\.)|"((?:\\.|[^"\\])*+)"|'((?:\\.|[^'\\])*+)'""", re.DOTALL)
# C's, as far as they are ASCII: no variable that is looked for holds others.
_ESCAPE = re.compile(r"\\(x(?!00)[0-7][0-9A-Fa-f]|(?!000)[01][0-7]{2}|.)", re.DOTALL)
_LETTERS = dict(zip("abfnrtvs", "\a\b\f\n\r\t\v ", strict=True))
# unit_name_is_valid() in systemd's src/basic/unit-name.c, but for hidden files.
_NAME = re.compile(r"(?!\.)[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\-]*)?\.[a-z]+")
_NAME_BYTES_MAX = 255
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_ENDS = re.compile(r"\r\n|\n\r|[\n\r\0]")  # of lines: read_line() in src/basic/fileio.c

# Of environment files: parse_env_file_internal() in src/basic/env-file.c.
_KEY = re.compile(r"[ \t\n\r]*+(?:[#;][^\n\r]*+|([^=\n\r]*+)(=?))")
_VALUE = re.compile(
    r"""[ \t]*+(?:'([^']*+)(?:'|\Z)|"([^"\\]*+(?:\\.[^"\\]*+)*+)(?:"|\\?\Z)"""
    r"""|((?:[^'" \t\n\r\\]|\\.|\\\Z)(?:[^\\\n\r]++|\\.)*+(?:\\\Z)?))""",
    re.DOTALL,
)
_PLAIN_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)
_QUOTED_ESCAPE = re.compile(r'\\(["\\`$\n])')


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


class Units:
    """The units of a type that have files in some directories, of which the first is the
    strongest."""

    def __init__(self, directories: Sequence[Path], type_: str = SERVICE) -> None:
        self._directories = directories
        self._type = type_
        # The names that have a file, with those of their units; "" is masked.
        self.real = {
            name: real
            for name, real in unit_names(directories).items()
            if name.endswith(f".{type_}")
        }
        self._folders = _drop_in_folders(directories)

    def names(self) -> list[str]:
        """Units, templates, instances, and beginnings of names (`foo-.service`), that have a file,
        drop-ins, or a link that starts them; no aliases, and nothing that is masked, hidden, or no
        name of a unit."""
        end = f".{self._type}"
        found = set(self.real.values())
        for directory in self._directories:
            drop_ins = (name.removesuffix(".d") for name in self._folders[directory])
            instances = (path.name for path in directory.glob(f"*.wants/*@?*{end}"))
            found.update(
                self.real.get(name, name)
                for name in (*drop_ins, *instances)
                if name.endswith(end) and name != end
            )
        return sorted(filter(is_name, found))

    def has(self, name: str) -> bool:
        """Whether it is a name of a unit, or masked."""
        return name in self.real

    def files(self, name: str) -> list[Path]:
        """The file of a unit and its drop-ins, in the order in which they are read."""
        names = (name, template_of(name))
        paths = (directory / each for each in names for directory in self._directories)
        aliases = [alias for alias, real in self.real.items() if real == name != alias]
        own = next((path for path in paths if _is_file(path)), None)
        return [*([own] if own else []), *self._drop_ins([name, *aliases])]

    def shared(self) -> list[Path]:
        """The drop-ins of all units of the type together, in the order in which they are read."""
        return self._drop_ins([])

    def _drop_ins(self, names: list[str]) -> list[Path]:
        folders = [
            directory / f"{each}.d"
            for name in names
            for directory in self._directories
            for each in (name, *broader(name))
            if f"{each}.d" in self._folders[directory]
        ]
        folders += [directory / f"{self._type}.d" for directory in self._directories]
        return strongest(folders)


def _is_file(path: Path) -> bool:
    """Whether it is there and no directory; what can't be read is said where it is."""
    return os.path.exists(path) and not os.path.isdir(path)


def is_name(name: str) -> bool:
    """Whether systemd takes it for the name of a unit."""
    return _NAME.fullmatch(name) is not None and len(name) <= _NAME_BYTES_MAX


def _drop_in_folders(directories: Iterable[Path]) -> dict[Path, set[str]]:
    return {
        directory: {path.name for path in directory.glob("?*.d") if os.path.isdir(path)}
        for directory in directories
    }


def broader(name: str) -> list[str]:
    """The names whose drop-ins a unit has as well, the nearest first: its template, and what is
    left of it before its dashes."""
    found: list[str] = []
    stem, _, type_ = name.rpartition(".")
    prefix, at, instance = stem.partition("@")
    nearest = [f"{prefix}@.{type_}"] if instance else []
    if (dash := prefix.rstrip("-").rfind("-")) > 0:
        nearest.append(f"{prefix[: dash + 1]}{at if instance else ''}{instance}.{type_}")
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


def settings(text: str, path: str) -> Iterator[Setting]:
    """What a unit file, a drop-in or a file such as system.conf says."""
    section = ""
    for line, lines in _joined(text, path):
        if line.startswith("["):
            section = line.strip("[] ")
        elif "=" in line:
            key, value = (part.strip(_BLANKS) for part in line.split("=", 1))
            yield Setting(section, key, value, lines)


def effective(found: Iterable[Setting], section: str) -> dict[str, list[Setting]]:
    """The settings of a section by their keys; an empty one forgets those before it."""
    lists: dict[str, list[Setting]] = {}
    for setting in found:
        if setting.section != section:
            continue
        if setting.value:
            lists.setdefault(setting.key, []).append(setting)
        else:
            lists.pop(setting.key, None)
    return lists


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


def environment_file(text: str, path: str, limit: int | None = None) -> list[Assignment]:
    """What an EnvironmentFile= assigns; no more than `limit` assignments of it."""
    found: list[Assignment] = []
    starts = [0, *(match.end() for match in _ENDS.finditer(text))]
    position = 0
    while position < len(text) and (limit is None or len(found) < limit):
        key = _KEY.match(text, position)
        assert key is not None
        position = key.end()
        if not key[2]:  # a comment, a blank line, or a word without a value
            position += position < len(text)
            continue
        begin = key.start(1)
        value = ""
        while piece := _VALUE.match(text, position):
            position = piece.end()
            single, double, plain = piece.groups()
            if plain is not None:
                value += _PLAIN_ESCAPE.sub(lambda escape: escape[1].strip("\n"), _trimmed(plain))
                break
            if double is not None:
                unescaped = _QUOTED_ESCAPE.sub(lambda escape: escape[1].strip("\n"), double)
                value += unescaped
            else:
                value += single
        first = bisect_right(starts, begin)
        last = bisect_right(starts, max(begin, position - 1))
        found += assignments([f"{key[1].strip(_BLANKS)}={value}"], Lines(path, first, last))
    return found


def _trimmed(plain: str) -> str:
    """Without the blanks at the end, but for one that is escaped."""
    bare = plain.rstrip(" \t")
    return plain[: len(bare) + 1] if _is_escaped(bare) else bare


def _is_escaped(text: str) -> bool:
    """Whether a backslash at the end is for what comes next."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def lines_of(text: str) -> list[str]:
    """The lines of a file, as systemd parts them."""
    found = _ENDS.split(text)
    return found[:-1] if found[-1] == "" else found


def _joined(text: str, path: str) -> Iterator[tuple[str, Lines]]:
    """The lines of a file, without comments; those that end in a backslash with the next."""
    first, parts = 0, []
    lines = lines_of(text)
    for number, line in enumerate([*lines, ""], 1):  # as the last one may end in a backslash, too
        stripped = line.lstrip(_BLANKS)
        if stripped.startswith(("#", ";")):
            continue
        first = first or number
        if _is_escaped(stripped):
            parts.append(stripped[:-1])
            continue
        if parts or stripped:
            last = min(number, len(lines))
            yield " ".join([*parts, stripped]), Lines(path, first, last)
        first, parts = 0, []
