"""What the data plane tells of sockets, for one listener of several.

A monitor has a place of its own in a map as long as it holds a lock. What it puts there goes with
its process. The log has a place and a ring buffer that are always there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel import abi, capabilities, dataplane
from kabpf.kernel.libbpf import buffers, links, maps, programs
from kabpf.runtime.locks import locked, monitor_lock, open_lock

PAGE = os.sysconf("SC_PAGE_SIZE")
# Memory for what waits: for one processor, and for all together, as long as each has a little.
PROCESSOR_BYTES = 2 * 1024 * 1024
PROCESSOR_BYTES_MIN = 64 * 1024
BYTES_MAX = 16 * 1024 * 1024

MONITORS_LOCK = "monitor.lock"  # while the readers change

LINK = 1 + abi.MONITORS  # the readers' entry for the id of the link that monitors share

# A BPF program that just saw the place empty may still clear its flag.
SETTLE_S = 0.02


class Reports:
    """The raw reports of the data plane pinned at `pins`; in `consume`, `receive` is called with
    each that waits. With `log` only of policies that want their sockets logged. With `root`, the
    root of the cgroup2 tree, calls that turn keepalive off are seen whether a policy needs it or
    not. A context manager.

    Raises RefusedError where a step failed, or there are too many listeners; UnsupportedError where
    this process lacks a capability.
    """

    def __init__(
        self,
        pins: Path,
        run: Path,
        receive: Callable[[bytes], None],
        *,
        log: bool,
        root: Path | None = None,
    ) -> None:
        if missing := capabilities.missing(capabilities.DATAPLANE):
            raise UnsupportedError(
                f"{', '.join(missing)} missing; run it as root with these capabilities"
            )
        self._run = run
        with ExitStack() as stack:
            self._place = abi.LOGGER if log else _taken_place(run, stack)
            self._readers = stack.enter_context(maps.Map(str(pins / dataplane.READERS), 4, 8))
            self._buffers: buffers.PerfBuffers | buffers.RingBuffer
            if log:
                self._buffers = buffers.RingBuffer(str(pins / dataplane.LOG), receive)
            else:
                self._buffers = self._monitors_buffers(pins, receive)
            stack.enter_context(self._buffers)
            self._lost_before = self._read(1 + self._place)
            self._say(is_here=True)
            stack.callback(self._say, is_here=False)
            if root is not None:
                stack.callback(os.close, self._observing_link(pins, root))
            if log:  # so that `wait_for_log` goes on
                stack.callback(os.close, _locked_place(run, abi.LOGGER))
            self._stack = stack.pop_all()

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the place."""
        self._stack.close()

    def descriptors(self) -> list[int]:
        """Descriptors, of which one is readable when reports have come since the last poll."""
        return self._buffers.descriptors()

    def is_heard(self) -> bool:
        """Whether the data plane still tells us everything: not where another processor works now
        than when we began."""
        return self._read(0).to_bytes(8, sys.byteorder)[self._place] == 1

    def consume(self) -> None:
        """Receive every report that waits, without waiting for one."""
        self._buffers.consume()

    def lost(self) -> int:
        """How many reports there was no room for, since the beginning."""
        return self._read(1 + self._place) - self._lost_before

    def _monitors_buffers(
        self, pins: Path, receive: Callable[[bytes], None]
    ) -> buffers.PerfBuffers:
        if self.is_heard():  # one that was killed
            self._say(is_here=False)
            time.sleep(SETTLE_S)
        first = self._place * buffers.processors()
        return buffers.PerfBuffers(str(pins / dataplane.MONITORS), first, _size() // PAGE, receive)

    def _observing_link(self, pins: Path, root: Path) -> int:
        """Monitors have one link together, as each link more would tell of a call once more: it
        ends with the last process that has it."""
        program = str(pins / dataplane.OBSERVE_PROGRAM)
        with locked(self._run, MONITORS_LOCK):
            link = links.shared_link(self._read(LINK), programs.program_id(program))
            if link is None:
                with dataplane.opened_directory(root) as cgroup:
                    link = links.new_link(program, cgroup, links.CGROUP_SETSOCKOPT)
                self._readers.update(abi.key(LINK), abi.key(links.link_id(link), 8))
        return link

    def _read(self, entry: int) -> int:
        return abi.number(self._readers.look_up(abi.key(entry)) or bytes(8))

    def _say(self, *, is_here: bool) -> None:
        with locked(self._run, MONITORS_LOCK):
            bits = bytearray(self._read(0).to_bytes(8, sys.byteorder))
            bits[self._place] = is_here
            self._readers.update(abi.key(0), bytes(bits))


def _taken_place(run: Path, stack: ExitStack) -> int:
    for place in range(abi.LOGGER + 1, abi.MONITORS):
        with contextlib.suppress(BlockingIOError):
            stack.callback(os.close, _locked_place(run, place))
            return place
    raise RefusedError("too many monitors", hint=f"at most {abi.MONITORS - 1} can run at a time")


def _locked_place(run: Path, place: int) -> int:
    lock = open_lock(run, monitor_lock(place))
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    return lock


def _size() -> int:
    """The bytes of a buffer, a power of two."""
    size = PROCESSOR_BYTES
    while size > PROCESSOR_BYTES_MIN and size * (os.cpu_count() or 1) > BYTES_MAX:
        size //= 2
    return size
