"""Who is at the other end of a Unix socket: the user, and whether that means here what it says."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

OVERFLOW_UID = 65534  # of whom this user namespace has no number for (user_namespaces(7))
SO_PEERPIDFD = 77  # asm-generic/socket.h, since Linux 6.5; Python 3.11 has no name for it

_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7)


@dataclass(frozen=True)
class Peer:
    """Who connected. The uid is the one that files of theirs have here."""

    uid: int
    is_inside: bool  # a process of this very user namespace, as far as that can be known for sure


def peer(connection: socket.socket) -> Peer:
    """Who connected, as the kernel noted at connect(2) (SO_PEERCRED).

    A uid of another user namespace is a user's here, too: that of its owner, of a range that is
    lent to it, or, where it has none here, the overflow uid, which says nothing. What such a
    process may do is what its namespace was made to limit, uid 0 included, so it does not count
    as inside; nor does one that is gone, or can't be seen from this pid namespace.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if not pid or uid == OVERFLOW_UID:
        return Peer(uid, False)
    with contextlib.suppress(OSError):
        return Peer(uid, _is_inside(connection, pid))
    return Peer(uid, False)


def _is_inside(connection: socket.socket, pid: int) -> bool:
    """Whether a process is in our user namespace. Nobody gets out of one, so what it is in now is
    not above what it was in when it connected; but its number may be another's by now."""
    try:
        process = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        is_theirs = True
    except OSError:  # before 6.5, or the process is gone
        process = os.pidfd_open(pid)
        is_theirs = False
    try:
        namespace = os.stat(f"/proc/{pid}/ns/user")
        # Who connected was there before this process was started for it.
        is_older = is_theirs or _started(str(pid)) <= _started("self")
        # Only now: a process that has not ended has kept its number all the time.
        has_ended = bool(_polled(process))
    finally:
        os.close(process)
    return os.path.samestat(namespace, os.stat("/proc/self/ns/user")) and is_older and not has_ended


def _polled(process: int) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return poll.poll(0)


def _started(pid: str) -> int:
    """When a process was started, in ticks since the machine was (proc_pid_stat(5))."""
    # Its name, in parentheses, may have any character in it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
