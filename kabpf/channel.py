"""Messages that end in NUL over a stream socket, bounded in size and in time."""

from __future__ import annotations

import socket
import time

from kabpf import varlink

_CHUNK = 16 * 1024


class Channel:
    """One end of a connection. All that is awaited of the other end has to come within `seconds`
    from now: else TimeoutError is raised."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + seconds
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
            self._wait_no_longer()
            if not (chunk := self._connection.recv(_CHUNK)):
                if self._received:
                    raise varlink.MessageError("half a message")
                return None
            self._received += chunk
        message = bytes(self._received[:end])
        del self._received[: end + 1]
        return message

    def send(self, message: bytes) -> None:
        """Send a message that has its NUL."""
        self._wait_no_longer()
        self._connection.sendall(message)

    def _wait_no_longer(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for the request is over")
        self._connection.settimeout(left)
