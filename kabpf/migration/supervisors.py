"""Programs that start others by files of their own: supervisord, xinetd, runit and the like.

All that one of them starts shares its cgroup, so that no policy selects one of its jobs.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kabpf.migration.commands import Commands, Started
from kabpf.migration.files import Files
from kabpf.migration.scripts import Command
from kabpf.systemd.unit_files import Assignment, Lines

SUPERVISORD = ("/etc/supervisord.conf", "/etc/supervisor/supervisord.conf")
SUPERVISORD_INCLUDES = (
    "/etc/supervisor/conf.d/*.conf", "/etc/supervisord.d/*.ini", "/etc/supervisord.d/*.conf",
    "/etc/supervisor.d/*.ini",
)  # fmt: skip
XINETD = ("/etc/xinetd.conf", "/etc/xinetd.d/*")
RUNIT = (
    "/etc/service/*/run", "/etc/sv/*/run", "/service/*/run", "/var/service/*/run",
    "/etc/runit/runsvdir/*/*/run", "/etc/s6/*/run", "/etc/s6/sv/*/run",
)  # fmt: skip

_LINE_MAX = 1 << 16  # characters of a value that shlex parts
_PAIR = re.compile(
    r"""\s*+([A-Za-z_]\w*+)\s*+=\s*+("[^"]*+"|'[^']*+'|[^,\s"';]*+)\s*+(?:,|;[^\n]*+|(?=\s)|\Z)"""
)
_OPTION = re.compile(r"([A-Za-z_]\w*+)\s*+[=:]\s*+(.*)", re.DOTALL)


@dataclass
class Job:
    """What a supervisor starts under one name."""

    name: str
    started: list[Started]
    seen: list[Assignment] = field(default_factory=list)


@dataclass
class Supervisor:
    """A program that starts jobs, which share its unit."""

    name: str
    programs: tuple[str, ...]  # as units start it
    jobs: list[Job] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


@dataclass
class _Section:
    name: str
    options: dict[str, tuple[str, Lines]] = field(default_factory=dict)


def find(files: Files, commands: Commands) -> Iterator[Supervisor]:
    """The supervisors that have files."""
    yield _supervisord(files, commands)
    yield _xinetd(files, commands)
    yield _runit(files, commands)


def pairs(text: str) -> dict[str, str]:
    """supervisord's `environment=`: KEY="value",KEY2=value2."""
    found = {}
    position = 0
    while match := _PAIR.match(text, position):
        if match.end() == position:
            break
        found[match[1]] = match[2].strip("\"'")
        position = match.end()
    return found


def _job(name: str, command: Command, commands: Commands, given: list[Assignment]) -> Job:
    before = len(commands.seen)
    started = commands.started(command)
    return Job(name, started, [*given, *commands.seen[before:]])


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text[:_LINE_MAX]) if len(text) < _LINE_MAX else text.split()
    except ValueError:
        return text.split()


def _supervisord(files: Files, commands: Commands) -> Supervisor:
    found = Supervisor("supervisord", ("supervisord",))
    patterns = [*SUPERVISORD, *SUPERVISORD_INCLUDES]
    paths = dict.fromkeys(path for each in patterns for path in files.matching(each))
    for path in (files.inside(each) for each in SUPERVISORD):
        for section in _sections(files, path):
            if section.name == "include" and "files" in section.options:
                for pattern in section.options["files"][0].split():
                    if not pattern.startswith("/"):
                        pattern = f"{files.name(path.parent)}/{pattern}"
                    paths |= dict.fromkeys(files.some(pattern))
    found.paths = [*paths]
    sections = [each for path in paths for each in _sections(files, path)]
    everyone = [one for each in sections if each.name == "supervisord" for one in _given(each)]
    for section in sections:
        kind, _, name = section.name.partition(":")
        if kind not in ("program", "eventlistener", "fcgi-program"):
            continue
        own = _given(section)
        environment = {one.name: one for one in (*everyone, *own)}
        text, lines = section.options.get("command", ("", Lines(section.name, 1, 1)))
        command = Command(_split(text), environment, lines)
        found.jobs.append(_job(name, command, commands, [*everyone, *own]))
    return found


def _given(section: _Section) -> list[Assignment]:
    if "environment" not in section.options:
        return []
    text, lines = section.options["environment"]
    return [
        Assignment(name, value, _line(name, text, lines)) for name, value in pairs(text).items()
    ]


def _line(name: str, text: str, lines: Lines) -> Lines:
    """The line of a value of several lines in which a variable is given."""
    offset = text.count("\n", 0, max(text.find(f"{name}="), 0))
    return replace(lines, first=lines.first + offset, last=lines.first + offset)


def _sections(files: Files, path: Path) -> Iterator[_Section]:
    """Of a file as Python's configparser reads it: lines that are indented go on."""
    text = files.text(path)
    if not files.spend(text.count("\n")):
        files.refuse(path, "other files took too many steps")
        return
    section = _Section("")
    key = ""
    for number, line in enumerate(text.split("\n"), 1):
        bare = re.split(r"\s;", line, maxsplit=1)[0].rstrip()
        if not bare.strip() or bare.lstrip().startswith(("#", ";")):
            continue
        if bare[0].isspace() and key:
            value, lines = section.options[key]
            section.options[key] = (f"{value}\n{bare.strip()}", replace(lines, last=number))
        elif bare.startswith("["):
            yield section
            section, key = _Section(bare.strip("[] ")), ""
        elif match := _OPTION.fullmatch(bare):
            key = match[1].lower()
            section.options[key] = (match[2], Lines(str(path), number, number))
    yield section


def _xinetd(files: Files, commands: Commands) -> Supervisor:
    """xinetd.conf(5)."""
    found = Supervisor("xinetd", ("xinetd",))
    found.paths = [path for each in XINETD for path in files.matching(each)]
    defaults: list[Assignment] = []
    for path in found.paths:
        name, given, server, arguments = "", [*defaults], "", ""
        if not files.spend(files.text(path).count("\n")):
            files.refuse(path, "other files took too many steps")
            continue
        for number, line in enumerate(files.text(path).split("\n"), 1):
            bare = line.strip()
            lines = Lines(str(path), number, number)
            if bare.startswith("#"):
                continue
            if match := re.match(r"service\s+(\S+)|(defaults)\b", bare):
                name, given, server, arguments = match[1] or "", [*defaults], "", ""
            elif match := re.match(r"(\w+)\s*[+-]?=\s*(.*)", bare):
                if match[1] == "env":
                    given += [
                        Assignment(key, value, lines)
                        for key, equals, value in (w.partition("=") for w in match[2].split())
                        if equals
                    ]
                elif match[1] == "server":
                    server = match[2]
                elif match[1] == "server_args":
                    arguments = match[2]
            elif bare.startswith("}"):
                if not name:
                    defaults = given
                    continue
                environment = {one.name: one for one in given}
                command = Command([server, *arguments.split()], environment, lines)
                found.jobs.append(_job(name, command, commands, given))
                name = ""
    return found


def _runit(files: Files, commands: Commands) -> Supervisor:
    """runsv(8), and what has directories of the same form."""
    found = Supervisor("runit", ("runsvdir", "runsvdir-start", "runit", "svscan", "s6-svscan"))
    done: set[str] = set()
    patterns = [*RUNIT, *(f"{each}/*/run" for each in commands.watched_directories)]
    for path in (path for each in patterns for path in files.matching(each)):
        real = os.path.realpath(path)
        if real in done:
            continue
        done.add(real)
        found.paths += [path, *files.matching(f"{files.name(path.parent)}/env/*")]
        given = [
            Assignment(
                each.name, files.text(each).split("\n")[0].rstrip(" \t"), Lines(str(each), 1, 1)
            )
            for each in files.matching(f"{files.name(path.parent)}/env/*")
        ]
        uses = re.search(r"\b(?:chpst|envdir|s6-envdir)\b[^\n]*\benv\b", files.text(path))
        used = given if uses else []
        environment = {one.name: one for one in used}
        command = Command([files.name(path)], environment, Lines(str(path), 1, 1))
        found.jobs.append(_job(path.parent.name, command, commands, used))
    return found
