"""Who is at the other end of a Unix socket: the user, and whether that means here what it says."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from kabpf import proc
from kabpf.kernel import capabilities

OVERFLOW_UID = 65534  # of whom this user namespace has no number for (user_namespaces(7))
SO_PEERPIDFD = 77  # asm-generic/socket.h, since Linux 6.5; Python 3.11 has no name for it

_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7)


@dataclass(frozen=True)
class Peer:
    """Who connected. The uid is the one that files of theirs have here."""

    uid: int
    is_full: bool  # surely a process with the rights that its uid has on this machine


def peer(connection: socket.socket) -> Peer:
    """Who connected, as the kernel noted at connect(2) (SO_PEERCRED).

    A process of another user namespace has a uid here, too: its owner's, one of a range that was
    lent to it, or, without one, the overflow uid, which says nothing. Its namespace was made for
    it to have less than that uid has, uid 0 included, so it does not count as full. Nor does
    a root that lacks what kabpf itself takes, nor one that is gone or can't be seen from this
    pid namespace.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if not pid or uid == OVERFLOW_UID:
        return Peer(uid, False)
    with contextlib.suppress(OSError):
        return Peer(uid, _is_full(connection, pid, uid))
    return Peer(uid, False)


def _is_full(connection: socket.socket, pid: int, uid: int) -> bool:
    """As it is now, since nobody gets out of a user namespace. But its number may be another
    process's by now."""
    try:
        process = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        is_known = True
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # who connected is gone
            raise
        process = os.pidfd_open(pid)  # before 6.5
        is_known = False
    try:
        namespace = os.stat(f"/proc/{pid}/ns/user")
        is_whole = uid != 0 or not capabilities.missing(capabilities.DATAPLANE, pid)
        # Who connected was there before this process was started for it.
        is_theirs = is_known or (
            proc.effective_uid(pid) == uid and proc.started(pid) <= proc.started("self")
        )
        # Only now: a process that has not ended has kept its number all the time.
        has_ended = bool(_polled(process))
    finally:
        os.close(process)
    is_inside = os.path.samestat(namespace, os.stat("/proc/self/ns/user"))
    return is_inside and is_whole and is_theirs and not has_ended


def _polled(process: int) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return poll.poll(0)
