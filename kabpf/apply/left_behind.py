"""Processes that may come to wait for others without end, and then be left behind.

A process that waits for a socket's lock can't be killed: the signal waits with it. So what may wait
is done by one that holds nothing of ours, no lock, no descriptor and no directory, and is nobody's
child. If it is killed while it waits, it ends with its wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import NoReturn

from kabpf import proc
from kabpf.errors import RefusedError

_START = "start a process to update open sockets"


def start(work: Callable[[int], None]) -> tuple[int, int]:
    """Start a process that does `work` and ends; its number, and a pipe of which it has the other
    end, whose descriptor `work` is given. While the pipe is open there the number is its own.
    Raises RefusedError."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        if not (child := os.fork()):
            _fork(work, theirs)
    except OSError as error:
        os.close(ours)
        raise RefusedError(_START, error.errno or 0) from None
    finally:
        os.close(theirs)
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
        os.waitpid(child, 0)
    raw = os.read(ours, 4)
    if len(raw) < 4:
        os.close(ours)
        raise RefusedError(_START)
    return int.from_bytes(raw, "little"), ours


def kill(process: int) -> None:
    """End one that `start` returned, now or when its wait ends; while its pipe is open."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def sleep_of(process: int, states: bytes) -> bytes | None:
    """In which sleep a process is, of those states (proc_pid_status(5)): the same again until it
    has run. None where it is in no such one."""
    try:
        status = proc.read(f"/proc/{process}/status")
        state = b"".join(proc.fields(status, b"State")[:1])
        if not state or state not in states:
            return None
        return b" ".join(proc.fields(status, b"voluntary_ctxt_switches"))
    except OSError:
        return None


def _fork(work: Callable[[int], None], pipe: int) -> NoReturn:
    """Be the parent of one that is nobody's child when this returns to the system: it may end long
    after who wanted it, and leaves no zombie."""
    try:
        if not os.fork():
            os.write(pipe, os.getpid().to_bytes(4, "little"))
            _let_go(pipe)
            work(pipe)
    finally:
        os._exit(0)


def _let_go(pipe: int) -> None:
    """Keep nothing that somebody else waits for, whatever becomes of this process."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        if descriptor != pipe:
            os.dup2(nothing, descriptor)
    os.closerange(3, pipe)
    os.closerange(max(3, pipe + 1), os.sysconf("SC_OPEN_MAX"))
