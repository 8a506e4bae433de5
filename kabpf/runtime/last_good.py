"""The policies that were applied last, kept in /var/lib/kabpf for a boot with a wrong policy file.

`last-good.json` has two lines of JSON: what is known of the other one, and the texts of the policy
files in the order they were read, of which the parser makes the same policies again. What commands
write into /run is not kept: it ends with the boot, and so do the ids of cgroups.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kabpf.digests import blake2b
from kabpf.errors import PolicyError, RefusedError
from kabpf.faults import fault_point
from kabpf.policy import files
from kabpf.policy.files import ENDING, Directories, Snapshot, Texts

if TYPE_CHECKING:
    from kabpf.policy.parser import PolicyFile

STATE = Path("/var/lib/kabpf")
NAME = "last-good.json"
VERSION = 1
# Of a snapshot of kept policies: no policy files have it, so that they never count as applied.
STAMP = "last good"


class Kept(NamedTuple):
    """Policy files as they were when they were applied."""

    applied_at: float  # seconds since the epoch
    stamp: str  # of the files, by `files.lasting`
    texts: Texts

    def parsed(self) -> dict[Path, PolicyFile]:
        """What they say; of those in /run, which may be another boot's, of what lies there still.
        Raises PolicyError where this version of kabpf refuses them."""
        from kabpf.policy import parser  # here, because few commands need it

        return {
            path: parser.parse(text.encode(), str(path))
            for path, text in ((Path(name), text) for name, text in self.texts)
            if path.parent not in ENDING or path.exists()
        }

    def snapshot(self) -> Snapshot:
        """Their policies. Raises PolicyError as `parsed`."""
        from kabpf.policy import parser  # as above

        return Snapshot(STAMP, parser.combine([*self.parsed().values()]), self.stamp)


def keep(snapshot: Snapshot, directories: Directories = files.SYSTEM, state: Path = STATE) -> None:
    """Keep the files of which a snapshot was made, which is active now; only where they differ from
    what is kept. The caller holds the lock. What can't be kept `read` does not find."""
    with contextlib.suppress(OSError, RefusedError, PolicyError, UnicodeDecodeError):
        if _kept_stamp(state) == snapshot.lasting:
            return
        texts = snapshot.texts
        if texts is None:
            marks = files.lasting(directories, files.marks(directories))
            changed = files.digest(marks) != snapshot.lasting
            texts = None if changed else files.texts(marks)
        if texts is None:
            return
        _write(state, Kept(time.time(), snapshot.lasting, texts))


def forget(removed: Collection[Path], state: Path = STATE) -> None:
    """Keep these files no more, which a command has removed. The caller holds the lock."""
    names = {str(path) for path in removed}
    with contextlib.suppress(OSError, RefusedError):
        kept = read(state)
        if kept and names & {path for path, _ in kept.texts}:
            texts = tuple(each for each in kept.texts if each[0] not in names)
            _write(state, kept._replace(stamp="", texts=texts))


def read(state: Path = STATE) -> Kept | None:
    """What is kept, or None where nothing is. Raises RefusedError where it is of no use."""
    raw = _read(state)
    if raw is None:
        return None
    first, _, rest = raw.partition(b"\n")
    try:
        head = json.loads(first)
        if head["version"] != VERSION:
            raise RefusedError(f"{state / NAME}: of another version of kabpf", hint=_AGAIN)
        if head["digest"] != _digest(rest):
            raise ValueError
        texts = tuple((str(path), str(text)) for path, text in json.loads(rest))
        return Kept(float(head["applied_at"]), str(head["stamp"]), texts)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RefusedError(f"{state / NAME}: damaged", hint=_AGAIN) from None


def time_text(seconds: float) -> str:
    """A time as messages have it: here and now."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


_AGAIN = "try: kabpfctl apply"


def _kept_stamp(state: Path) -> str:
    """The stamp of what is kept, if that is whole; without working out what it says."""
    with contextlib.suppress(RefusedError, ValueError, TypeError, KeyError, RecursionError):
        first, _, rest = (_read(state) or b"{}").partition(b"\n")
        head = json.loads(first)
        if head["version"] == VERSION and head["digest"] == _digest(rest):
            return str(head["stamp"])
    return ""


def _read(state: Path) -> bytes | None:
    try:
        with _opened(state) as directory:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(NAME, flags, dir_fd=directory), "rb") as stream:
                _require_roots(state / NAME, os.fstat(stream.fileno()), stat.S_ISREG)
                return stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RefusedError(f"read {state / NAME}", error.errno or 0) from None


@contextlib.contextmanager
def _opened(state: Path) -> Any:
    descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _require_roots(state, os.fstat(descriptor), stat.S_ISDIR)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_roots(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid != 0 or others or not is_kind(status.st_mode):
        mode = stat.S_IMODE(status.st_mode)
        raise RefusedError(
            f"{path}: uid {status.st_uid}, mode {mode:04o}",
            hint="root alone must be able to write it",
        )


def _write(state: Path, kept: Kept) -> None:
    """The old file or the new one is there whole, whenever the machine stops."""
    body = json.dumps(kept.texts).encode()
    head = {
        "version": VERSION,
        "applied_at": kept.applied_at,
        "stamp": kept.stamp,
        "digest": _digest(body),
    }
    if not state.exists():
        state.mkdir(mode=0o700)
        _sync(state.parent)
    fresh = f".{NAME}"
    with _opened(state) as directory:
        fault_point("write the last good policies")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o600, dir_fd=directory), "wb") as stream:
            stream.write(json.dumps(head).encode() + b"\n" + body)
            stream.flush()
            os.fsync(stream.fileno())
        fault_point("rename the last good policies")
        os.rename(fresh, NAME, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: bytes) -> str:
    return blake2b(body, digest_size=16).hexdigest()
