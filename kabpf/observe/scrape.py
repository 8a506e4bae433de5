"""One HTTP request on a connection that systemd accepted, from whoever may connect.

It is read here and not by http.server, whose import takes a quarter of a scrape's time. What the
client sends is bounded in bytes and in time, and so is how long it may take to read the answer: a
client that says nothing, or never ends, costs one small process for some seconds.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

REQUEST_MAX = 8 << 10  # bytes; Prometheus sends some 300
REQUEST_S = 2.0
ANSWER_S = 5.0

_FIRST = "HTTP/1.0"  # of a request that names no version
_VERSION = re.compile(r"HTTP/([0-9]{1,3})\.[0-9]{1,3}")

# The names in the query, and the Accept header: the type of the content, and the content.
Respond = Callable[[frozenset[str], str], tuple[str, bytes]]


def serve(descriptor: int, respond: Respond) -> None:
    """Answer the request at this socket. A client that is gone or too slow gets nothing, and that
    is no error."""
    with socket.socket(fileno=descriptor) as connection:
        try:
            request = _request(connection)
            answer = _answer(request, respond)
            connection.settimeout(ANSWER_S)
            connection.sendall(answer)
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


def _answer(request: bytes, respond: Respond) -> bytes:
    """The answer to GET /metrics, or what is wrong with the request; nothing to nothing."""
    if not request:
        return b""
    line, _, rest = request.decode("latin-1").partition("\n")
    words = line.split()
    if len(words) == 2:
        words.append(_FIRST)
    if len(words) != 3 or not (version := _VERSION.fullmatch(words[2])):
        return _wrong("400 Bad Request")
    method, target, _ = words
    if version[1] != "1":
        return _wrong("505 HTTP Version Not Supported")
    if method != "GET":
        return _wrong("501 Not Implemented")
    if not _is_whole(request):
        return _wrong("431 Request Header Fields Too Large")
    path, _, query = target.partition("?")
    if path != "/metrics":
        return _wrong("404 Not Found", "the metrics are at /metrics")
    headers = (header.partition(":") for header in rest.split("\n"))
    accept = ",".join(
        value.strip() for name, _, value in headers if name.strip().lower() == "accept"
    )
    names = frozenset(each.partition("=")[0] for each in query.split("&"))
    return _message("200 OK", *respond(names, accept))


def _wrong(status: str, text: str = "") -> bytes:
    return _message(status, "text/plain; charset=utf-8", f"{text or status}\n".encode())


def _message(status: str, content_type: str, content: bytes) -> bytes:
    head = (
        f"HTTP/1.0 {status}\r\nServer: kabpf\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
