"""What the processes of this machine have preloaded now, containers included."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kabpf import proc
from kabpf.migration.files import Files
from kabpf.migration.libraries import (
    NAME,
    NAME_BYTES,
    PRELOAD,
    Library,
    by_name,
    kind_of,
    parts,
)
from kabpf.migration.scripts import Environment
from kabpf.systemd.unit_files import Assignment, Lines

# What is read of a process; maps has some 100 bytes a mapping, of which there are 65,530 at most
# (vm.max_map_count).
MAPS_MAX = 16 << 20
ENVIRON_MAX = 4 << 20
TEXT_MAX = 4096
LIBRARY_MAX = 1 << 20

_CHUNK = 1 << 18
_MAPPING = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ +(/[^\n]*)$", re.MULTILINE)
_ANY = re.compile(rb"/")


@dataclass(frozen=True)
class Process:
    """A process that has a preload library in its memory."""

    pid: int
    command: str
    cgroup: str
    libraries: list[Library]
    environment: Environment


@dataclass
class Processes:
    """Looks at every process below a mount of /proc."""

    proc: Path
    watched: frozenset[str]
    looked: int = 0
    refused: int = 0  # that root may not look at either

    def find(self) -> Iterator[Process]:
        try:
            pids = sorted(int(name) for name in os.listdir(self.proc) if name.isdecimal())
        except OSError:
            return
        for pid in pids:
            try:
                environ = proc.read(f"{self.proc}/{pid}/environ", ENVIRON_MAX)
                others = b"LD_PRELOAD=" in environ
                maps = self._maps(pid, NAME_BYTES if not others else _ANY)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            except OSError:
                self.refused += 1
                continue
            self.looked += 1
            named = {path for path in maps if NAME_BYTES.search(path.rpartition(b"/")[2])}
            if not named and not others:
                continue
            environment = self._environment(pid, environ)
            libraries = [*self._libraries(pid, named, environment, maps)]
            if libraries:
                yield Process(pid, self._command(pid), self._cgroup(pid), libraries, environment)

    def _maps(self, pid: int, wanted: re.Pattern[bytes]) -> set[bytes]:
        """The files of a process's memory, where one of them is wanted."""
        found: set[bytes] = set()
        rest = b""
        left = MAPS_MAX
        with open(self.proc / str(pid) / "maps", "rb", buffering=0) as file:
            while left > 0 and (chunk := file.read(_CHUNK)):
                left -= len(chunk)
                whole, _, rest = (rest + chunk).rpartition(b"\n")
                if wanted.search(whole):
                    found.update(match[1] for match in _MAPPING.finditer(whole))
        return found

    def _environment(self, pid: int, environ: bytes) -> dict[str, Assignment]:
        lines = Lines(f"/proc/{pid}/environ", 1, 1)
        found: dict[str, Assignment] = {}
        for word in environ.split(b"\0"):
            name, equals, value = word.partition(b"=")
            if equals and (text := os.fsdecode(name)) in self.watched:
                found.setdefault(text, Assignment(text, os.fsdecode(value), lines))
        return found

    def _libraries(
        self, pid: int, named: set[bytes], environment: Environment, maps: set[bytes]
    ) -> Iterator[Library]:
        files = Files(self.proc)
        seen: set[str] = set()
        for path in sorted(named):
            text = os.fsdecode(path).removesuffix(" (deleted)")
            name = NAME.search(text.rpartition("/")[2])
            assert name is not None
            if name[0] not in seen:
                seen.add(name[0])
                kind = kind_of(files.head(self._inside(pid, text), LIBRARY_MAX))
                yield Library(text, name[0], kind or by_name(name[0]))
        for word in parts(environment[PRELOAD].value) if PRELOAD in environment else ():
            # Under another name.
            is_mapped = word.startswith("/") and os.fsencode(word) in maps
            if is_mapped and not NAME.search(word):
                kind = kind_of(files.head(self._inside(pid, word), LIBRARY_MAX))
                if kind:
                    yield Library(word, Path(word).name.partition(".so")[0], kind)

    def _inside(self, pid: int, path: str) -> Path:
        return self.proc / str(pid) / "root" / os.path.normpath(path).lstrip("/")

    def _command(self, pid: int) -> str:
        try:
            words = proc.read(f"{self.proc}/{pid}/cmdline", TEXT_MAX).rstrip(b"\0")
            return os.fsdecode(words.replace(b"\0", b" ")) or "?"
        except OSError:
            return "?"

    def _cgroup(self, pid: int) -> str:
        try:
            paths = proc.cgroup_paths(pid, str(self.proc))
        except OSError:
            return "?"
        path = paths.get(b"", b"?")
        return os.fsdecode(path if len(path) > 1 else paths.get(b"name=systemd", path))
