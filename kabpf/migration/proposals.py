"""Policies that do the same as libkeepalive and libdontdie where these are preloaded, and what to
remove then."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kabpf import output
from kabpf.migration import containers, mentions, places, supervisors, wanted
from kabpf.migration.commands import Started
from kabpf.migration.files import Files
from kabpf.migration.libraries import NAME, PRELOAD, Libraries, parts
from kabpf.migration.preloads import (
    EVERYTHING,
    SESSIONS,
    Given,
    Place,
    Search,
)
from kabpf.migration.processes import Process, Processes
from kabpf.migration.scripts import UNKNOWN
from kabpf.migration.wanted import WATCHED, Reading, Wanted
from kabpf.policy import writer
from kabpf.policy.files import SYSTEM
from kabpf.policy.model import Options, Policy, Rules, Selector
from kabpf.policy.yaml import Source
from kabpf.systemd import unit_files
from kabpf.systemd.unit_files import Assignment, Lines, broader

NOT_SEARCHED = "homes of users, images and file systems of containers"
VALUE_SHOWN_MAX = 300  # characters of a value
PIDS_SHOWN_MAX = 3
LINES_SHOWN_MAX = 3
# Commands that have no sockets of their own.
_HARMLESS = frozenset((
    "[", "test", "mkdir", "rm", "chown", "chmod", "cp", "mv", "ln", "cat", "grep", "sed", "awk",
    "sleep", "sync", "install", "touch", "id", "date", "logger", "dirname", "basename",
    "readlink", "hostname", "uname", "kill", "pkill", "wait", "mktemp", "stat", "find", "sort",
    "head", "tail", "start-stop-daemon", "log_daemon_msg", "log_end_msg", "log_action_msg",
    "log_progress_msg",
))  # fmt: skip
_UNIT = re.compile(r"[^/]+\.(?:service|scope|socket|mount|swap|slice)")


@dataclass(frozen=True)
class Proposal:
    """A policy file to write."""

    file: Path
    text: str


@dataclass(frozen=True)
class Removal:
    """What to take out of a line."""

    file: str
    line: int
    what: str


@dataclass
class Found:
    """What `kabpfctl import` says."""

    policies: list[Proposal] = field(default_factory=list)
    remove: list[Removal] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    not_searched: str = ""


def look(root: Path, proc: Path | None = Path("/proc")) -> Found:
    """What the files below `root` and the processes below `proc` have, and what to do."""
    files = Files(root)
    search = Search(files, WATCHED)
    judgement = _Judgement(search)
    for place, around, given in search.find():
        judgement.add(place, around, given)
    for supervisor in supervisors.find(files, search.commands):
        judgement.supervise(supervisor)
    for path, machine, assigned, boots in containers.nspawn(files):
        judgement.nspawn(path, machine, assigned, boots=boots)
    judgement.doubt(search.commands.doubts)
    judgement.note_clients(search.commands.clients)
    counts = judgement.scan()
    found = judgement.found
    if proc is not None:
        processes = Processes(proc, WATCHED)
        judgement.compare(processes.find())
        refused = f"; {processes.refused} more refused it" if processes.refused else ""
        counts.append(f"processes, with what they have in memory now: {processes.looked}{refused}")
    found.unread += [f"{path}: not read: {why}" for path, why in files.unread.items()]
    found.remove = judgement.removals()
    found.searched = counts
    found.not_searched = judgement.not_searched()
    return found


class _Judgement:
    """What is proposed of all that is found."""

    def __init__(self, search: Search) -> None:
        self.found = Found()
        self._search = search
        self._libraries = Libraries(search.files)
        self._by_name = Libraries(None)  # whose files are in a container
        self._wanted: dict[Place, Wanted | None] = {}
        self._remove: dict[tuple[str, int, str], Removal] = {}
        self._unclear: dict[tuple[str, int], None] = {}
        self._named: dict[str, str] = {}  # files that others name, with why no policy is for them

    def add(self, place: Place, around: Place | None, given: Given) -> None:
        """Propose a policy for a place, where it wants another one than what is around it."""
        outer = self._wanted.get(around) if around else None
        reached = [one for one in given.main if one.elsewhere is None]
        readings = [(one, self._reading(one)) for one in reached]
        self._wanted[place] = outer
        for one in (*given.main, *(each for _, each in given.others)):
            if one.elsewhere:
                self._say_elsewhere(place, one)
        main = self._agreed(place, readings) if readings else None
        if main is not None:
            started, reading = main
            self._wanted[place] = reading.wanted
            if reading.wanted != outer:
                self.found.policies.append(self._proposal(place, reading, started))
                self._warn_of_others(place, readings)
        for key, one in given.others:
            self._judge_other(place, key, one)
        kinds = [reading for _, reading in readings]
        kinds += [self._reading(one) for _, one in given.others]
        kinds += [self._reading(one) for one in given.main if one.elsewhere]
        self._note_removals(given.seen, kinds)

    def _agreed(
        self, place: Place, readings: list[tuple[Started, Reading]]
    ) -> tuple[Started, Reading] | None:
        """The one reading of all that a place starts and that preloads; where they differ, or one
        is not known, an error."""
        active = [each for each in readings if each[1].wanted is not None]
        for _, reading in active:
            self._leave_out(reading.left_out)
        if unknown := [(one, each) for _, one in active for each in one.unknown]:
            for reading, each in unknown:
                self._error(
                    each.lines,
                    f"{each.name}: its value is known only where it runs, and so the policy for"
                    f" {place.name} ({' and '.join(reading.kinds)})",
                )
            return None
        if not active:
            return readings[0] if not readings[0][1].libraries else None
        if len({str(reading.wanted) for _, reading in active}) > 1:
            for started, reading in active:
                self._error(
                    self._where(started),
                    f"preloads {_names(reading)} for one of the programs of {place.name}, others"
                    f" of which have other values: no policy selects one of them"
                    f" ({reading.wanted})",
                )
            return None
        return active[0]

    def _warn_of_others(self, place: Place, readings: list[tuple[Started, Reading]]) -> None:
        without = {
            _shown_program(one)
            for one, reading in readings
            if reading.wanted is None and one.program.rpartition("/")[2] not in _HARMLESS
        }
        active = [one for one, reading in readings if reading.wanted is not None]
        if active and without:
            names = ", ".join(sorted(without)[:3])
            self._leave_out([
                f"{self._where(active[0])}: preloads for one command; the policy covers every"
                f" process of {place.name}, {names} too"
            ])  # fmt: skip

    def _judge_other(self, place: Place, key: str, one: Started) -> None:
        reading = self._reading(one)
        if reading.wanted is None or one.elsewhere or reading.wanted == self._wanted[place]:
            return
        self._error(
            self._where(one),
            f"preloads {_names(reading)} for {key}= alone, where no policy selects it; one for all"
            f" of {place.name} is {reading.wanted}",
        )

    def _say_elsewhere(self, place: Place, one: Started) -> None:
        reading = self._reading(one)
        if (
            reading.wanted is None
            or one.elsewhere is None
            or reading.wanted == self._wanted.get(EVERYTHING)
        ):
            return
        self._leave_out(reading.left_out)
        self._error(
            self._where(one),
            f"preloads {_names(reading)} for {place.name}, but {one.elsewhere.why}; a policy has to"
            f" select {one.elsewhere.select} ({reading.wanted})",
        )

    def supervise(self, supervisor: supervisors.Supervisor) -> None:
        """Propose a policy for a supervisor's unit where all of its jobs want the same."""
        unit = next(
            (
                self._search.programs[each]
                for each in supervisor.programs
                if each in self._search.programs
            ),
            "",
        )
        self._search.understood.update(
            (one.lines.path, n)
            for job in supervisor.jobs
            for one in job.seen
            if one.name in WATCHED
            for n in one.lines.numbers
        )
        readings = [(one, self._reading(one)) for job in supervisor.jobs for one in job.started]
        active = [each for each in readings if each[1].wanted is not None]
        same = len({str(reading.wanted) for _, reading in readings}) == 1
        is_known = not any(reading.unknown for _, reading in active)
        if active and unit and same and is_known:
            place = Place("unit", unit)
            started, reading = active[0]
            self._leave_out(reading.left_out)
            if self._wanted.get(place) is None:
                self._wanted[place] = reading.wanted
                self.found.policies.append(self._proposal(place, reading, started))
        else:
            for job in supervisor.jobs:
                for one in job.started:
                    if (reading := self._reading(one)).wanted is not None:
                        self._leave_out(reading.left_out)
                        self._error(
                            self._where(one),
                            f"preloads {_names(reading)} for {supervisor.name}'s {job.name}, which"
                            f" shares {f'the cgroup of {unit}' if unit else 'its cgroup'}: no"
                            f" policy selects it alone ({reading.wanted})",
                        )
        for job in supervisor.jobs:
            self._note_removals(job.seen, [self._reading(one) for one in job.started])

    def nspawn(self, path: Path, machine: str, assigned: list[Assignment], *, boots: bool) -> None:
        """Propose a policy for a container of systemd-nspawn."""
        unit = f"systemd-nspawn@{machine}.service"
        if not unit_files.is_name(unit):
            return
        environment = {one.name: one for one in assigned}
        seen = [one for one in assigned if one.name in WATCHED]
        started = Started("", environment, Lines(str(path), 1, 1), in_container=True)
        reading = self._reading(started)
        self._search.understood.update(
            (one.lines.path, n) for one in seen for n in one.lines.numbers
        )
        if reading.wanted is None:
            return
        if boots:
            self._error(
                self._where(started),
                f"preloads {_names(reading)} for the container's init alone, which hands nothing"
                " on",
            )
            return
        self.add(Place("unit", unit), EVERYTHING, Given([started], [], seen))

    def doubt(self, doubts: Iterable[tuple[Lines, str]]) -> None:
        """Lines of scripts that preload under a condition."""
        for lines, value in doubts:
            if found := NAME.search(value):
                self._error(
                    lines,
                    f"names {found[0]}.so under a condition that is not evaluated: no policy is"
                    " proposed for it",
                )

    def note_clients(self, preloads: Iterable[Assignment]) -> None:
        """What is preloaded into the client of a container's engine alone."""
        self._leave_out(
            f"{one.lines}: preloads {found[0]}.so into the client alone that starts a container,"
            " and not into what runs in it"
            for one in preloads
            if (found := NAME.search(one.value))
        )

    def scan(self) -> list[str]:
        """Lines that name one of the libraries and were not understood, in every place; how many
        files were looked at of each kind."""
        search = self._search
        counts = [
            f"units of systemd, with their drop-ins and environment files: {search.units}",
            f"scripts that they start: {len(search.commands.paths)}",
        ]
        done: set[str] = set()
        for path in (*search.paths, *search.commands.paths):
            if str(path) not in done:
                done.add(str(path))
                self._scan(path, places.NOT_EVALUATED)
        for kind in places.KINDS:
            paths = [path for each in kind.patterns for path in search.files.matching(each)]
            number = 0
            for path in paths:
                if str(path) not in done and not os.path.isdir(path):
                    done.add(str(path))
                    self._scan(path, kind.why)
                    number += 1
            counts.append(f"{kind.what}, beside those: {output.count(number, 'file')}")
        counts.append(f"files that those name: {output.count(self._scan_named(done), 'file')}")
        return counts

    def not_searched(self) -> str:
        """What was not looked at, with the lines that name files nobody could find."""
        unnamed = [*self._search.commands.unnamed]
        if not unnamed:
            return NOT_SEARCHED
        shown = ", ".join(str(lines) for lines in unnamed[:LINES_SHOWN_MAX])
        more = len(unnamed) - LINES_SHOWN_MAX
        shown += f" and {more} more" if more > 0 else ""
        return f"{NOT_SEARCHED}; files whose names scripts make up as they run ({shown})"

    def _scan_named(self, done: set[str]) -> int:
        """What the files hold that others name, and those that they name in turn."""
        files = self._search.files
        real = {os.path.realpath(path) for path in done}
        number = 0
        while self._named and number < mentions.FILES_MAX:
            name = next(iter(self._named))
            why = self._named.pop(name)
            path = files.inside(name)
            if (place := os.path.realpath(path)) in real:
                continue
            real.add(place)
            if mentions.text(files, path):
                number += 1
                self._scan(path, why)
        return number

    def _scan(self, path: Path, why: str) -> None:
        text = self._search.files.text(path)
        for name in mentions.named(text):
            self._named.setdefault(name, why)
        if not NAME.search(text):
            return
        for number, line in enumerate(text.split("\n"), 1):
            found = NAME.search(line)
            if not found or mentions.is_comment(line):
                continue
            if (str(path), number) not in self._search.understood:
                self._error(Lines(str(path), number, number), f"names {found[0]}.so {why}")

    def compare(self, found: Iterator[Process]) -> None:
        """Hold what runs now against what the files say."""
        groups: dict[tuple[str, str], list[Process]] = {}
        for each in found:
            names = ", ".join(sorted({library.name for library in each.libraries}))
            groups.setdefault((_unit_of(each.cgroup), names), []).append(each)
        for (unit, names), processes in groups.items():
            first = processes[0]
            where = Lines(f"/proc/{first.pid}/maps", 1, 1)
            reading = wanted.read(first.libraries, first.environment, where)
            place = self._place_of(first.cgroup)
            pids = ", ".join(str(each.pid) for each in processes[:PIDS_SHOWN_MAX])
            more = len(processes) - PIDS_SHOWN_MAX
            pids += f" and {more} more" if more > 0 else ""
            who = f"PID {pids} ({first.command[:VALUE_SHOWN_MAX]}) in {unit}"
            expected = self._wanted.get(place) if place else None
            if expected is None:
                self.found.unclear.append(
                    f"{who}: {names}.so is preloaded, and no file that was read accounts for it"
                    f" ({reading.wanted})"
                )
            elif str(expected) != str(reading.wanted):
                self.found.left_out.append(
                    f"{who}: runs with {reading.wanted}, the files say {expected}; they were"
                    " changed after it was started, or it changes them itself"
                )

    def _place_of(self, cgroup: str) -> Place | None:
        """The narrowest place that files speak of and that a cgroup is in."""
        names = _UNIT.findall(cgroup)
        kind = "unit"
        candidates: list[Place] = []
        for name in names:
            candidates += [
                Place(kind, each) for each in ("*.service", *reversed(broader(name)), name)
                if each != "*.service" or name.endswith(".service")
            ]  # fmt: skip
            if re.fullmatch(r"user@[0-9]+\.service", name):
                kind = "user_unit"
        if cgroup.startswith("/user.slice"):
            candidates.insert(0, SESSIONS)
        known = [place for place in (EVERYTHING, *candidates) if place in self._wanted]
        return known[-1] if known else None

    def removals(self) -> list[Removal]:
        return sorted(self._remove.values(), key=lambda each: (each.file, each.line))

    def _reading(self, one: Started) -> Reading:
        libraries = self._by_name if one.in_container else self._libraries
        loaded = () if one.in_container else self._search.loaded
        preload = one.environment.get(PRELOAD)
        path = one.environment.get("LD_LIBRARY_PATH")
        values = [each.value for each in (*loaded, *([preload] if preload else []))]
        found = [
            library
            for value in values
            for library in libraries.of(value, path.value if path else "")
        ]
        where = next((each.lines for each in loaded), one.lines)
        return wanted.read(found, one.environment, where)

    def _where(self, one: Started) -> Lines:
        preload = one.environment.get(PRELOAD)
        return preload.lines if preload else one.lines

    def _error(self, lines: Lines, what: str) -> None:
        """Say once for each line what is not turned into a policy."""
        numbers = [(lines.path, n) for n in lines.numbers]
        if not any(each in self._unclear for each in numbers):
            self.found.unclear.append(f"{lines}: {what}")
        self._unclear.update(dict.fromkeys(numbers))
        self._search.understood.update(numbers)

    def _leave_out(self, said: Iterable[str]) -> None:
        self.found.left_out += [each for each in said if each not in self.found.left_out]

    def _proposal(self, place: Place, reading: Reading, started: Started) -> Proposal:
        stem, name = place.name, place.name
        if place == EVERYTHING:
            stem = "everything"
        elif name.startswith("*."):
            stem = f"{name[2:]}s"
        else:
            name = re.sub(r"-(?=@|\.[a-z]+$)", "-*", name)
        suffix = ".user" if place.kind == "user_unit" else ""  # with which no unit's name ends
        loaded = () if started.in_container else self._search.loaded
        read = [
            one for one in (*loaded, *started.environment.values()) if self._is_ours(one, [reading])
        ]
        where = ", ".join(dict.fromkeys(str(one.lines) for one in read))
        comment = f"In place of {' and '.join(reading.kinds)}: {where}"
        file = SYSTEM.drop_ins[0] / f"{stem}{suffix}.yaml"
        source = Source(str(file), 1)
        asked = reading.wanted or Wanted()
        policy = Policy(
            file.stem,
            (Selector(place.kind, name, source),),
            Rules(Options(asked.keepalive), direction=asked.direction),
            source,
            log=asked.log,
        )
        return Proposal(
            file, writer.text(policy, comment if where else "Without either", asked.options)
        )

    def _is_ours(self, one: Assignment, readings: list[Reading]) -> bool:
        """Whether an assignment is there for one of the libraries."""
        if one.name in ("", PRELOAD):
            known = {library.word for each in readings for library in each.libraries}
            return any(NAME.search(word) or word in known for word in parts(one.value))
        return any(each.owner(one.name) for each in readings)

    def _note_removals(self, seen: Iterable[Assignment], readings: list[Reading]) -> None:
        """What to remove, by file, line and variable. The broader place is first: a template's line
        as it is written, not as an instance has it."""
        for one in seen:
            if not self._is_ours(one, readings):
                continue
            what = _shown_value(str(one))
            if one.name in ("", PRELOAD):
                known = {library.word for each in readings for library in each.libraries}
                words = parts(one.value)
                ours = [word for word in words if NAME.search(word) or word in known]
                what = what if ours == words else f"{_shown_value(' and '.join(ours))} of {what}"
            where = one.lines.path, one.lines.first
            self._remove.setdefault((*where, one.name), Removal(*where, what))


def _names(reading: Reading) -> str:
    return " and ".join(dict.fromkeys(f"{library.name}.so" for library in reading.libraries))


def _shown_program(one: Started) -> str:
    return one.program.replace(UNKNOWN, "$...")[:80] or "?"


def _shown_value(text: str) -> str:
    shown = text.replace(UNKNOWN, "$...")
    return shown if len(shown) <= VALUE_SHOWN_MAX else f"{shown[:VALUE_SHOWN_MAX]}..."


def _unit_of(cgroup: str) -> str:
    """What a cgroup belongs to, as a person would look for it: the outermost unit, and of a user's
    manager the one inside."""
    found: list[str] = _UNIT.findall(cgroup)
    names = [name for name in found if not name.endswith(".slice")]
    if not names:
        return f"cgroup {cgroup}"
    if re.fullmatch(r"user@[0-9]+\.service", names[0]) and len(names) > 1:
        return f"{names[1]} of {names[0]}"
    return names[0]
