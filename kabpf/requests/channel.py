"""Messages that end in NUL over a stream socket, bounded in size and in time."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from kabpf.requests import varlink

_CHUNK = 16 * 1024


class Channel:
    """One end of a connection. The other end may keep it waiting for `seconds` in all, to send and
    to take messages: then TimeoutError is raised."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self._received = bytearray()

    def receive(self) -> bytes | None:
        """The next message without its NUL, or None where the other end is done. Raises
        MessageError for one that is too long, or ends early."""
        searched = 0
        while (end := self._received.find(0, searched)) < 0:
            searched = len(self._received)
            if searched > varlink.MESSAGE_MAX:
                raise varlink.MessageError(
                    f"more than {varlink.MESSAGE_MAX} bytes, expected a NUL before"
                )
            with self._waiting():
                chunk = self._connection.recv(_CHUNK)
            if not chunk:
                if self._received:
                    raise varlink.MessageError("half a message, expected a NUL at its end")
                return None
            self._received += chunk
        message = bytes(self._received[:end])
        del self._received[: end + 1]
        return message

    def send(self, message: bytes) -> None:
        """Send a message that has its NUL."""
        with self._waiting():
            self._connection.sendall(message)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        if self._seconds <= 0:
            raise TimeoutError("no message in time")
        self._connection.settimeout(self._seconds)
        start = time.monotonic()
        yield
        self._seconds -= time.monotonic() - start
