"""What a command starts in the end: through env(1), shells and their scripts, and programs that run
another; and where that then is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from kabpf.migration import env_command, scripts
from kabpf.migration.files import Files, absolute
from kabpf.migration.libraries import PRELOAD
from kabpf.migration.pam import Pam
from kabpf.migration.scripts import UNKNOWN, Command, Environment
from kabpf.systemd.unit_files import Assignment, Lines

DEPTH_MAX = 20  # of commands that start each other
STARTED_MAX = 1000  # by one unit
WORDS_MAX = scripts.WORDS_MAX

SHELLS = ("sh", "bash", "dash", "ash", "ksh", "ksh93", "mksh", "zsh", "busybox")
# Programs that run the rest of their words, with those of their options that have an argument in
# the next word, and how many words of their own come before the command.
_RUNNERS: Mapping[str, tuple[str, int]] = {
    "nice": ("-n --adjustment", 0),
    "ionice": ("-c --class -n --classdata", 0),
    "nohup": ("", 0),
    "setsid": ("", 0),
    "chrt": ("-T -P -D --sched-runtime --sched-period --sched-deadline", 1),
    "taskset": ("", 1),
    "timeout": ("-k --kill-after -s --signal", 1),
    "stdbuf": ("-i -o -e --input --output --error", 0),
    "unbuffer": ("", 0),
    "time": ("-f --format -o --output", 0),
    "numactl": ("-m -N -C -p -i --membind --cpunodebind --physcpubind --interleave", 0),
    "prlimit": ("", 0),
    "setpriv": (
        "--ruid --euid --reuid --rgid --egid --regid --groups --inh-caps --ambient-caps"
        " --bounding-set --securebits --pdeathsig",
        0,
    ),
    "tini": ("-p -e", 0),
    "dumb-init": ("-r --rewrite", 0),
    "catatonit": ("", 0),
    "flock": ("-w --wait --timeout -E --conflict-exit-code", 1),
    "chpst": ("-u -U -b -e -/ -n -l -L -m -d -o -p -f -c -r -t", 0),
    "softlimit": ("-a -c -d -f -l -m -o -p -r -s -t", 0),
    "setuidgid": ("", 1),
    "s6-setuidgid": ("", 1),
    "unshare": ("-S -G -R -w --setuid --setgid --root --wd", 0),
    "catchsegv": ("", 0),
    "chronic": ("", 0),
    "systemd-cat": ("-t --identifier -p --priority", 0),
    "strace": ("-e -o -p -s -u -E", 0),
}
_SU_TAKES = (
    "-c", "--command", "-s", "--shell", "-g", "--group", "-G", "--supp-group", "-w",
    "--whitelist-environment", "-u", "--user",
)  # fmt: skip
_SUDO_TAKES = ("-u", "-g", "-h", "-p", "-C", "-r", "-t", "-T", "-U", "-R", "-D")
_COMPOSERS = ("docker-compose", "podman-compose")
_DIRECTORY_WATCHERS = ("runsvdir", "svscan", "s6-svscan")  # they start each DIRECTORY/NAME/run
_INTERPRETER = re.compile(
    r"(?:python|perl|ruby|node|nodejs|php|lua|tclsh|expect|csh|tcsh|fish)[0-9.]*"
)
# Of docker-run(1) and podman-run(1): the options without an argument.
_CONTAINER_FLAGS = frozenset((
    "-d", "--detach", "-i", "--interactive", "-t", "--tty", "-it", "-ti", "-dit", "-id", "-dt",
    "--rm", "--init", "--privileged", "--read-only", "-P", "--publish-all", "--no-healthcheck",
    "--oom-kill-disable", "--sig-proxy", "--replace", "-q", "--quiet", "--tls-verify",
    "--disable-content-trust", "--env-host", "--no-hosts", "--http-proxy",
))  # fmt: skip


@dataclass(frozen=True)
class Elsewhere:
    """Why processes are not in the unit that starts them, and what selects them."""

    why: str
    select: str


@dataclass(frozen=True)
class Started:
    """A program that is started in the end, with its environment."""

    program: str
    environment: Environment
    lines: Lines  # of the command
    is_part: bool = False
    elsewhere: Elsewhere | None = None
    in_container: bool = False


@dataclass
class Commands:
    """Follows commands; what it comes by on the way is kept for all of them."""

    files: Files
    pam: Pam
    watched: frozenset[str]
    seen: list[Assignment] = field(default_factory=list)
    doubts: list[tuple[Lines, str]] = field(default_factory=list)
    by_pam: Environment = field(default_factory=dict)  # of /etc/environment
    clients: list[Assignment] = field(default_factory=list)  # what reaches no container
    paths: dict[Path, None] = field(default_factory=dict)  # of scripts
    watched_directories: dict[str, None] = field(default_factory=dict)  # of runsvdir(8) and others
    unnamed: dict[Lines, None] = field(default_factory=dict)  # what names files as it runs

    def started(self, command: Command) -> list[Started]:
        """What a command starts, each program and environment once."""
        found: dict[object, Started] = {}
        try:
            for each in self._started(command, None, 0):
                environment = {
                    name: one for name, one in each.environment.items() if name in self.watched
                }
                found.setdefault((each.program, repr(environment), each.elsewhere), each)
                if len(found) >= STARTED_MAX:
                    break
        except RecursionError:
            self.files.refuse(Path(command.lines.path), "scripts that start each other too deeply")
        return [*found.values()]

    def _started(
        self, command: Command, elsewhere: Elsewhere | None, depth: int
    ) -> Iterator[Started]:
        words = command.words
        if not words or depth > DEPTH_MAX:
            return
        if len(words) > WORDS_MAX:
            path = Path(command.lines.path)
            self.files.refuse(path, f"a command of more than {WORDS_MAX} words")
            return
        program = words[0].rpartition("/")[2]
        if program == "env":
            yield from self._env(command, elsewhere, depth)
        elif program in SHELLS:
            yield from self._shell(command, elsewhere, depth)
        elif program in ("su", "runuser"):
            yield from self._su(command, program, depth)
        elif program in ("sudo", "doas"):
            environment = _without(command.environment, PRELOAD)  # it is set-user-ID
            rest = [*_after_options(words[1:], _SUDO_TAKES)]
            changed = replace(command, words=rest, environment=environment)
            given, rest = self._given(changed)
            yield from self._started(
                replace(changed, words=rest, environment=environment | given), elsewhere, depth + 1
            )
        elif program in ("docker", "podman") and "run" in words[1:3]:
            yield self._container(command, program)
        elif program in _COMPOSERS or (program in ("docker", "podman") and "compose" in words[1:2]):
            self._note_compose_files(command)
            yield Started(program, command.environment, command.lines, elsewhere=elsewhere)
        elif program in _RUNNERS:
            takes, own = _RUNNERS[program]
            rest = [*_after_options(words[1:], takes.split())][own:]
            if rest[:1] == ["--"]:
                rest = rest[1:]
            yield from self._started(replace(command, words=rest), elsewhere, depth + 1)
        else:
            yield from self._program(command, elsewhere, depth)

    def _program(
        self, command: Command, elsewhere: Elsewhere | None, depth: int
    ) -> Iterator[Started]:
        """A program that is none of those known: a script, or the end."""
        name = command.words[0]
        if _INTERPRETER.fullmatch(name.rpartition("/")[2]):
            script = next((word for word in command.words[1:] if word[:1] != "-"), "")
            if script and UNKNOWN not in script:
                self.paths[self.files.inside(absolute(script, command.directory))] = None
        if name.rpartition("/")[2] in _DIRECTORY_WATCHERS:
            given = (each for each in command.words[1:] if each.startswith("/"))
            self.watched_directories.update(dict.fromkeys(given))
        if "/" in name and UNKNOWN not in name:
            path = self.files.inside(absolute(name, command.directory))
            if text := self.files.script(path):
                self.paths[path] = None
                interpreter = text.partition("\n")[0][2:].split()
                if interpreter and interpreter[0].endswith("/env"):
                    rest = [word for word in interpreter[1:] if not word.startswith("-")]
                    interpreter = [word for word in rest if "=" not in word]
                if interpreter and interpreter[0].rpartition("/")[2] in SHELLS:
                    yield from self._script(text, Lines(str(path), 1, 1), command, elsewhere, depth)
                    return
        yield Started(name, command.environment, command.lines, command.is_part, elsewhere)

    def _script(
        self,
        text: str,
        lines: Lines,
        command: Command,
        elsewhere: Elsewhere | None,
        depth: int,
    ) -> Iterator[Started]:
        """What a shell starts; its words are the script's name and arguments."""
        found: list[Started] = []

        def start(inner: Command) -> None:
            if len(found) < STARTED_MAX:
                found.extend(self._started(inner, elsewhere, depth + 1))

        outcome = scripts.follow(text, lines, command, self.files, start, self.watched)
        self.seen += outcome.seen
        self.unnamed.update(dict.fromkeys(outcome.unnamed))
        self.doubts += outcome.doubts
        yield from found

    def _shell(
        self, command: Command, elsewhere: Elsewhere | None, depth: int
    ) -> Iterator[Started]:
        words = command.words[1:]
        if command.words[0].endswith("busybox"):
            words = words[1:]
        has_text = False
        while words and words[0][:1] in ("-", "+") and words[0] not in ("-", "--"):
            option, *words = words
            if option in ("--rcfile", "--init-file", "-o", "+o", "-O", "+O"):
                words = words[1:]
            elif not option.startswith("--") and "c" in option:
                has_text = True
        words = words[1:] if words[:1] in (["-"], ["--"]) else words
        if not words:
            yield Started(
                command.words[0], command.environment, command.lines, command.is_part, elsewhere
            )
        elif has_text:
            if UNKNOWN in words[0]:
                yield Started(words[0], command.environment, command.lines, False, elsewhere)
                return
            inner = replace(command, words=words[1:] or [""])
            yield from self._script(words[0], command.lines, inner, elsewhere, depth)
        else:
            path = self.files.inside(absolute(words[0], command.directory))
            text = "" if UNKNOWN in words[0] else self.files.text(path)
            if UNKNOWN in words[0]:
                self.unnamed[command.lines] = None
            if text:
                self.paths[path] = None
                inner = replace(command, words=words)
                yield from self._script(text, Lines(str(path), 1, 1), inner, elsewhere, depth)
            else:
                yield Started(
                    words[0], command.environment, command.lines, command.is_part, elsewhere
                )

    def _env(self, command: Command, elsewhere: Elsewhere | None, depth: int) -> Iterator[Started]:
        values = {name: one.value for name, one in command.environment.items()}
        found = env_command.evaluate(command.words[1:], values)
        environment = {} if found.clears else _without(command.environment, *found.unsets)
        given = {name: Assignment(name, value, command.lines) for name, value in found.sets.items()}
        self.seen += [one for name, one in given.items() if name in self.watched]
        changed = replace(
            command,
            words=found.command,
            environment=environment | given,
            directory=absolute(found.directory, command.directory),
        )
        yield from self._started(changed, elsewhere, depth + 1)

    def _given(self, command: Command) -> tuple[dict[str, Assignment], list[str]]:
        """The assignments that a command's words begin with, and the rest."""
        given: dict[str, Assignment] = {}
        rest = command.words
        while rest and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", rest[0], re.DOTALL)):
            given[match[1]] = Assignment(match[1], match[2], command.lines)
            rest = rest[1:]
        self.seen += [one for name, one in given.items() if name in self.watched]
        return given, rest

    def _su(self, command: Command, program: str, depth: int) -> Iterator[Started]:
        """su(1) and runuser(1): a session of a user, by PAM."""
        options: dict[str, str] = {}
        rest: list[str] = []
        words = command.words[1:]
        while words:
            word, *words = words
            name, equals, value = word.partition("=")
            if word == "--":
                rest += words
                break
            if name in _SU_TAKES:
                if not equals:
                    value, words = (words[0], words[1:]) if words else ("", [])
                options[name] = value
            elif word in ("-", "-l", "--login"):
                options["-l"] = ""
            elif re.fullmatch("-[a-zA-Z]+c", word):  # such as -lc
                options["-c"], words = (words[0], words[1:]) if words else ("", [])
                options |= {"-l": ""} if "l" in word else {}
            elif word.startswith("-"):
                options[word] = ""
            else:
                rest.append(word)
        stays = "-u" in options or "--user" in options  # runuser(1): no session
        user = rest[0] if rest and not stays else "root"
        environment = dict(command.environment)
        if "-l" in options and not {"-m", "-p", "--preserve-environment"} & options.keys():
            kept = options.get("-w", options.get("--whitelist-environment", "")).split(",")
            environment = {name: one for name, one in environment.items() if name in kept}
        service = f"{program}-l" if "-l" in options else program
        elsewhere = None
        if not stays and self.by_pam and self.pam.reads_environment(service):
            environment |= self.by_pam
        if not stays and self.pam.moves(service):
            elsewhere = session_of(self.files, user, f"{program} opens a session with PAM")
        changed = replace(command, environment=environment)
        text = options.get("-c", options.get("--command"))
        if stays:
            yield from self._started(replace(changed, words=rest), None, depth + 1)
        elif text is not None and UNKNOWN not in text:
            inner = replace(changed, words=["sh"])
            yield from self._script(text, command.lines, inner, elsewhere, depth + 1)
        elif len(rest) > 1:  # arguments of the shell
            yield from self._started(
                replace(changed, words=["sh", *rest[1:]]), elsewhere, depth + 1
            )
        else:
            yield Started(program, environment, command.lines, command.is_part, elsewhere)

    def _note_compose_files(self, command: Command) -> None:
        """The files that `docker compose` reads, to be looked through."""
        words = command.words
        given = [following for word, following in pairwise(words) if word in ("-f", "--file")]
        for pattern in given or ("docker-compose*.y*ml", "compose*.y*ml", ".env"):
            found = self.files.matching(absolute(pattern, command.directory))
            self.paths.update(dict.fromkeys(found))

    def _container(self, command: Command, engine: str) -> Started:
        """docker-run(1), podman-run(1): the engine makes the container's cgroup, and the container
        has an environment of its own."""
        words = command.words[command.words.index("run") + 1 :]
        values: dict[str, list[str]] = {}
        while words and words[0].startswith("-"):
            word, *words = words
            name, equals, value = word.partition("=")
            if re.match("-e.", word):
                name, value = "-e", word[2:].removeprefix("=")
            elif not equals and word not in _CONTAINER_FLAGS:
                value, words = (words[0], words[1:]) if words else ("", [])
            values.setdefault(name, []).append(value)
        environment: dict[str, Assignment] = {}
        for name in values.get("--env-file", []):
            environment |= container_environment_file(self.files, name, command.directory)
        for each in (*values.get("-e", []), *values.get("--env", [])):
            name, equals, value = each.partition("=")
            if equals:
                environment[name] = Assignment(name, value, command.lines)
            elif name in command.environment:
                environment[name] = command.environment[name]
        if (preload := command.environment.get(PRELOAD)) and "--env-host" not in values:
            self.clients.append(preload)
        if "--env-host" in values:
            environment = {**command.environment, **environment}
        self.seen += [one for name, one in environment.items() if name in self.watched]
        return Started(
            engine,
            environment,
            command.lines,
            elsewhere=_cgroup_of_container(engine, values),
            in_container=True,
        )


def container_environment_file(files: Files, name: str, directory: str) -> dict[str, Assignment]:
    """The assignments of a file as docker(1) and podman(1) read it: without quotation marks."""
    path = files.inside(absolute(name, directory))
    found = {}
    for number, line in enumerate(files.text(path).split("\n"), 1):
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            found[key] = Assignment(key, value, Lines(str(path), number, number))
    return found


def session_of(files: Files, user: str, why: str) -> Elsewhere:
    """Where the sessions of a user are."""
    uid = user if user.isdigit() else _uid(files, user)
    name = f"user-{uid}.slice" if uid else "user.slice"
    return Elsewhere(f"{why}: its sockets are in {name}, not in the unit", f"{{unit: {name}}}")


def _uid(files: Files, user: str) -> str:
    for line in files.text(files.inside("/etc/passwd")).splitlines():
        fields = line.split(":")
        if fields[0] == user and len(fields) > 2 and re.fullmatch("[0-9]{1,10}", fields[2]):
            return fields[2]
    return "0" if user == "root" else ""


def _cgroup_of_container(engine: str, options: Mapping[str, list[str]]) -> Elsewhere | None:
    how = options.get("--cgroups", [""])[-1]
    if engine == "podman" and how in ("split", "disabled"):
        return None
    parent = options.get("--cgroup-parent", [""])[-1]
    if parent.endswith(".slice"):
        why = f"{engine} run puts the container into {parent}, not into the unit"
        return Elsewhere(why, f"{{unit: {parent}}}")
    if engine == "podman":
        why = (
            "podman run without --cgroups=split puts the container into a scope of machine.slice,"
            " not into the unit"
        )
        return Elsewhere(why, "{cgroup: /machine.slice/libpod-*}, or the unit with --cgroups=split")
    why = "docker run puts the container into a scope of system.slice, not into the unit"
    return Elsewhere(
        why, "{cgroup: /system.slice/docker-*}, or a slice of its own with --cgroup-parent"
    )


def _without(environment: Environment, *names: str) -> dict[str, Assignment]:
    return {name: one for name, one in environment.items() if name not in names}


def _after_options(words: Iterable[str], takes: Sequence[str]) -> Iterator[str]:
    """The words from the first on that is neither an option nor the argument of one."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        if word in takes:
            next(rest, None)
        elif not word.startswith("-"):
            yield word
            break
    yield from rest
