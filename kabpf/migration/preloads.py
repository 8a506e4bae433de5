"""Where libkeepalive and libdontdie are preloaded: by systemd's files, for sessions, everywhere. It
reads files and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from kabpf.systemd.unit_files import (
    Assignment,
    Lines,
    Services,
    Setting,
    assignments,
    broader,
    environment_file,
    settings,
    strongest,
    text_of,
    words,
)
from kabpf.systemd.units import DIRECTORIES

LIBRARY = re.compile(r"lib(?:keepalive(?:_listen|_socket)?|dontdie)(?=\.so\b)")
PRELOAD = "LD_PRELOAD"
LOADER = "etc/ld.so.preload"

# Where a shell or another program may preload something, which is not evaluated.
_SCRIPTS = (
    "etc/default/*", "etc/init.d/*", "etc/profile", "etc/profile.d/*", "etc/bash.bashrc",
    "etc/rc.local", "etc/security/pam_env.conf", "etc/crontab", "etc/cron.*/*",
    "var/spool/cron/crontabs/*",
)  # fmt: skip
_SPECIFIER = re.compile(r"%(.)")
_OF_NAMES = re.compile(r"([^@]*)(?:@(.*))?\.\w+")
_EXEC_PREFIXES = "@-:+!|"  # systemd.service(5)
_ENV_TAKES = ("-u", "-C", "--unset", "--chdir")  # options of env(1) with a word of their own


@dataclass(frozen=True)
class Place:
    """Processes that have one environment, by what selects them."""

    kind: str  # of selector: unit, user_unit or cgroup
    name: str


EVERYTHING = Place("cgroup", "/")
SESSIONS = Place("unit", "user.slice")


@dataclass
class Environment:
    """What the processes of a place have, and what was read for it."""

    loaded: tuple[Assignment, ...] = ()  # the lines of ld.so.preload, which have no name
    values: dict[str, Assignment] = field(default_factory=dict)
    seen: list[Assignment] = field(default_factory=list)  # also what does not count in the end
    files: list[Path] = field(default_factory=list)

    @property
    def libraries(self) -> list[str]:
        """Which of the two are preloaded, without `.so`."""
        preloads = [*self.loaded, *filter(None, [self.values.get(PRELOAD)])]
        return [name for each in preloads for name in LIBRARY.findall(each.value)]

    def add(self, found: Iterable[Assignment]) -> None:
        for one in found:
            self.values[one.name] = one
            self.seen.append(one)

    def copy(self) -> Environment:
        return Environment(self.loaded, dict(self.values), [*self.seen], [*self.files])


def find(root: Path) -> Iterator[tuple[Place, Place | None, Environment]]:
    """Every place that files below `root` speak of, the broader ones first; with each the place
    whose environment it has where they say nothing more."""
    loaded = tuple(_loader_lines(root / LOADER))
    everything = Environment(loaded, seen=list(loaded))
    yield EVERYTHING, None, everything
    sessions = everything.copy()
    for path in (root / "etc/environment", *strongest([root / "etc/environment.d"])):
        sessions.files.append(path)
        sessions.add(environment_file(path))
    yield SESSIONS, EVERYTHING, sessions
    yield from _services(root, "unit", "system", EVERYTHING, everything)
    yield from _services(root, "user_unit", "user", SESSIONS, sessions)


def unclear(root: Path, environments: Iterable[Environment]) -> list[tuple[Lines, str]]:
    """Lines that name one of the libraries and were not understood."""
    understood: set[tuple[str, int]] = set()
    paths: dict[Path, None] = {}
    for environment in environments:
        paths.update(dict.fromkeys(environment.files))
        for one in environment.seen:
            understood.update((one.lines.path, line) for line in one.lines.numbers)
    for pattern in _SCRIPTS:
        paths.update(dict.fromkeys(sorted(root.glob(pattern))))
    return [
        (Lines(str(path), number, number), found[0])
        for path in paths
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if (found := LIBRARY.search(line)) and not line.lstrip().startswith(("#", ";"))
        if (str(path), number) not in understood
    ]


def _services(
    root: Path, kind: str, manager: str, outer: Place, around: Environment
) -> Iterator[tuple[Place, Place, Environment]]:
    services = Services([root / directory[1:] for directory in DIRECTORIES[kind]])
    base = around.copy()
    given: dict[str, Assignment] = {}
    parts = ("etc", "run", "usr/local/lib", "usr/lib")
    folders = [root / part / f"systemd/{manager}.conf.d" for part in parts]
    for path in (root / f"etc/systemd/{manager}.conf", *strongest(folders)):
        base.files.append(path)
        for setting in settings(path):
            if (setting.section, setting.key) == ("Manager", "DefaultEnvironment"):
                found = assignments(words(setting.value), setting.lines)
                base.seen += found
                # An empty one forgets what came before.
                given = given | {one.name: one for one in found} if setting.value else {}
    base.values |= given
    shared = Place(kind, "*.service")
    yield shared, outer, _environment(root, services.shared(), "", base)
    names = services.names()
    for name in sorted(names, key=lambda name: (len(broader(name)), name)):
        parent = next((each for each in broader(name) if each in names), shared.name)
        environment = _environment(root, services.files(name), name, base)
        yield Place(kind, name), Place(kind, parent), environment


def _loader_lines(path: Path) -> Iterator[Assignment]:
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if text := line.partition("#")[0].strip():
            yield Assignment("", text, Lines(str(path), number, number))


def _environment(root: Path, paths: list[Path], unit: str, base: Environment) -> Environment:
    """What a service has by its files, in systemd's order: Environment=, then EnvironmentFile=,
    less what is unset; and what env(1) adds."""
    found = base.copy()
    found.files += paths
    lists: dict[str, list[Setting]] = {}
    for setting in (each for path in paths for each in settings(path)):
        if setting.section != "Service":
            continue
        if setting.key == "Environment":
            found.seen += _given(setting, unit)
        if setting.value:
            lists.setdefault(setting.key, []).append(setting)
        else:
            lists.pop(setting.key, None)  # what came before is forgotten
    for setting in lists.get("Environment", []):
        found.values |= {one.name: one for one in _given(setting, unit)}
    for setting in lists.get("EnvironmentFile", []):
        for path in _matching(root, _expanded(setting.value.removeprefix("-"), unit)):
            found.files.append(path)
            found.add(environment_file(path))
    unset = lists.get("UnsetEnvironment", [])
    gone = {_expanded(word, unit) for each in unset for word in words(each.value)}
    found.values = {name: one for name, one in found.values.items() if not gone & {name, str(one)}}
    for setting in lists.get("ExecStart", []):
        command = [_expanded(word, unit) for word in words(setting.value.lstrip(_EXEC_PREFIXES))]
        found.add(assignments(_taken_by_env(command), setting.lines))
        found.files += [path for word in command[:1] for path in _script(root, word)]
    return found


def _given(setting: Setting, unit: str) -> list[Assignment]:
    return assignments([_expanded(word, unit) for word in words(setting.value)], setting.lines)


def _expanded(text: str, unit: str) -> str:
    """With the specifiers that hang on the unit's name (systemd.unit(5)); others stay."""
    match = _OF_NAMES.fullmatch(unit)
    known = {"%": "%"}
    if match:
        known |= {"n": unit, "N": unit.rpartition(".")[0], "p": match[1]}
        known |= {"i": match[2]} if match[2] else {}
    return _SPECIFIER.sub(lambda found: known.get(found[1], found[0]), text)


def _matching(root: Path, pattern: str) -> list[Path]:
    """The files of an EnvironmentFile=; none where its name is not known."""
    if not pattern.startswith("/") or _SPECIFIER.search(pattern):
        return []
    return [root / name for name in sorted(glob(pattern[1:], root_dir=root))]


def _taken_by_env(command: list[str]) -> Iterator[str]:
    """What env(1) takes for assignments, if that is the command."""
    if not command or Path(command[0]).name != "env":
        return
    rest = iter(command[1:])
    for word in rest:
        if word in _ENV_TAKES:
            next(rest, None)
        elif "=" in word and not word.startswith("-"):
            yield word
        elif not word.startswith("-"):
            return


def _script(root: Path, program: str) -> list[Path]:
    """The program, if it is one to read."""
    path = root / program.lstrip("/")
    try:
        with open(path, "rb") as file:
            return [path] if file.read(2) == b"#!" else []
    except OSError:
        return []
