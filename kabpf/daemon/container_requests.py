"""What an engine's hook asks, before a container's first process runs: that its cgroup be resolved.

A connection is one request, a line of JSON, `{"cgroup": PATH}`, and one line that answers when the
entry is written: `{}`, or `{"error": TEXT}`. Nothing that a caller says decides about a policy, and
root alone may call.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from kabpf.runtime.locks import RUN

NAME = "containers.socket"
LINE_MAX = 16 * 1024  # bytes; a path has up to 4,096
CONNECTIONS_MAX = 256  # at once: of more the oldest one is closed
QUEUE_MAX = 256  # connections that wait to be accepted
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7)


class Request(NamedTuple):
    """Somebody waits for the cgroup at this path to be resolved."""

    connection: socket.socket
    cgroup: str  # as the caller has it, or "" for none


class ContainerRequests:
    """The socket. Where it can't be made hooks find nobody, and go on."""

    def __init__(self, run: Path = RUN) -> None:
        self._path = run / NAME
        self._poll = select.epoll()
        self._received: dict[int, tuple[socket.socket, bytes]] = {}  # by descriptor, oldest first
        self._listener = _socket()
        self._made: os.stat_result | None = None  # the file, where it could be made
        self._listen()

    def renew(self) -> None:
        """Make the socket anew where somebody has removed its file, as with the directory."""
        with contextlib.suppress(OSError):
            if self._made and os.path.samestat(self._made, os.lstat(self._path)):
                return
        with contextlib.suppress(OSError):  # of one that never listened
            self._poll.unregister(self._listener)
        self._listener.close()
        self._listener = _socket()
        self._listen()

    def _listen(self) -> None:
        self._made = None
        with contextlib.suppress(OSError):
            self._unlink()
            os.fchmod(self._listener.fileno(), 0o600)  # which bind(2) gives the file
            self._listener.bind(str(self._path))
            self._listener.listen(QUEUE_MAX)
            # Not before: of a socket that does not listen, epoll tells all the time.
            # Once for each who comes: who can't be accepted for lack of descriptors keeps nothing
            # awake, and is accepted with the next one.
            self._poll.register(self._listener, select.EPOLLIN | select.EPOLLET)
            self._made = os.lstat(self._path)

    def close(self) -> None:
        """Remove the socket."""
        self._unlink()
        self._poll.close()
        self._listener.close()
        for connection, _ in self._received.values():
            connection.close()

    def fileno(self) -> int:
        """A descriptor that can be read from when `receive` has something to do."""
        return self._poll.fileno()

    def receive(self) -> list[Request]:
        """The requests that have come; each has to be answered."""
        requests: list[Request] = []
        for descriptor, _ in self._poll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            elif descriptor in self._received and (request := self._read(descriptor)):
                requests.append(request)
        return requests

    def answer(self, request: Request, error: str = "") -> None:
        """Answer, and close the connection, whose other end may be gone."""
        line = json.dumps({"error": error} if error else {}) + "\n"
        with request.connection, contextlib.suppress(OSError):
            request.connection.send(line.encode(), socket.MSG_NOSIGNAL)

    def _accept(self) -> None:
        """Take all who wait: where the queue is full nobody else can connect."""
        with contextlib.suppress(OSError):
            for _ in range(QUEUE_MAX + 1):  # as many as the kernel lets wait
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                if _uid(connection) != 0:  # root of a user namespace is another one here
                    connection.close()
                    continue
                if len(self._received) >= CONNECTIONS_MAX:
                    self._forget(next(iter(self._received))).close()
                self._received[connection.fileno()] = connection, b""
                self._poll.register(connection, select.EPOLLIN)

    def _read(self, descriptor: int) -> Request | None:
        connection, received = self._received[descriptor]
        try:
            piece = connection.recv(LINE_MAX)
        except BlockingIOError:
            return None
        except OSError:
            piece = b""
        line, newline, _ = (received + piece).partition(b"\n")
        if not newline and piece and len(line) < LINE_MAX:
            self._received[descriptor] = connection, line
            return None
        self._forget(descriptor)
        if not newline:
            connection.close()
            return None
        return Request(connection, _cgroup(line))

    def _forget(self, descriptor: int) -> socket.socket:
        connection, _ = self._received.pop(descriptor)
        self._poll.unregister(connection)
        return connection

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def _socket() -> socket.socket:
    kind = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    return socket.socket(socket.AF_UNIX, kind)


def _uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return int(uid)


def _cgroup(line: bytes) -> str:
    """The path that a request names, or "" where it names none."""
    try:
        request = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return ""
    path = request.get("cgroup") if isinstance(request, dict) else None
    if isinstance(path, str) and path.startswith("/") and "\0" not in path:
        with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair, as JSON may have it
            os.fsencode(path)
            return path
    return ""
