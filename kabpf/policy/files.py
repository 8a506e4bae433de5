"""Where policy files are, which of them count, who may own them, and reading them all.

Every reader judges them as kabpf.service does: what the service can't see is wrong for all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kabpf import proc, root_files
from kabpf.digests import blake2b
from kabpf.errors import PolicyError, collected
from kabpf.policy.of_commands import RUNTIME, TRANSIENT

if TYPE_CHECKING:
    from kabpf.policy.model import Policy
    from kabpf.policy.parser import PolicyFile

FILE_SIZE_MAX = 64 * 1024
# Files of commands, which come and go beside every reader.
ENDING = (RUNTIME, TRANSIENT)
# How their names begin in RUNTIME. What a person attaches by hand is read last, so that it wins
# over a file that names the same path.
ATTACHED, OF_USER = "zz-attach-", "user-"
LINKS_MAX = 40  # that the kernel follows (MAXSYMLINKS)


class Directories(NamedTuple):
    """Where policy files are: one main file, and drop-in directories with the strongest first; and
    the trees that kabpf.service does not see, where no link may lead."""

    main: Path
    drop_ins: tuple[Path, ...]
    hidden: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """Every directory in which a policy file may be."""
        return tuple(dict.fromkeys((self.main.parent, *self.drop_ins)))


SYSTEM = Directories(
    Path("/etc/kabpf/policy.yaml"),
    (
        Path("/etc/kabpf/policy.d"),
        RUNTIME,
        TRANSIENT,
        Path("/usr/local/lib/kabpf/policy.d"),
        Path("/usr/lib/kabpf/policy.d"),
    ),
    ("/home", "/root", "/run/user", "/tmp", "/var/tmp"),  # by ProtectHome= and PrivateTmp=
)


class _RemovedError(Exception):
    """A file was removed after its directory was listed."""


Marks = dict[Path, tuple[int, ...]]
Cache: TypeAlias = "dict[Path, tuple[tuple[int, ...], PolicyFile]]"
Texts = tuple[tuple[str, str], ...]  # path and text of each file


class Snapshot(NamedTuple):
    """Policies, and the stamps of their files, which were taken before these were read: one that
    changes meanwhile makes another stamp."""

    stamp: str
    policies: tuple[Policy, ...]
    lasting: str = ""  # of the lasting files alone
    texts: Texts | None = None  # of the lasting files, where they are not as they lie there


def snapshot(
    directories: Directories, cache: Cache | None = None, taken: Marks | None = None
) -> Snapshot:
    """What `load` reads, and the stamps that were taken before. Raises PolicyError."""
    taken = marks(directories) if taken is None else taken
    policies = load(directories, cache)
    return Snapshot(digest(taken), policies, digest(lasting(directories, taken)))


def load(directories: Directories, cache: Cache | None = None) -> tuple[Policy, ...]:
    """Read every policy file of `directories`; of files in `cache` that did not change, nothing.

    The files and their directories have to belong to root and be writable by root alone, the
    directories unless they are read-only mounts of their own. One that is removed meanwhile, as
    commands remove theirs at any time, was never there. Drop-ins of users, which are root's alone,
    count for nobody else. Raises PolicyError with one finding for each bad file.
    """
    from kabpf.policy import parser  # here, because the stamp does without

    read_now = read_all(directories, cache)
    try:
        policies = parser.combine([file for _, file in read_now.values()])
    except PolicyError as error:  # of several files together: the last change has made it wrong
        raise PolicyError(*error.findings, since=max(map(_changed_at, read_now))) from None
    if cache is not None:
        cache.clear()
        cache.update(read_now)
    return policies


def read_all(
    directories: Directories,
    cache: Cache | None = None,
    counts: Callable[[Path], bool] = lambda _: True,
) -> Cache:
    """What `load` reads before it makes policies of it; only of the files that count."""
    read_now: Cache = {}
    findings: list[str] = []
    wrong: list[Path] = []
    for directory in directories.all:
        # Before any of its files counts: one that masks another is never opened.
        with _collected_of(directory, findings, wrong):
            _check_directory(directory, directories.hidden)
    for path in filter(counts, _strongest(directories)):
        status = _status(path)
        # A mask; and a user's drop-in, which is closed to other users.
        if _is_null(status) or (is_of_user(path) and os.geteuid() != 0):
            continue
        try:
            with _collected_of(path, findings, wrong):
                read_now[path] = _read_unless_cached(path, status, cache or {}, directories.hidden)
        except _RemovedError:
            if path.parent not in ENDING:  # where a weaker one of its name may count now
                return read_all(directories, cache, counts)
    if findings:
        raise PolicyError(*findings, since=min(map(_changed_at, wrong)))
    return read_now


def stamp(directories: Directories) -> str:
    """Another text whenever a policy file was added, removed, written or given to somebody else."""
    return digest(marks(directories))


def marks(directories: Directories) -> Marks:
    """What a change of a policy file, or of a directory of theirs, changes."""
    parents = (directories.main.parent, *directories.drop_ins)
    return {path: _stamp(_status(path)) for path in (*parents, *_strongest(directories))}


def lasting(directories: Directories, taken: Marks) -> Marks:
    """Of these marks, those of the files that persons and their tools write, and that wait for an
    apply or a reload where they have changed; in the order they are read."""
    besides = {*directories.all}
    return {
        path: mark
        for path, mark in taken.items()
        if not is_of_command(path) and path not in besides
    }


def digest(marks: Marks, besides: Collection[Path] = ()) -> str:
    """The stamp of files with these marks: of those of users apart, behind a hyphen."""
    of_all, of_users = (blake2b(digest_size=16) for _ in range(2))
    for path, mark in marks.items():
        if path not in besides:
            digest = of_users if is_of_user(path) or str(path) == str(RUNTIME) else of_all
            digest.update(repr((str(path), mark)).encode())
    return f"{of_all.hexdigest()}-{of_users.hexdigest()}"


def differ_by_users_alone(one: str, other: str) -> bool:
    """Whether two stamps differ in nothing but drop-ins of users, if at all."""
    return one.partition("-")[0] == other.partition("-")[0]


def is_of_user(path: Path) -> bool:
    """Whether a file is a drop-in that a user's request wrote."""
    directory, name = _parted(path)
    return directory == str(RUNTIME) and name.startswith(OF_USER)


def is_of_command(path: Path) -> bool:
    """Whether a file is a drop-in that a command wrote and made active at once."""
    directory, name = _parted(path)
    return directory == str(TRANSIENT) or (
        directory == str(RUNTIME) and name.startswith((ATTACHED, OF_USER))
    )


def _parted(path: Path) -> tuple[str, str]:
    """Directory and name as texts: each of thousands of files is asked about several times."""
    directory, _, name = str(path).rpartition("/")
    return directory, name


def strongest(found: Collection[Path], directories: Directories) -> list[Path]:
    """Those of these files that no stronger one of the same name hides, in the order they are
    read."""
    ranks = {str(directory): rank for rank, directory in enumerate(directories.drop_ins)}
    drop_ins = [(*_parted(path), path) for path in found]
    drop_ins.sort(key=lambda each: -ranks.get(each[0], len(ranks)))
    main = directories.main
    by_name = {name: path for _, name, path in drop_ins if path != main}
    return [main] * (main in found) + [by_name[name] for name in sorted(by_name)]


def paths(directories: Directories) -> list[Path]:
    """The files that count, in the order they are read: systemd's rules for configuration
    directories (systemd.unit(5)), where an empty file or a link to /dev/null masks a weaker one."""
    return [path for path in _strongest(directories) if not is_mask(path)]


def unwatched(directories: Directories) -> list[str]:
    """A line for each file that is a link out of these directories: a change of its target in place
    is seen by nobody, as kabpf-reload.path looks at the directories."""
    watched = [os.path.realpath(directory) for directory in directories.all]
    targets = {path: Path(os.path.realpath(path)) for path in paths(directories)}
    return [
        f"{path}: is a link to {target}, whose changes kabpf-reload.path does not see;"
        " after each try: systemctl reload kabpf"
        for path, target in targets.items()
        if path.is_symlink() and not any(target.is_relative_to(each) for each in watched)
    ]


def has_policy_name(name: str) -> bool:
    """Whether a file of a drop-in directory is taken for a policy file."""
    return name.endswith(".yaml") and not name.startswith(".")


def is_mask(path: Path) -> bool:
    """Whether a file says nothing but that weaker ones of its name do not count."""
    status = _status(path)
    return _is_null(status) or _is_empty(status)


def _strongest(directories: Directories) -> list[Path]:
    found = [
        directory / name
        for directory in directories.drop_ins
        for name in _names(directory)
        if has_policy_name(name)
    ]
    if os.path.lexists(directories.main):
        found.append(directories.main)
    return strongest(found, directories)


def read(path: Path) -> PolicyFile:
    """Read one file, whoever owns it. Raises PolicyError, which shows no more of a file outside of
    the policy directories than what makes it a policy file: root may have been given any path."""
    from kabpf.policy.parser import parse  # as above

    return parse(content(path), str(path), is_policy=path.absolute().parent in SYSTEM.all)


def content(path: Path) -> bytes:
    """The text of one file, whoever owns it. Raises PolicyError."""
    try:
        with _opened(path) as descriptor:
            return _content(path, descriptor)
    except _RemovedError:
        raise _unreadable(path, FileNotFoundError(errno.ENOENT, "")) from None


def texts(marks: Marks) -> Texts | None:
    """What these files say, and nothing of a mask; None where one is not as it was marked. Raises
    OSError, PolicyError, and UnicodeDecodeError."""
    found = []
    for path, mark in marks.items():
        descriptor = os.open(path, root_files.FLAGS & ~os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if _stamp(status) != mark:
                return None
            content = b"" if _is_null(status) else _content(path, descriptor)
        finally:
            os.close(descriptor)
        found.append((str(path), content.decode()))
    return tuple(found)


def require_visible(path: Path, hidden: Collection[str]) -> None:
    """Raise PolicyError where a path leads through a tree that kabpf.service does not see."""
    for place in _places(str(path)):
        for tree in hidden:
            if place == tree or place.startswith(f"{tree}/"):
                raise PolicyError(
                    f"{path}: leads to {place}, which kabpf.service can't see, expected a file"
                    f" outside of {', '.join(hidden)}"
                )


def _places(path: str) -> Iterator[str]:
    """What opening a path comes by that links lead to: also what is missing, as it is for the
    service below trees that it does not see."""
    pending, here, links = path.split("/")[::-1], "", 0
    while pending and links <= LINKS_MAX:
        part = pending.pop()
        if part == "..":
            here = here.rpartition("/")[0]
        if part in ("", ".", ".."):
            continue
        here = f"{here}/{part}"
        if links:
            yield here
        try:
            target = os.readlink(here)
        except OSError:
            continue
        links += 1
        pending += target.split("/")[::-1]
        here = "" if target.startswith("/") else here.rpartition("/")[0]


@contextlib.contextmanager
def _collected_of(path: Path, findings: list[str], wrong: list[Path]) -> Iterator[None]:
    before = len(findings)
    with collected(findings):
        yield
    if len(findings) > before:
        wrong.append(path)


def _changed_at(path: Path) -> float:
    """When a file, or a link to it, was changed last."""
    found = (_status(path), _status(path, follow_symlinks=False))
    return max((status.st_ctime for status in found if status), default=time.time())


def _read_unless_cached(
    path: Path, status: os.stat_result | None, cache: Cache, hidden: Collection[str]
) -> tuple[tuple[int, ...], PolicyFile]:
    from kabpf.policy.parser import parse  # as above

    if path.is_symlink():
        require_visible(path, hidden)
    if status and path in cache and cache[path][0] == _stamp(status):
        _check_owner(path, status)
        return cache[path]
    with _opened(path) as descriptor:
        status = os.fstat(descriptor)
        _check_owner(path, status)
        return _stamp(status), parse(_content(path, descriptor), str(path))


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
            self.descriptor = os.open(self.path, root_files.FLAGS & ~os.O_NOFOLLOW)
        except OSError as error:
            # Another one may be there by now; but a link that leads nowhere was not removed, nor a
            # device that says so of itself (ptmx without a devpts beside it).
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and not self.path.is_symlink():
                there = _status(self.path)
                if there is None or stat.S_ISREG(there.st_mode):
                    raise _RemovedError from None
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
    return [directory / name for name in _names(directory)]


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from None


def _is_null(status: os.stat_result | None) -> bool:
    return bool(status and stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3))


def _is_empty(status: os.stat_result | None) -> bool:
    return bool(status and stat.S_ISREG(status.st_mode) and status.st_size == 0)


def _status(path: Path, *, follow_symlinks: bool = True) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow_symlinks)
    except OSError:
        return None  # said with its reason when the file is opened


def _check_directory(directory: Path, hidden: Collection[str]) -> None:
    require_visible(directory, hidden)
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
    mounts = proc.read("/proc/self/mountinfo", proc.MOUNTINFO_MAX).split(b"\n")
    return any(line.split(b" ")[4:5] == [os.fsencode(directory)] for line in mounts)  # proc(5)


def _check_owner(path: Path, status: os.stat_result, *, read_only: bool = False) -> None:
    if status.st_uid != 0:
        raise PolicyError(f"{path}: owned by uid {status.st_uid}, expected root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not read_only:
        mode = stat.S_IMODE(status.st_mode)
        raise PolicyError(f"{path}: mode {mode:04o}, expected one that root alone can write")
