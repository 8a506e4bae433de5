"""Reads an engine's files beneath its own directory, with bounds.

Names in a path come from cgroups, and texts in the files from whoever started a container."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kabpf.kernel import syscalls

BYTES_MAX = 4 << 20  # a config.json of 1 MiB has room; the largest seen had 20 KiB


class Budget:
    """The time that a look at all containers may take in databases, which their engines lock, and
    which may be as large as they like. Without it a locked one keeps root's commands waiting once
    for each container.

    `seconds` are of a processor, for a busy machine to have the same room; `waits_s` for locks."""

    def __init__(self, seconds: float, waits_s: float) -> None:
        self._seconds, self.waits_s = seconds, waits_s
        self._deadline = 0.0  # by time.thread_time(), inside `spent`

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Time is counted inside. Raises TimeoutError where none is left."""
        if self._seconds <= 0:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        began = time.thread_time()
        self._deadline = began + self._seconds
        try:
            yield
        finally:
            self._seconds -= time.thread_time() - began

    @contextmanager
    def waiting(self) -> Iterator[float]:
        """How long to wait for a lock inside, of what is left for that."""
        began = time.monotonic()
        try:
            yield self.waits_s
        finally:
            self.waits_s = max(0.0, self.waits_s - (time.monotonic() - began))

    @property
    def is_over(self) -> bool:
        """Whether no time is left inside `spent`."""
        return time.thread_time() >= self._deadline


def opened(directory: Path, name: str) -> int:
    """A descriptor of a regular file beneath a directory. Raises OSError."""
    descriptor = _opened(directory, name)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return descriptor


def read(directory: Path, name: str) -> bytes:
    """What is in a file beneath a directory. Raises OSError, with EFBIG for more than BYTES_MAX."""
    with open(opened(directory, name), "rb") as stream:
        content = stream.read(BYTES_MAX + 1)
    if len(content) > BYTES_MAX:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return content


def read_object(directory: Path, name: str) -> dict[str, Any]:
    """The object that a JSON file has. Raises OSError, with EBADMSG for anything else."""
    return decoded(read(directory, name))


def lacks(directory: Path, name: str) -> str | None:
    """Why what is beneath a directory can't be read; "" where it can, None where it is missing."""
    try:
        os.close(_opened(directory, name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{directory / name}: {error.strerror}"
    return ""


def decoded(content: bytes) -> dict[str, Any]:
    """The object of a JSON text. Raises OSError (EBADMSG) for anything else."""
    try:
        value = json.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    return value


def inside(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The object at the end of some keys; an empty one where there is none."""
    for key in keys:
        found = value.get(key)
        if not isinstance(found, dict):
            return {}
        value = found
    return value


def text(value: Any) -> str:
    """A string that has bytes (os.fsencode()); "" for anything else."""
    if not isinstance(value, str):
        return ""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # JSON may have one half of a pair of surrogates
        return os.fsdecode(value.encode("utf-8", "surrogatepass"))
    return value


def texts(value: dict[str, Any]) -> dict[str, str]:
    """What of an object's values are strings."""
    return {text(key): text(each) for key, each in value.items() if isinstance(each, str)}


def _opened(directory: Path, name: str) -> int:
    if "\0" in f"{directory}/{name}":  # which settings and labels may have
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    top = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.open_file_beneath(top, name)
    finally:
        os.close(top)
