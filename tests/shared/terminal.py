"""A program in a pseudo-terminal, as a person has it before them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Any

ALTERNATE, MAIN = b"\x1b[?1049h", b"\x1b[?1049l"
HOME = b"\x1b[H"


class Terminal:
    """The terminal, and the program that it belongs to. A context manager."""

    def __init__(
        self,
        *command: Any,
        columns: int = 80,
        rows: int = 24,
        term: str = "xterm",
        locale: Mapping[str, str] | None = None,
    ) -> None:
        self.master, slave = pty.openpty()
        self.said = b""
        self.resize(columns, rows)
        self.modes = termios.tcgetattr(slave)
        # Python's readline exports both.
        sizes = ("COLUMNS", "LINES")
        environment = {key: value for key, value in os.environ.items() if key not in sizes}
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment, "TERM": term, **(locale or {"LC_ALL": "C.UTF-8"})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.slave = slave

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)

    def resize(self, columns: int, rows: int) -> None:
        """As by dragging its corner; the kernel sends SIGWINCH."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self, seconds: float) -> bool:
        """Whether the program said something more, or ended, within this time."""
        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        self.said += os.read(self.master, 1 << 16)
        return True

    def until(self, pattern: str, seconds: float = 20) -> list[str]:
        """The lines of the first whole screen that the pattern is found in, from now on."""
        deadline = time.monotonic() + seconds
        while True:
            # The last one may not be whole yet.
            for frame in self.said.split(HOME)[1:-1]:
                if re.search(pattern, text := plain(frame)):
                    return text.split("\n")
            self.said = HOME + self.said.rpartition(HOME)[2] if HOME in self.said else self.said
            assert self.read(deadline - time.monotonic()), plain(self.said)

    def end(self, seconds: float = 20) -> int:
        """The exit status, once it ends."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.read(min(0.1, deadline - time.monotonic()))
            assert time.monotonic() < deadline, "the program does not end"
        while self.read(0):
            pass
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Whether keys are read as they were, and the main screen is back with its cursor."""
        last = self.said.rpartition(MAIN)
        return (
            termios.tcgetattr(self.slave) == self.modes
            and ALTERNATE not in last[2]
            and last[0].endswith(b"\x1b[?25h")
        )

    def stopped(self, seconds: float = 20) -> bool:
        """Whether the program is stopped within this time, as by Ctrl-Z."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read(0.05)
            pid, status = os.waitpid(self.process.pid, os.WUNTRACED | os.WNOHANG)
            if pid:
                return os.WIFSTOPPED(status)
        return False

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


def plain(raw: bytes) -> str:
    """A text without what moves the cursor."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", raw.decode(errors="replace"))


def output(*command: Any, columns: int) -> tuple[int, Sequence[str]]:
    """Exit status and lines of a program in a terminal of this width."""
    with Terminal(*command, columns=columns) as terminal:
        status = terminal.end(60)
        # What was drawn over is not there any more.
        lines = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in terminal.said.split(b"\n")]
        return status, [plain(line) for line in lines[:-1]]
