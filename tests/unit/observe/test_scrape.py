"""A scraper at its worst costs one process for a bounded time and number of bytes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kabpf.observe import scrape

ENDS_S = 10.0  # long after the bounds of the tests

Client = Callable[[socket.socket], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Client], bytes]]:
    """Serves what a client does, with bounds that are short; what it was answered."""
    monkeypatch.setattr(scrape, "REQUEST_S", 0.1)
    monkeypatch.setattr(scrape, "ANSWER_S", 0.1)

    def run(client: Client) -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            thread = threading.Thread(target=client, args=(ours,))
            thread.start()
            began = time.monotonic()
            scrape.serve(theirs.fileno(), lambda _names, _accept: ("text/plain", b"x" * (8 << 20)))
            assert time.monotonic() - began < ENDS_S
            theirs.close()
            thread.join()
            ours.settimeout(ENDS_S)
            try:
                return b"".join(iter(lambda: ours.recv(65536), b""))
            except ConnectionResetError:  # as some of what it sent was not read
                return b""

    yield run


def says_nothing(_client: socket.socket) -> None:
    pass


def asks_forever(client: socket.socket) -> None:
    end = time.monotonic() + ENDS_S
    try:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        while time.monotonic() < end:
            client.sendall(b"a")
            time.sleep(0.01)
    except OSError:  # it was closed
        return
    raise AssertionError("it is still read")


def sends_a_long_head(client: socket.socket) -> None:
    try:
        client.sendall(b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * (1 << 18))
    except OSError:
        return
    raise AssertionError("all of it was read")


def reads_no_answer(client: socket.socket) -> None:
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("client", [says_nothing, asks_forever, sends_a_long_head, reads_no_answer])
def test_scraper_at_its_worst_is_left_after_a_while(
    serve: Callable[[Client], bytes], client: Client
) -> None:
    """One that says nothing, asks for ever, sends a mebibyte of header, or does not read."""
    assert len(serve(client)) < 1 << 20


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics HTTP/9.1\r\n\r\n", b"505"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"501"),
        (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 4096, b"431"),
        (b"GET /metrics HTTP/x\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1 more\r\n\r\n", b"400"),
        (b"\xff\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"", b""),
    ],
)
def test_request_gets_one_answer(request_: bytes, status: bytes) -> None:
    """By its first line and its size."""
    answer = scrape._answer(request_[: scrape.REQUEST_MAX], lambda _names, _accept: ("a/b", b"c"))
    assert answer.split(b" ")[1:2] == [status] or answer == status


def test_query_and_accept_are_handed_on() -> None:
    """Names of the query without values; Accept in any spelling, also in several lines."""
    asked = []

    def respond(names: frozenset[str], accept: str) -> tuple[str, bytes]:
        asked.append((names, accept))
        return "a/b", b"c"

    request = b"GET /metrics?sockets&x=1 HTTP/1.1\r\nHOST: a\r\naccept: b/c\r\nAccept:d/e\r\n\r\n"
    head, _, content = scrape._answer(request, respond).partition(b"\r\n\r\n")
    assert asked == [(frozenset({"sockets", "x"}), "b/c,d/e")]
    assert b"\r\nContent-Type: a/b\r\nContent-Length: 1\r\n" in head
    assert content == b"c"
