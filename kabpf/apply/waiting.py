"""What a command makes active beside policy files that wait for an apply or a reload.

A command that changes policies of its own, as attach does, touches these alone: the files that a
person or a tool writes stay active as they were applied last, however they are now. Where kabpf is
not loaded nothing is active yet, and no file waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kabpf.errors import KabpfError, PolicyError, RefusedError
from kabpf.kernel.dataplane import PINS
from kabpf.policy import files, parser
from kabpf.policy.files import Cache, Directories, Marks, Snapshot, Texts
from kabpf.policy.of_commands import RUNTIME, TRANSIENT
from kabpf.policy.parser import PolicyFile
from kabpf.runtime import last_good, notes
from kabpf.runtime.locks import RUN

Parsed = Mapping[Path, PolicyFile]

# Of a snapshot with other files than lie there: these never count as applied.
STAMP = "beside files that wait"
NONE = files.digest({})
UNKNOWN = "policy files have changed, and those that are active are not kept; try: kabpfctl apply"


class Known(NamedTuple):
    """What the files said that are active."""

    stamp: str  # of these (files.lasting)
    parsed: Parsed


class Active(NamedTuple):
    """Policies to make active, and the files that say so."""

    snapshot: Snapshot
    parsed: Parsed
    problem: PolicyError | None = None  # of files that a command which loads kabpf had to leave out


@dataclass(frozen=True)
class Standing:
    """The policy files, but for what commands write: those that lie there, and those that are
    active."""

    directories: Directories
    marks: Marks  # of those that lie there
    stamp: str | None  # of those that are active; None where kabpf is not loaded
    known: Known | None = None  # what the caller knows of those that are active

    @property
    def wait(self) -> bool:
        """Whether they differ."""
        return self.stamp not in (None, files.digest(self.marks))

    def active(self, own: Collection[Path] = ()) -> Active:
        """What is active, with what commands have written by now, and with the files `own` as they
        are now. Raises PolicyError where one of those is wrong, and RefusedError where nobody knows
        what is active."""
        problem = None
        if not self.wait:
            cache: Cache = {}
            try:
                snapshot = files.snapshot(self.directories, cache)
                if self.stamp is None or self._are_as_before(own):
                    return Active(snapshot, {path: file for path, (_, file) in cache.items()})
            except PolicyError as error:
                problem = error
        return self._composed(self._known(problem), own, problem if self.stamp is None else None)

    def _are_as_before(self, own: Collection[Path]) -> bool:
        now = files.lasting(self.directories, files.marks(self.directories))
        return _besides(now, own) == _besides(self.marks, own)

    def _known(self, problem: PolicyError | None) -> Known:
        if self.known and self.stamp in (None, self.known.stamp):
            return self.known
        with contextlib.suppress(KabpfError):
            kept = last_good.read()
            if kept and self.stamp in (None, kept.stamp):
                return Known(kept.stamp, kept.parsed())
        if self.stamp in (None, NONE):
            return Known(NONE, {})
        raise problem or RefusedError(UNKNOWN)

    def _composed(self, known: Known, own: Collection[Path], problem: PolicyError | None) -> Active:
        found = {path: file for path, file in known.parsed.items() if path not in own}
        for directory in {RUNTIME, TRANSIENT, *(path.parent for path in own)}:
            alone = Directories(directory / "none", (directory,), self.directories.hidden)
            read = files.read_all(alone, counts=lambda path: _is_commands(path, own))
            found |= {path: file for path, (_, file) in read.items()}
        parsed = {path: found[path] for path in files.strongest(found, self.directories)}
        policies = parser.combine([*parsed.values()])
        stamp, texts = known.stamp, None
        if lasting := {path for path in own if not files.is_of_command(path)}:
            now = files.lasting(self.directories, files.marks(self.directories))
            stamp = files.digest({path: now.get(path, ()) for path in lasting} | {Path(stamp): ()})
            texts = _texts(known, lasting)
        return Active(Snapshot(STAMP, policies, stamp, texts), parsed, problem)


def look(
    directories: Directories = files.SYSTEM, known: Known | None = None, *, is_loaded: bool = False
) -> Standing:
    """The policy files as they are before a command writes its own. The caller holds the lock, and
    says whether kabpf is to count as loaded though its pins are gone. Raises PolicyError where a
    directory can't be read."""
    marks = files.lasting(directories, files.marks(directories))
    stamp = _active_stamp(known) if is_loaded or PINS.exists() else None
    return Standing(directories, marks, stamp, known)


def beside(known: Known, directories: Directories) -> Standing:
    """The same where nothing is active, and what was active before is to be again."""
    marks = files.lasting(directories, files.marks(directories))
    return Standing(directories, marks, known.stamp, known)


def left_out(problem: PolicyError | None) -> tuple[str, ...]:
    """Warnings that policy files are wrong, where a command has loaded kabpf without them."""
    findings = problem.findings if problem else ()
    return tuple(f"{finding}; what was applied last is active instead" for finding in findings)


def _active_stamp(known: Known | None) -> str | None:
    if applied := notes.read_applied(RUN):
        return applied.lasting
    if known:
        return known.stamp
    with contextlib.suppress(RefusedError):
        if kept := last_good.read():
            return kept.stamp
    return None


def _is_commands(path: Path, own: Collection[Path]) -> bool:
    return path in own or files.is_of_command(path)


def _besides(marks: Marks, own: Collection[Path]) -> Marks:
    return {path: mark for path, mark in marks.items() if path not in own}


def _texts(known: Known, own: Collection[Path]) -> Texts:
    """The texts to keep: those that are active, with some files as they are now."""
    kept = last_good.read()
    stay = kept.texts if kept and kept.stamp == known.stamp else ()
    now = [(str(path), files.content(path).decode()) for path in sorted(own) if path.exists()]
    return (*(each for each in stay if Path(each[0]) not in own), *now)
