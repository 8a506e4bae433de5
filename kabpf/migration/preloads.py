"""What systemd starts, by its files, and with which environment; what PAM gives to sessions; and
what the dynamic loader preloads everywhere. It reads files and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kabpf.migration import containers
from kabpf.migration.commands import Commands, Elsewhere, Started, session_of
from kabpf.migration.files import Files
from kabpf.migration.libraries import NAME
from kabpf.migration.pam import ENVIRONMENT, Pam
from kabpf.migration.scripts import Command
from kabpf.systemd import unit_files
from kabpf.systemd.unit_files import Assignment, Lines, Setting, Units, broader, strongest, words
from kabpf.systemd.units import DIRECTORIES

LOADER = "/etc/ld.so.preload"
SECTIONS = {"service": "Service", "socket": "Socket", "mount": "Mount", "swap": "Swap"}
MAIN = "ExecStart"
COMMANDS = (
    MAIN, "ExecCondition", "ExecStartPre", "ExecStartPost", "ExecReload", "ExecStop", "ExecStopPre",
    "ExecStopPost",
)  # fmt: skip
SEEN_MAX = 100  # assignments of one file that are named
COMMAND_MAX = 1 << 16  # characters
ASSIGNMENTS_MAX = 5000  # of one file
GENERATORS = ("run/systemd/generator", "run/systemd/generator.early", "run/systemd/generator.late")
INIT_SCRIPTS = ("/etc/init.d", "/etc/rc.d/init.d")

_SPECIFIER = re.compile(r"%(.)")
_OF_NAMES = re.compile(r"([^@]*)(?:@(.*))?\.\w+")
_EXEC_PREFIX = re.compile(r"[-@:+!|]*")  # systemd.service(5)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_MANAGERS = {"unit": "system", "user_unit": "user"}
_SYSTEMS = ("etc", "run", "usr/local/lib", "usr/lib")


@dataclass(frozen=True)
class Place:
    """Processes that have one environment, by what selects them."""

    kind: str  # of selector: unit, user_unit or cgroup
    name: str


EVERYTHING = Place("cgroup", "/")
SESSIONS = Place("unit", "user.slice")


@dataclass
class Given:
    """What the processes of a place have."""

    main: list[Started] = field(default_factory=list)
    others: list[tuple[str, Started]] = field(default_factory=list)  # with the key of each
    seen: list[Assignment] = field(default_factory=list)  # also what does not count in the end


@dataclass
class Base:
    """An environment that processes begin with."""

    values: dict[str, Assignment] = field(default_factory=dict)
    seen: list[Assignment] = field(default_factory=list)

    def add(self, found: _Assignments) -> None:
        self.values |= found.values
        self.seen += found.seen

    def copy(self) -> Base:
        return Base(dict(self.values), [*self.seen])


@dataclass
class _Assignments:
    """What a file assigns: what counts in the end, and where those that are looked for stand."""

    values: dict[str, Assignment]
    seen: list[Assignment]


class Search:
    """Looks through the files below a root."""

    def __init__(self, files: Files, watched: frozenset[str]) -> None:
        self.files = files
        self.watched = watched
        self.pam = Pam(files)
        self.commands = Commands(files, self.pam, watched)
        self.understood: set[tuple[str, int]] = set()
        self.paths: dict[Path, None] = {}  # of files whose lines are to be understood
        self.programs: dict[str, str] = {}  # units by the names of their programs
        self.units = 0
        self.notes: list[str] = []
        self.loaded: tuple[Assignment, ...] = ()
        self._assigned: dict[Path, _Assignments] = {}
        self._settings: dict[Path, list[Setting]] = {}

    def find(self) -> Iterator[tuple[Place, Place | None, Given]]:
        """Every place that files speak of, the broader ones first; with each the place whose
        environment it has where they say nothing more."""
        path = self.files.inside(LOADER)
        self.loaded = tuple(self._loader_lines(path))
        self._understand(self.loaded)
        yield EVERYTHING, None, Given([Started("", {}, Lines(str(path), 1, 1))], [], [*self.loaded])
        sessions = Base()
        folders = [self.files.root / each / "environment.d" for each in _SYSTEMS]
        for path in (self.files.inside(ENVIRONMENT), *strongest(folders)):
            self.paths[path] = None
            sessions.add(self.assigned(path))
        self._understand(sessions.seen)
        yield SESSIONS, EVERYTHING, self._plain(sessions)
        by_pam = self._by_pam(sessions)
        self.commands.by_pam = self.assigned(self.files.inside(ENVIRONMENT)).values
        quadlets = dict(containers.quadlets(self.files))
        for kind, outer, around in (
            ("unit", EVERYTHING, Base()),
            ("user_unit", SESSIONS, sessions),
        ):
            base = self._manager(kind, around)
            inside = {name: one for (where, name), one in quadlets.items() if where == kind}
            yield from self._units(kind, outer, base, inside, by_pam if kind == "unit" else {})

    def assigned(self, path: Path) -> _Assignments:
        """What an environment file assigns."""
        if path not in self._assigned:
            text = self.files.text(path)
            if str(path).endswith(ENVIRONMENT):
                text = re.sub(r"(?m)^[ \t]*export[ \t]+", "", text)  # as pam_env(8) takes it
            found = unit_files.environment_file(text, str(path), ASSIGNMENTS_MAX + 1)
            if len(found) > ASSIGNMENTS_MAX:
                self.files.refuse(path, f"more than {ASSIGNMENTS_MAX} assignments")
                found = []
            seen = [one for one in found if one.name in self.watched]
            self.understood.update((str(path), n) for one in seen for n in one.lines.numbers)
            self._assigned[path] = _Assignments({one.name: one for one in found}, seen[-SEEN_MAX:])
        return self._assigned[path]

    def _plain(self, base: Base, lines: Lines | None = None) -> Given:
        where = lines or next((one.lines for one in base.seen), Lines(ENVIRONMENT, 1, 1))
        return Given([Started("", base.values, where)], [], base.seen)

    def _understand(self, found: Iterable[Assignment]) -> None:
        self.understood.update((one.lines.path, n) for one in found for n in one.lines.numbers)

    def _loader_lines(self, path: Path) -> Iterator[Assignment]:
        for number, line in enumerate(self.files.text(path).split("\n"), 1):
            if text := line.partition("#")[0].strip():
                yield Assignment("", text, Lines(str(path), number, number))

    def _by_pam(self, sessions: Base) -> dict[str, Base]:
        """What sessions have, for the programs whose sessions stay in their units."""
        if not sessions.seen:
            return {}
        only = Base(dict(self.assigned(self.files.inside(ENVIRONMENT)).values))
        only.seen = [*self.assigned(self.files.inside(ENVIRONMENT)).seen]
        return {
            service: only
            for service in self.pam.services()
            if self.pam.reads_environment(service) and not self.pam.moves(service)
        }

    def _manager(self, kind: str, around: Base) -> Base:
        """What a manager gives to all that it starts."""
        base = around.copy()
        manager = _MANAGERS[kind]
        given: dict[str, Assignment] = {}
        folders = [self.files.root / each / f"systemd/{manager}.conf.d" for each in _SYSTEMS]
        for path in (self.files.root / f"etc/systemd/{manager}.conf", *strongest(folders)):
            self.paths[path] = None
            for setting in self.settings(path):
                if setting.section != "Manager" or setting.key not in (
                    "DefaultEnvironment", "ManagerEnvironment",
                ):  # fmt: skip
                    continue
                found = unit_files.assignments(words(setting.value), setting.lines)
                self._understand(found)
                if setting.key == "ManagerEnvironment" and kind == "unit":
                    continue  # the manager's alone
                base.seen += [one for one in found if one.name in self.watched]
                # An empty one forgets what came before.
                given = given | {one.name: one for one in found} if setting.value else {}
        base.values |= given
        return base

    def settings(self, path: Path) -> list[Setting]:
        """What a file of systemd says. In one that a generator wrote it stands where a person
        edits it."""
        if path not in self._settings:
            found = [*unit_files.settings(self.files.text(path), str(path))]
            if any(self.files.root / each == path.parent for each in GENERATORS):
                found = self._sourced(found)
            self._settings[path] = found
        return self._settings[path]

    def _sourced(self, found: list[Setting]) -> list[Setting]:
        source = next((each.value for each in found if each.key == "SourcePath"), "")
        path = self.files.inside(source)
        if not source or not (text := self.files.text(path)):
            return found
        self._understand(Assignment("", "", each.lines) for each in found)
        lines = text.split("\n")
        numbers = {line.strip(): number for number, line in reversed([*enumerate(lines, 1)])}
        naming = next((n for n, line in enumerate(lines, 1) if NAME.search(line)), 1)
        return [
            replace(each, lines=Lines(str(path), number, number))
            for each in found
            for number in [numbers.get(f"{each.key}={each.value}", naming)]
        ]

    def _units(
        self,
        kind: str,
        outer: Place,
        base: Base,
        quadlets: Mapping[str, containers.Quadlet],
        by_pam: Mapping[str, Base],
    ) -> Iterator[tuple[Place, Place, Given]]:
        directories = [self.files.root / each[1:] for each in DIRECTORIES[kind]]
        for type_ in SECTIONS:
            units = Units(directories, type_)
            shared = Place(kind, "*.service")
            paths = units.shared()
            if type_ == "service":
                yield shared, outer, self._unit(paths, "", base, {}, {})
            elif paths:  # beside what the manager gives, which is that of services
                everyone, shared = shared, Place(kind, f"*.{type_}")
                yield shared, everyone, self._unit(paths, f".{type_}", base, {}, {})
            names = {*units.names()}
            scripts = {}
            if type_ == "service":
                names |= quadlets.keys()
                if kind == "unit":
                    scripts = self._init_scripts(names, units)
            for name in sorted({*names, *scripts}, key=lambda name: (len(broader(name)), name)):
                self.units += 1
                parent = next((each for each in broader(name) if each in names), shared.name)
                found = self._unit(units.files(name), name, base, quadlets, by_pam)
                if name in scripts:
                    script = self.files.name(scripts[name])
                    lines = Lines(str(scripts[name]), 1, 1)
                    command = Command([script, "start"], base.values, lines)
                    self.paths[scripts[name]] = None
                    found.main = self._start(command, found)
                yield Place(kind, name), Place(kind, parent), found

    def _init_scripts(self, names: set[str], units: Units) -> dict[str, Path]:
        """Those that systemd makes units of: systemd-sysv-generator(8)."""
        found: dict[str, Path] = {}
        for directory in INIT_SCRIPTS:
            for path in self.files.matching(f"{directory}/*"):
                name = f"{path.name.removesuffix('.sh')}.service"
                if unit_files.is_name(name) and name not in names and not units.has(name):
                    found.setdefault(name, path)
        return found

    def _start(self, command: Command, given: Given) -> list[Started]:
        before = len(self.commands.seen)
        started = self.commands.started(command)
        given.seen += self.commands.seen[before:]
        self._understand(self.commands.seen[before:])
        return started

    def _unit(
        self,
        paths: list[Path],
        unit: str,
        base: Base,
        quadlets: Mapping[str, containers.Quadlet],
        by_pam: Mapping[str, Base],
    ) -> Given:
        """What a unit's commands start, with the environment in systemd's order: Environment=,
        then EnvironmentFile=, less what is unset; and what the commands themselves change."""
        self.paths.update(dict.fromkeys(paths))
        section = SECTIONS[unit.rpartition(".")[2] or "service"]
        found = [each for path in paths for each in self.settings(path)]
        lists = unit_files.effective(found, section)
        given = Given(seen=[*base.seen])
        for setting in found:
            if (setting.section, setting.key) == (section, "Environment"):
                given.seen += [one for one in _assigned(setting, unit) if one.name in self.watched]
        environment = dict(base.values)
        for setting in lists.get("Environment", []):
            environment |= {one.name: one for one in _assigned(setting, unit)}
        for setting in lists.get("EnvironmentFile", []):
            for path in self._matching(_expanded(setting.value.removeprefix("-"), unit)):
                self.paths[path] = None
                file = self.assigned(path)
                environment |= file.values
                given.seen += file.seen
        unset = lists.get("UnsetEnvironment", [])
        gone = {_expanded(word, unit) for each in unset for word in words(each.value)}
        if gone:
            environment = {
                name: one for name, one in environment.items() if not gone & {name, str(one)}
            }
        names = lists.get("PAMName", [])
        if names and self.pam.reads_environment(names[-1].value):
            file = self.assigned(self.files.inside(ENVIRONMENT))
            environment |= file.values
            given.seen += file.seen
        self._understand(given.seen)
        where = next((each.lines for each in found), Lines(str(unit), 1, 1))
        if quadlet := quadlets.get(unit):
            lists.pop(MAIN, None)
            self.paths.update(dict.fromkeys(quadlet.paths))
            given.seen += quadlet.seen
            self._understand(quadlet.seen)
            given.main.append(quadlet.started)
        moved = self._moved(lists, unit)
        directory = self._directory(lists, unit)
        for key in COMMANDS:
            for setting in lists.get(key, []):
                if len(setting.value) > COMMAND_MAX:
                    path = Path(setting.lines.path)
                    self.files.refuse(path, f"a command of more than {COMMAND_MAX} characters")
                    continue
                for argv in _commands(setting, unit, environment):
                    command = Command(argv, environment, setting.lines, directory)
                    started = self._start(command, given)
                    if moved:
                        started = [replace(one, elsewhere=moved) for one in started]
                    if key == MAIN:
                        given.main += started
                        self._note_program(argv, unit)
                        if pam := by_pam.get(Path(argv[0]).name):
                            given.seen += pam.seen
                            given.main += self._plain(pam).main
                    else:
                        given.others += [(key, one) for one in started]
        if MAIN not in lists and section != "Socket" and not given.main:
            given.main.append(Started("", environment, where))
        return given

    def _note_program(self, argv: list[str], unit: str) -> None:
        for word in argv[:2]:
            self.programs.setdefault(word.rpartition("/")[2], unit)

    def _moved(self, lists: Mapping[str, list[Setting]], unit: str) -> Elsewhere | None:
        """Where PAMName= has a unit's processes."""
        names = lists.get("PAMName", [])
        if not names or names[-1].value == "systemd-user" or not self.pam.moves(names[-1].value):
            return None
        user = _expanded(lists["User"][-1].value, unit) if "User" in lists else "root"
        return session_of(self.files, user, f"PAMName={names[-1].value} opens a session")

    def _directory(self, lists: Mapping[str, list[Setting]], unit: str) -> str:
        found = lists.get("WorkingDirectory")
        name = _expanded(found[-1].value.removeprefix("-"), unit) if found else "/"
        return name if name.startswith("/") else "/"

    def _matching(self, pattern: str) -> list[Path]:
        """The files of an EnvironmentFile=; none where its name is not known."""
        if not pattern.startswith("/") or _SPECIFIER.search(pattern):
            return []
        return self.files.some(pattern)


def _assigned(setting: Setting, unit: str) -> list[Assignment]:
    found = [_expanded(word, unit) for word in words(setting.value)]
    return unit_files.assignments(found, setting.lines)


def _commands(
    setting: Setting, unit: str, environment: Mapping[str, Assignment]
) -> Iterator[list[str]]:
    """The commands of an ExecStart= and the like, with the variables that systemd itself
    replaces."""
    prefix = _EXEC_PREFIX.match(setting.value)
    assert prefix is not None
    argv: list[str] = []
    for word in [*words(setting.value[prefix.end() :]), ";"]:
        if word == ";":
            if argv:
                yield [argv[0], *argv[2:]] if "@" in prefix[0] else argv
            argv = []
            continue
        expanded = _expanded(word, unit)
        if not argv:
            argv.append(expanded.lstrip("-@:+!|"))
        elif ":" in prefix[0]:
            argv.append(expanded)
        elif re.fullmatch(r"\$\w+", expanded):
            one = environment.get(expanded[1:])
            argv += one.value.split() if one else []
        else:
            argv.append(
                _VARIABLE.sub(
                    lambda found: environment[found[1]].value if found[1] in environment else "",
                    expanded,
                ).replace("$$", "$")
            )


def _expanded(text: str, unit: str) -> str:
    """With the specifiers that hang on the unit's name (systemd.unit(5)); others stay."""
    match = _OF_NAMES.fullmatch(unit)
    known = {"%": "%"}
    if match:
        known |= {"n": unit, "N": unit.rpartition(".")[0], "p": match[1]}
        known |= {"i": match[2]} if match[2] else {}
    return _SPECIFIER.sub(lambda found: known.get(found[1], found[0]), text)
