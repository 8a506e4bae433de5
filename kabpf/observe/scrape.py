"""One HTTP request on a connection that systemd accepted, from whoever may connect.

What the client sends is bounded in bytes and in time, and so is how long it may take to read the
answer: a client that says nothing, or never ends, costs one small process for some seconds.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

REQUEST_MAX = 8 << 10  # bytes; Prometheus sends some 300
REQUEST_S = 2.0
ANSWER_S = 5.0

# The names in the query, and the Accept header: the type of the content, and the content.
Respond = Callable[[frozenset[str], str], tuple[str, bytes]]


def serve(descriptor: int, respond: Respond) -> None:
    """Answer the request at this socket. A client that is gone or too slow gets nothing, and that
    is no error."""
    with socket.socket(fileno=descriptor) as connection:
        try:
            request = _request(connection)
            answer = io.BytesIO()
            _Handler(request, answer, respond)
            connection.settimeout(ANSWER_S)
            connection.sendall(answer.getvalue())
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            connection.detach()  # it is standard input, and others close that


def _request(connection: socket.socket) -> bytes:
    """The head of a request, as far as it came. Raises TimeoutError for one that takes too long."""
    request = b""
    end = time.monotonic() + REQUEST_S
    while not _is_whole(request) and len(request) < REQUEST_MAX:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        received = connection.recv(REQUEST_MAX - len(request))
        if not received:
            break
        request += received
    return request


def _is_whole(request: bytes) -> bool:
    return b"\r\n\r\n" in request or b"\n\n" in request


class _Handler(BaseHTTPRequestHandler):
    """Answers GET /metrics; the library reads the request and says what is wrong with it."""

    server_version = "kabpf"
    sys_version = ""
    default_request_version = "HTTP/1.0"  # of a request without one, whose answer has a head then

    def __init__(self, request: bytes, answer: io.BytesIO, respond: Respond) -> None:
        self.rfile = io.BufferedReader(io.BytesIO(request))
        self.wfile = answer
        self.client_address = ("", 0)
        self._respond = respond
        self._is_whole = _is_whole(request)
        self.handle_one_request()

    def do_GET(self) -> None:
        if not self._is_whole:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        path, _, query = self.path.partition("?")
        if path != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, explain="the metrics are at /metrics")
            return
        names = frozenset(each.partition("=")[0] for each in query.split("&"))
        content_type, content = self._respond(names, self.headers.get("Accept", ""))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: whoever may connect could fill the journal."""
