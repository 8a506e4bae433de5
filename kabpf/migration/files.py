"""The files that `import` reads. Each may be a stranger's, so what it is and how much is read of it
is bounded, and what was not read is noted with its reason."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

BYTES_MAX = 1 << 20  # of a file
KEPT_MAX = 1 << 16  # of a file that is not read again for who else asks for it
TOTAL_MAX = 24 << 20  # of all files
MATCHED_BYTES_MAX = 1 << 20  # of the files of a pattern that stands in a file
MATCHES_MAX = 1000  # files of a pattern
ENTRIES_MAX = 20_000  # names that a pattern looks at
SECONDS_MAX = 20
STEPS_MAX = 400_000  # of scripts, all together
NOTES_MAX = 1000

_MISSING = (errno.ENOENT, errno.ENOTDIR)
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Files:
    """Reads files below `root`; what is missing is empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unread: dict[str, str] = {}  # paths, with the reason
        self._texts: dict[str, str] = {}
        self._left = TOTAL_MAX
        self._steps = STEPS_MAX
        self._deadline = time.monotonic() + SECONDS_MAX
        self._proc = _device("/proc")

    def inside(self, path: str) -> Path:
        """Where an absolute path is below the root; `..` does not lead out of it."""
        return self.root / os.path.normpath(f"/{path}").lstrip("/")

    def name(self, path: Path) -> str:
        """The absolute path of a file as its own machine has it."""
        return f"/{path.relative_to(self.root)}"

    def resolved(self, path: str) -> str:
        """An absolute path without symbolic links, as realpath(3) has it; one that leads out of the
        root stays as it is."""
        try:
            real = os.path.realpath(self.inside(path))
            root = os.path.realpath(self.root)
        except ValueError:  # a NUL in it
            return path
        inside = os.path.relpath(real, root)
        return path if inside.startswith("..") else os.path.normpath(f"/{inside}")

    def text(self, path: Path) -> str:
        """What a file holds; bytes that are no UTF-8 are os.fsdecode()'s, NULs are left out."""
        name = str(path)
        if name in self._texts:
            return self._texts[name]
        text = os.fsdecode(self._bytes(path)).replace("\0", "")
        if len(text) <= KEPT_MAX:
            self._texts[name] = text
        return text

    def some(self, pattern: str) -> list[Path]:
        """The files that a pattern names in a file that is read, up to a size of all together."""
        found: list[Path] = []
        left = MATCHED_BYTES_MAX
        for path in self.matching(pattern):
            left -= _size(path)
            if left < 0 and found:
                self.refuse(path, f"{MATCHED_BYTES_MAX} bytes of {pattern} were read before")
            else:
                found.append(path)
        return found

    def script(self, path: Path) -> str:
        """The text of a program that an interpreter reads; of any other nothing."""
        if str(path) in self._texts:
            return self._texts[str(path)]
        return self.text(path) if self.head(path, 2) == b"#!" else ""

    def head(self, path: Path, size: int) -> bytes:
        """The first bytes of a file, however long it is."""
        with self._opened(path) as descriptor:
            return b"" if descriptor is None else _read(descriptor, size)
        return b""

    def matching(self, pattern: str) -> list[Path]:
        """The files that an absolute pattern names, as glob(7) has it, in order."""
        found = [self.root]
        looked = 0
        for part in filter(None, pattern.split("/")):
            if not any(letter in part for letter in "*?["):
                found = [path / part for path in found]
                continue
            next_: list[Path] = []
            for path in found:
                names = self._names(path)
                looked += len(names)
                if looked > ENTRIES_MAX:
                    self.refuse(path, f"more than {ENTRIES_MAX} names for {pattern}")
                    break
                next_ += [path / name for name in sorted(names) if _fits(name, part)]
            found = next_
        if len(found) > MATCHES_MAX:
            self.refuse(self.root / pattern.lstrip("/"), f"more than {MATCHES_MAX} files")
        return [path for path in found[:MATCHES_MAX] if os.path.lexists(path)]

    def refuse(self, path: Path, reason: str) -> None:
        """Note that something was not read."""
        if len(self.unread) < NOTES_MAX:
            self.unread.setdefault(str(path), reason)

    def spend(self, steps: int) -> bool:
        """Whether as many steps of following scripts are left."""
        self._steps -= steps
        return self._steps >= 0

    def _names(self, directory: Path) -> list[str]:
        try:
            return os.listdir(directory)
        except OSError as error:
            if error.errno not in _MISSING:
                self.refuse(directory, os.strerror(error.errno or 0))
            return []

    def _bytes(self, path: Path) -> bytes:
        with self._opened(path) as descriptor:
            if descriptor is None:
                return b""
            size = os.fstat(descriptor).st_size
            if size > BYTES_MAX:
                self.refuse(path, f"{size} bytes, expected at most {BYTES_MAX}")
            elif self._left <= 0:
                self.refuse(path, f"{TOTAL_MAX} bytes of other files were read before")
            elif time.monotonic() > self._deadline:
                self.refuse(path, f"other files took {SECONDS_MAX} s")
            else:
                data = _read(descriptor, BYTES_MAX)
                self._left -= len(data)
                return data
        return b""

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int | None]:
        """A descriptor of a regular file. It is known to be one before it is opened: to open a
        device may do something, and to open a FIFO waits."""
        descriptors: list[int] = []
        try:
            descriptors.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
            if self._is_readable(path, os.fstat(descriptors[0])):
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
                descriptors.append(os.open(f"/proc/self/fd/{descriptors[0]}", flags))
            yield descriptors[1] if len(descriptors) == 2 else None
        except OSError as error:
            if error.errno not in _MISSING:
                self.refuse(path, os.strerror(error.errno or 0))
            if len(descriptors) < 2:
                yield None
        except ValueError:  # a NUL in its name
            yield None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _is_readable(self, path: Path, status: os.stat_result) -> bool:
        if stat.S_ISREG(status.st_mode):
            # Some of the kernel's lose what is read, such as kmsg.
            if status.st_dev == self._proc:
                self.refuse(path, "a file of /proc")
                return False
            return status.st_size > 0
        is_null = stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)
        kind = next((what for test, what in _KINDS if test(status.st_mode)), "")
        if kind and not is_null:
            self.refuse(path, f"{kind}, expected a file")
        return False


def absolute(name: str, directory: str) -> str:
    """A path as a process in that directory means it."""
    return name if name.startswith("/") else f"{directory}/{name}"


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1
