"""Where policy files are, which of them count, who may own them, and reading them all."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import NamedTuple

from kabpf.errors import PolicyError, collected
from kabpf.policy.model import Policy
from kabpf.policy.parser import RUNTIME, TRANSIENT, PolicyFile, combine, parse

FILE_SIZE_MAX = 64 * 1024


@dataclass(frozen=True)
class Directories:
    """Where policy files are: one main file, and drop-in directories with the strongest first."""

    main: Path
    drop_ins: tuple[Path, ...]


SYSTEM = Directories(
    Path("/etc/kabpf/policy.yaml"),
    (
        Path("/etc/kabpf/policy.d"),
        RUNTIME,
        TRANSIENT,
        Path("/usr/local/lib/kabpf/policy.d"),
        Path("/usr/lib/kabpf/policy.d"),
    ),
)

Cache = dict[Path, tuple[tuple[int, ...], PolicyFile]]


class Snapshot(NamedTuple):
    """Policies, and the stamp of their files, which was taken before these were read: one that
    changes meanwhile makes another stamp."""

    stamp: str
    policies: tuple[Policy, ...]


def snapshot(directories: Directories, cache: Cache | None = None) -> Snapshot:
    """What `load` reads, and the `stamp` that was taken before. Raises PolicyError."""
    taken = stamp(directories)
    return Snapshot(taken, load(directories, cache))


def load(directories: Directories, cache: Cache | None = None) -> tuple[Policy, ...]:
    """Read every policy file of `directories`; of files in `cache` that did not change, nothing.

    The files and their directories have to belong to root and be writable by root alone, the
    directories unless they are read-only mounts of their own. Raises PolicyError with one finding
    for each bad file.
    """
    read_now: Cache = {}
    findings: list[str] = []
    for directory in dict.fromkeys((directories.main.parent, *directories.drop_ins)):
        # Before any of its files counts: one that masks another is never opened.
        with collected(findings):
            _check_directory(directory)
    for path in filterfalse(_is_null, _strongest(directories)):
        with collected(findings):
            read_now[path] = _read_unless_cached(path, cache or {})
    if findings:
        raise PolicyError(*findings)
    policies = combine([file for _, file in read_now.values()])
    if cache is not None:
        cache.clear()
        cache.update(read_now)
    return policies


def stamp(directories: Directories, besides: Collection[Path] = ()) -> str:
    """Another text whenever a policy file was added, removed, written or given to somebody else;
    one of `besides` may be."""
    digest = hashlib.blake2b(digest_size=16)
    parents = (directories.main.parent, *directories.drop_ins)
    for path in (*parents, *_strongest(directories)):
        if path not in besides:
            digest.update(repr((str(path), _stamp(_status(path)))).encode())
    return digest.hexdigest()


def paths(directories: Directories) -> list[Path]:
    """The files that count, in the order they are read: systemd's rules for configuration
    directories (systemd.unit(5)), where an empty file or a link to /dev/null masks a weaker one."""
    return [path for path in _strongest(directories) if not is_mask(path)]


def has_policy_name(path: Path) -> bool:
    """Whether a file of a drop-in directory is taken for a policy file."""
    return path.suffix == ".yaml" and not path.name.startswith(".")


def is_mask(path: Path) -> bool:
    """Whether a file says nothing but that weaker ones of its name do not count."""
    return _is_null(path) or _is_empty(path)


def _strongest(directories: Directories) -> list[Path]:
    by_name: dict[str, Path] = {}
    for directory in reversed(directories.drop_ins):
        for path in entries(directory):
            if has_policy_name(path):
                by_name[path.name] = path
    drop_ins = [by_name[name] for name in sorted(by_name)]
    main = [directories.main] if os.path.lexists(directories.main) else []
    return main + drop_ins


def read(path: Path) -> PolicyFile:
    """Read one file, whoever owns it. Raises PolicyError."""
    with _opened(path) as descriptor:
        return parse(_content(path, descriptor), str(path))


def _read_unless_cached(path: Path, cache: Cache) -> tuple[tuple[int, ...], PolicyFile]:
    with _opened(path) as descriptor:
        status = os.fstat(descriptor)
        _check_owner(path, status)
        stamp = _stamp(status)
        if path in cache and cache[path][0] == stamp:
            return cache[path]
        return stamp, parse(_content(path, descriptor), str(path))


def _stamp(status: os.stat_result | None) -> tuple[int, ...]:
    if status is None:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


class _opened:
    """A regular file's descriptor; a FIFO does not block and is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise PolicyError(f"{self.path}: not a regular file, expected a policy file")
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _content(path: Path, descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > FILE_SIZE_MAX:
        raise PolicyError(f"{path}: {size} bytes, expected at most {FILE_SIZE_MAX}")
    try:
        return os.read(descriptor, FILE_SIZE_MAX)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> PolicyError:
    return PolicyError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}")


def entries(directory: Path) -> list[Path]:
    """What a directory holds; nothing where it is missing. Raises PolicyError where it can't be
    read."""
    try:
        return [directory / name for name in os.listdir(directory)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from None


def _is_null(path: Path) -> bool:
    status = _status(path)
    return bool(status and stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3))


def _is_empty(path: Path) -> bool:
    status = _status(path)
    return bool(status and stat.S_ISREG(status.st_mode) and status.st_size == 0)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None  # said with its reason when the file is opened


def _check_directory(directory: Path) -> None:
    try:
        _check_owner(directory, os.stat(directory), read_only=_is_read_only(directory))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(directory, error) from None


def _is_read_only(directory: Path) -> bool:
    """Whether it is a mount of its own, and read-only: as where Kubernetes mounts a ConfigMap,
    whose directory has mode 0777. In a unit with ProtectSystem= all of /etc is read-only."""
    if not os.statvfs(directory).f_flag & os.ST_RDONLY:
        return False
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return any(line.split(" ")[4:5] == [str(directory)] for line in mounts)  # proc(5)


def _check_owner(path: Path, status: os.stat_result, *, read_only: bool = False) -> None:
    if status.st_uid != 0:
        raise PolicyError(f"{path}: owned by uid {status.st_uid}, expected root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not read_only:
        mode = stat.S_IMODE(status.st_mode)
        raise PolicyError(f"{path}: mode {mode:04o}, expected to be writable by root alone")
