"""The standard streams of kabpfctl and kabpfd: whatever becomes of what they write is said once."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any

from kabpf.errors import RefusedError


def prepare() -> None:
    """Have print() raise RefusedError, once, where standard output can't be written to, and
    BrokenPipeError where nobody reads it any more. What standard error does not take is lost.

    A descriptor that is closed stays so for writers, and for every program that is executed; but no
    file that is opened later gets its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            if descriptor != number:
                os.dup2(descriptor, number, inheritable=False)
                os.close(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout, errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Errors(2, "w", closefd=False), sys.stderr, errors="backslashreplace")


def _text(raw: io.FileIO, former: Any, *, errors: str) -> io.TextIOWrapper:
    """`former` is Python's own stream, or None where the descriptor was closed."""
    return io.TextIOWrapper(
        raw if former and former.write_through else io.BufferedWriter(raw),
        encoding=former.encoding if former else None,
        errors=errors,
        line_buffering=former is None or former.line_buffering,
        write_through=former is None or former.write_through,
    )


class _Output(io.FileIO):
    is_lost = False

    def write(self, data: Any) -> int:
        """All of it, also where another process has made the descriptor non-blocking."""
        left = memoryview(data)
        while left and not self.is_lost:
            try:
                written = super().write(left)
            except OSError as error:
                self.is_lost = True  # Python writes what it has once more at its end
                if isinstance(error, BrokenPipeError):
                    raise
                raise RefusedError("write to standard output", error.errno or 0) from None
            if written is None:
                select.select([], [self], [])
            left = left[written or 0 :]
        return len(data)


class _Errors(io.FileIO):
    def write(self, data: Any) -> int:
        """Whether anybody can read it or not."""
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)
