"""Reads and replaces small files that root alone may write, with bounds and modes of their own.

Another may have put a FIFO, a device or a huge file there where root's umask let them, and what one
command writes others must not be able to change, whatever the umask says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

# Opening waits for nobody, follows no link, and takes no terminal.
FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC


def read(file: Path, size: int) -> bytes:
    """What a regular file holds that this user or root owns and nobody else may write.

    Raises OSError: EINVAL for another kind of file, EPERM for one that others may have written,
    EFBIG for more than `size` bytes.
    """
    descriptor = os.open(file, FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _error(errno.EINVAL)
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others or status.st_uid not in (0, os.geteuid()):
            raise _error(errno.EPERM)
        with open(descriptor, "rb", closefd=False) as stream:
            content = stream.read(min(status.st_size, size) + 1)
    finally:
        os.close(descriptor)
    if len(content) > size:
        raise _error(errno.EFBIG)
    return content


def beginning(file: Path, size: int) -> bytes:
    """The first `size` bytes of a regular file, whoever may write it, or of the one that it is a
    link to. Raises OSError: EINVAL for another kind of file."""
    descriptor = os.open(file, FLAGS & ~os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _error(errno.EINVAL)
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(size)
    finally:
        os.close(descriptor)


def replace(file: Path, content: bytes, *, mode: int, sync: bool = False) -> None:
    """Put another file in the place of one, with this mode whatever the umask says. Its directory
    is made where it is missing. Raises OSError."""
    _write(file, content, mode, sync, os.rename)


def create(file: Path, content: bytes, *, mode: int) -> None:
    """Make a file as `replace` does, all of it at once and never in the place of another one.
    Raises OSError: FileExistsError where there is one."""
    _write(file, content, mode, True, os.link)


def _write(
    file: Path, content: bytes, mode: int, sync: bool, put: Callable[[Path, Path], None]
) -> None:
    if not file.name:  # as of "/" and "."
        raise _error(errno.EISDIR)
    make_directory(file.parent)
    fresh = file.with_name(f".{file.name}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)  # an interrupted command's, or somebody else's, who would keep it open
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o600), "wb") as stream:
            stream.write(content)
            os.fchmod(stream.fileno(), mode)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        put(fresh, file)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(fresh)  # gone, if it was renamed


def make_directory(directory: Path) -> None:
    """Make a directory, and those above, that others may read and nobody else may write. Raises
    OSError."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o755)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
