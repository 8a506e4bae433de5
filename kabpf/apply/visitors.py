"""Processes that go over TCP sockets in network namespaces, and can be left behind.

The kernel's iterator takes the lock of every socket (bpf_iter_tcp_seq_show() in
net/ipv4/tcp_ipv4.c). A process that sleeps with such a lock, as in a page fault within send(2) that
nobody answers, keeps whoever runs the iterator from being killed, for as long as it likes. So that
is done by processes that hold nothing of ours but a lock that says where they are (left_behind).
One that waits for too long is killed, which ends it when the socket is let go of, and another one
does the rest.
"""

from __future__ import annotations

import fcntl
import functools
import math
import os
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kabpf.apply import left_behind
from kabpf.errors import RefusedError
from kabpf.kernel import syscalls
from kabpf.kernel.namespaces import Namespace, has_tcp_sockets
from kabpf.runtime.locks import RUN, holder, open_lock

LOCK = "visitors.lock"  # a byte for each network namespace, by its inode number

LOOK_S = 0.05  # between two looks at a process that is silent
HELD_S = 0.5  # in one sleep that no signal ends: a socket is held
STUCK_S = 1.0  # for all namespaces where one is, from the first
TURN_S = 10.0  # for another command's visit of the same namespace to end
VISITORS_MAX = 16  # at once; one more for each that seems to be stuck

LATE = "the time was used up by others"

Read = Callable[[], Iterator[bytes]]

_HEAD = struct.Struct("=IBI")  # a namespace, what about it, and how many bytes follow

_ENTERED, _WAITS, _PIECE, _DONE, _REFUSED, _UNREACHED, _SKIPPED = range(7)


class Outcome(NamedTuple):
    """What became of one namespace."""

    namespace: int  # its inode number
    output: bytes = b""
    refused: str = ""
    is_held: bool = False  # a socket's lock is, or there is no way in; `refused` says why
    was_skipped: bool = False  # the part's time was over


class Part(NamedTuple):
    """Namespaces that are visited one after the other, as far as the time goes."""

    namespaces: list[Namespace]
    seconds: float = math.inf


def outcomes(read: Read, parts: Iterable[Part]) -> Iterator[Outcome]:
    """Read in namespaces, by a pinned iterator or otherwise, and tell what that gave in each; of
    one that is gone, or has no TCP socket, nothing. `read` may raise RefusedError.

    Each part has a process of its own, which is at work while the next one is found out.
    """
    running = _Running(read)
    try:
        for part in parts:
            if part.namespaces:
                running.start(part)
        yield from running.outcomes()
    finally:
        running.end()


@dataclass
class _Visitor:
    """A process at work, as seen from outside."""

    process: int
    pipe: int
    waiting: dict[int, Namespace]  # those that it did not begin yet, by inode number
    seconds: float
    namespace: int = 0  # where it is now
    watched: int = 0  # the process whose progress counts: itself, or another command's visitor
    said: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    sleep: bytes | None = None  # in which it was seen last
    since: float = 0.0  # that it was seen there, or began to wait for its turn


class _Running:
    def __init__(self, read: Read) -> None:
        self._read = read
        self._visitors: dict[int, _Visitor] = {}  # by pipe
        self._left: list[Part] = []  # for which there is no process
        self._stuck_at: float | None = None
        self._poll = select.poll()

    def start(self, part: Part) -> None:
        process, pipe = left_behind.start(functools.partial(_visit, self._read, part))
        waiting = {each.inode: each for each in part.namespaces}
        visitor = _Visitor(process, pipe, waiting, part.seconds)
        visitor.watched, visitor.since = visitor.process, time.monotonic()
        os.set_blocking(pipe, False)
        self._visitors[pipe] = visitor
        self._poll.register(pipe, select.POLLIN)

    def outcomes(self) -> Iterator[Outcome]:
        while self._visitors:
            ready = {pipe for pipe, _ in self._poll.poll(LOOK_S * 1000)}
            for pipe in ready:
                yield from self._hear(self._visitors[pipe])
            for visitor in [self._visitors[pipe] for pipe in self._visitors.keys() - ready]:
                yield from self._look_at(visitor)
            while self._left and len(self._visitors) < VISITORS_MAX and not self._is_late():
                self.start(self._left.pop(0))
        for namespace in (each for part in self._left for each in part.namespaces):
            yield Outcome(namespace.inode, is_held=True, refused=LATE)

    def end(self) -> None:
        """Whoever is at work still is of no use any more."""
        for visitor in list(self._visitors.values()):
            self._leave(visitor)

    def _hear(self, visitor: _Visitor) -> Iterator[Outcome]:
        try:
            said = os.read(visitor.pipe, 1 << 20)
        except BlockingIOError:
            return
        if not said:
            self._forget(visitor)
            # It did its work; or somebody has killed it.
            for inode in (visitor.namespace, *visitor.waiting):
                if inode:
                    yield Outcome(inode, refused="the process that updates open sockets was killed")
            return
        visitor.said += said
        visitor.sleep = None
        while len(visitor.said) >= _HEAD.size:
            inode, what, size = _HEAD.unpack_from(visitor.said)
            if len(visitor.said) < _HEAD.size + size:
                return
            content = visitor.said[_HEAD.size : _HEAD.size + size]
            visitor.said = visitor.said[_HEAD.size + size :]
            yield from self._understand(visitor, inode, what, content)

    def _understand(
        self, visitor: _Visitor, inode: int, what: int, content: bytes
    ) -> Iterator[Outcome]:
        if what == _ENTERED:
            visitor.namespace, visitor.watched = inode, visitor.process
            visitor.waiting.pop(inode, None)
            visitor.pieces = []
        elif what == _WAITS:
            visitor.watched, visitor.since = int.from_bytes(content, "little"), time.monotonic()
        elif what == _PIECE:
            visitor.watched = visitor.process
            visitor.pieces.append(content)
        elif what == _DONE:
            visitor.namespace = 0
            yield Outcome(inode, b"".join(visitor.pieces))
        else:
            visitor.namespace = 0
            visitor.waiting.pop(inode, None)
            yield Outcome(
                inode,
                refused=os.fsdecode(content),
                is_held=what == _UNREACHED,
                was_skipped=what == _SKIPPED,
            )

    def _look_at(self, visitor: _Visitor) -> Iterator[Outcome]:
        now = time.monotonic()
        before, visitor.sleep = visitor.sleep, left_behind.sleep_of(visitor.watched, b"D")
        is_stuck = visitor.sleep is not None and visitor.sleep == before
        takes_turns = visitor.watched != visitor.process
        if not is_stuck:
            if not takes_turns:
                visitor.since = now
            elif now > visitor.since + TURN_S:
                yield from self._abandon(visitor)
            return
        self._take_over(visitor)  # as this one may never come to them
        self._stuck_at = self._stuck_at or now
        # One that has waited for another command already need not be waited for again.
        if takes_turns or now > visitor.since + HELD_S or self._is_late():
            yield from self._abandon(visitor)

    def _is_late(self) -> bool:
        return self._stuck_at is not None and time.monotonic() > self._stuck_at + STUCK_S

    def _take_over(self, visitor: _Visitor) -> None:
        """Have another one do what this one did not begin yet."""
        if visitor.waiting:
            self._left.append(Part([*visitor.waiting.values()], visitor.seconds))
            visitor.waiting = {}

    def _abandon(self, visitor: _Visitor) -> Iterator[Outcome]:
        self._take_over(visitor)
        self._leave(visitor)
        yield Outcome(visitor.namespace, is_held=True)

    def _leave(self, visitor: _Visitor) -> None:
        left_behind.kill(visitor.process)
        self._forget(visitor)

    def _forget(self, visitor: _Visitor) -> None:
        self._poll.unregister(visitor.pipe)
        del self._visitors[visitor.pipe]
        os.close(visitor.pipe)


def _visit(read: Read, part: Part, pipe: int) -> None:
    def say(inode: int, what: int, content: bytes = b"") -> None:
        message = _HEAD.pack(inode, what, len(content)) + content
        while message:
            message = message[os.write(pipe, message) :]

    lock = open_lock(RUN, LOCK)
    deadline = time.monotonic() + part.seconds
    for namespace in part.namespaces:
        inode = namespace.inode
        if time.monotonic() > deadline:
            say(inode, _SKIPPED)
            continue
        say(inode, _ENTERED)
        try:
            descriptor = namespace.open()
        except OSError as error:
            say(inode, _UNREACHED, os.fsencode(f"it can't be entered: {error.strerror}"))
            continue
        if descriptor is None:
            say(inode, _DONE)
            continue
        try:
            syscalls.enter_network_namespace(descriptor)
            if has_tcp_sockets():
                _take_turn(lock, inode, functools.partial(say, inode, _WAITS))
                for piece in read():
                    say(inode, _PIECE, piece)
            say(inode, _DONE)
        except RefusedError as error:
            say(inode, _REFUSED, os.fsencode(str(error)))
        finally:
            # One who had two turns at once could wait for another one in a circle.
            fcntl.lockf(lock, fcntl.LOCK_UN, 1, inode)
            os.close(descriptor)


def _take_turn(lock: int, inode: int, waits: Callable[[bytes], None]) -> None:
    """Be the one visitor of a namespace: who is stuck in it need not have company."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, inode)
    except BlockingIOError:
        process = holder(lock, inode, 1)
        if process and process > 0:
            waits(process.to_bytes(4, "little"))
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, inode)
