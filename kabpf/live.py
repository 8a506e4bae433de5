"""What a terminal shows while a command goes on: live views, and that work takes long.

A live view is one screen of a terminal, drawn again in place until q or a signal ends it.

Whatever ends it, the terminal is as before. Signals only wake it up: an exception of theirs would
be lost in a function that libbpf calls.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from kabpf import output, tables
from kabpf.errors import RefusedError

if TYPE_CHECKING:
    import threading

INTERVAL_S = 1.0
SHARE = 0.1  # of a processor, at most; a look that takes longer comes less often

SPAN_S = 10.0  # over which a rate is told; one that jumps each second can't be read

Key = TypeVar("Key", bound=Hashable)

_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OTHERS = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)

# Of every terminal that there is; ECMA-48, and xterm's for the alternate screen and the cursor.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_UP, _DOWN, _PAGE_UP, _PAGE_DOWN = b"\x1b[A", b"\x1b[B", b"\x1b[5~", b"\x1b[6~"


QUIET_S = 0.5  # of work that nobody waits for


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say on a terminal what takes so long, and for how long it does, until the block ends; then
    nothing of that is left. What is soon done says nothing, and neither does a pipe."""
    if not sys.stderr or not sys.stderr.isatty():
        yield
        return
    import threading  # here, because a pipe does without

    is_done = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, is_done), daemon=True)
    teller.start()
    try:
        yield
    finally:
        is_done.set()
        teller.join()


def _tell(what: str, is_done: threading.Event) -> None:
    """Past Python's buffers, whose locks a process that is forked meanwhile may need."""
    began = time.monotonic()
    if is_done.wait(QUIET_S):
        return
    with contextlib.suppress(OSError):
        while True:
            seconds = time.monotonic() - began
            line = tables.cut(f"{what}: {seconds:.0f} s", shutil.get_terminal_size().columns - 1)
            os.write(2, f"\r{output.encodable(line)}{_END_OF_LINE}".encode())
            if is_done.wait(INTERVAL_S):
                break
        os.write(2, f"\r{_END_OF_LINE}".encode())


class View(Protocol):
    """What is shown: rows below a head."""

    rows: int  # that there are

    def look(self) -> None:
        """Look at what is to be shown."""

    def lines(self, first: int, room: int) -> list[str]:
        """What the last look found, from this row on, in as many lines as there is room for or
        more."""


def require_alone(arguments: argparse.Namespace) -> None:
    """End with a usage error where the view's command is asked for another form as well."""
    for form in ("json", "wide"):
        if getattr(arguments, form):
            arguments.refuse(f"argument --watch: not allowed with argument --{form}")


def show(view: View, instead: str) -> None:
    """Show a view until q, Ctrl-C or another signal ends it. Raises RefusedError where standard
    output is no terminal; `instead` is what to try then."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise RefusedError(f"--watch needs a terminal; try: {instead}")
    view.look()  # what goes wrong at the first look is said on the terminal as it is
    with _woken() as woken, _Terminal() as terminal, contextlib.suppress(BrokenPipeError):
        _Loop(view, woken, terminal).run()


class Rates(Generic[Key]):
    """Counts by key, noted again and again. One that is less than before began anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: deque[tuple[float, Mapping[Key, Sequence[int]]]] = deque()

    def note(self, counts: Mapping[Key, Sequence[int]]) -> None:
        """Note what the counts are now."""
        now = self._clock()
        self._noted.append((now, counts))
        while len(self._noted) > 2 and self._noted[1][0] <= now - SPAN_S:
            self._noted.popleft()

    def of(self, key: Key) -> list[str]:
        """How much each count grew a second, as cells; ? where there was one look so far."""
        (began, before), (ended, now) = self._noted[0], self._noted[-1]
        counts = now[key]
        if ended == began:
            return [output.UNKNOWN] * len(counts)
        former = before.get(key, [0] * len(counts))
        return [
            _rate((count - earlier if count >= earlier else count) / (ended - began))
            for count, earlier in zip(counts, former, strict=True)
        ]


def _rate(rate: float) -> str:
    if not rate:
        return "0"
    return f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"


class _Loop:
    def __init__(self, view: View, woken: int, terminal: _Terminal) -> None:
        self._view = view
        self._woken = woken
        self._terminal = terminal
        self._first = 0
        self._is_over = False

    def run(self) -> None:
        due = time.monotonic() + INTERVAL_S
        while not self._is_over:
            self._draw()
            self._wait(due)
            if not self._is_over and time.monotonic() >= due:
                began = time.process_time()
                self._view.look()
                used_s = time.process_time() - began
                due = time.monotonic() + max(INTERVAL_S, used_s / SHARE)

    def _draw(self) -> None:
        columns, height = shutil.get_terminal_size()
        room = max(height - 1, 1)
        self._first = max(0, min(self._first, self._view.rows - 1))
        lines = self._view.lines(self._first, room)[:room]
        keys = (
            "q quits" if self._terminal.keys is None else "q quits, arrow keys and page keys scroll"
        )
        place = f"from {self._first + 1} of {self._view.rows}; " if self._first else ""
        lines += [""] * (room - len(lines)) + [tables.cut(f"{place}{keys}", columns)]
        text = f"{_END_OF_LINE}\r\n".join(tables.cut(line, columns) for line in lines)
        self._terminal.write(f"{_HOME}{output.encodable(text)}{_END_OF_LINE}{_END_OF_SCREEN}")

    def _wait(self, due: float) -> None:
        """Until a signal or a key comes, or the next look is due."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if self._terminal.keys is not None:
            poll.register(self._terminal.keys, select.POLLIN)
        for descriptor, _ in poll.poll(max(0.0, due - time.monotonic()) * 1000):
            raw = os.read(descriptor, 64)
            if descriptor == self._woken:
                self._heed({*raw})
            elif not raw or b"q" in raw.lower():
                self._is_over = True
            else:
                page = shutil.get_terminal_size().lines - 2
                for key, rows in ((_UP, -1), (_DOWN, 1), (_PAGE_UP, -page), (_PAGE_DOWN, page)):
                    self._first += rows * raw.count(key)

    def _heed(self, signals: set[int]) -> None:
        if signals & {*_END}:
            self._is_over = True
        elif signal.SIGTSTP in signals:
            self._terminal.give_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._terminal.take()


@contextlib.contextmanager
def _woken() -> Iterator[int]:
    """A descriptor from which the numbers of signals are read."""
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    heeded = [each for each in (*_END, *_OTHERS) if signal.getsignal(each) != signal.SIG_IGN]
    former = {each: signal.signal(each, _wake) for each in heeded}
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(before)
        for each, handler in former.items():
            signal.signal(each, handler)
        os.close(ours)
        os.close(theirs)


def _wake(_number: int, _frame: Any) -> None:
    """The number is in the pipe."""


class _Terminal:
    """Its other screen, whose keys are read one by one. A context manager."""

    def __init__(self) -> None:
        self.keys = 0 if sys.stdin and sys.stdin.isatty() else None
        self._modes = None if self.keys is None else termios.tcgetattr(self.keys)

    def __enter__(self) -> _Terminal:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, termios.error):  # it may be gone
            self.give_back()

    def take(self) -> None:
        if self.keys is not None:
            modes = termios.tcgetattr(self.keys)
            modes[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(self.keys, termios.TCSADRAIN, modes)
        self.write(_ENTER)

    def give_back(self) -> None:
        try:
            self.write(_LEAVE)
        finally:
            if self.keys is not None and self._modes is not None:
                termios.tcsetattr(self.keys, termios.TCSADRAIN, self._modes)

    def write(self, text: str) -> None:
        raw = text.encode(sys.stdout.encoding, "backslashreplace")
        while raw:
            raw = raw[os.write(1, raw) :]
