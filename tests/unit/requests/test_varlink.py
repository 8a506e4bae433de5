"""Varlink's messages: what is taken for a call, and what is sent."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest

from kabpf.requests import varlink
from kabpf.requests.channel import Channel
from kabpf.requests.varlink import Call, CallError, MessageError

PING = "io.kabpf.Ping"
DEEP = '{"method": "io.kabpf.Ping", "parameters": {"a": %s}}'


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"method": "io.kabpf.Ping"}', Call(PING)),
        ('{"method":"io.kabpf.Ping","parameters":{}}', Call(PING)),
        ('{"method": "io.kabpf.Ping", "parameters": null, "more": null}', Call(PING)),
        ('{"method": "io.kabpf.Ping", "parameters": {"a": 1}}', Call(PING, {"a": 1})),
        ('{"method": "io.kabpf.Ping", "oneway": true}', Call(PING, oneway=True)),
        ('{"method": "io.kabpf.Ping", "more": true}', Call(PING, more=True)),
        ('{"method": "io.kabpf.Ping", "upgrade": true}', Call(PING, upgrade=True)),
        (DEEP % "9223372036854775807", Call(PING, {"a": 2**63 - 1})),
        (DEEP % "-9223372036854775807", Call(PING, {"a": -(2**63) + 1})),
        (DEEP % ("[" * 6 + "]" * 6), Call(PING, {"a": [[[[[[]]]]]]})),
        (DEEP % r'"\"[[[[[[[[[[[["', Call(PING, {"a": '"[[[[[[[[[[[['})),
        (DEEP % r'"\ud83d\ude00"', Call(PING, {"a": "\U0001f600"})),
        ("\n" + DEEP % '"\U0001f600"' + "\t", Call(PING, {"a": "\U0001f600"})),
    ],
)
def test_call_is_parsed(text: str, call: Call) -> None:
    """A call has a method, and may have parameters and the three flags of the protocol."""
    assert varlink.parse_call(text.encode()) == call


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b'"io.kabpf.Ping"',
        b"{",
        b'{"method": 5}',
        b'{"method": ""}',
        b'{"method": "Ping"}',
        b'{"method": "io.kabpf.ping"}',
        b'{"method": "io.kabpf.Ping."}',
        b'{"method": "io..Ping"}',
        b'{"method": "io.kabpf.Ping\\n"}',
        b'{"method": "io.kabpf.Ping"} {"method": "io.kabpf.Ping"}',
        b'{"method": "io.kabpf.Ping", "method": "io.kabpf.Ping"}',
        b'{"method": "io.kabpf.Ping", "parameters": {"a": 1, "a": 2}}',
        b'{"method": "io.kabpf.Ping", "parameters": []}',
        b'{"method": "io.kabpf.Ping", "parameters": {}, "sudo": true}',
        b'{"method": "io.kabpf.Ping", "more": 1}',
        b'{"method": "io.kabpf.Ping", "more": "true"}',
        b'{"method": "io.kabpf.Ping", "oneway": true, "more": true}',
        b'{"method": "io.kabpf.Ping", "oneway": true, "upgrade": true}',
        b'{"method": "io.kabpf.Ping", "more": true, "upgrade": true}',
        b"\xff\xfe",
        b'{"method": "io.kabpf.Ping", "parameters": {"a": "\xff"}}',
        b'\xef\xbb\xbf{"method": "io.kabpf.Ping"}',
        b'{"method": "io.kabpf.Ping", "parameters": {"a": "\x01"}}',
        (DEEP % r'"\ud800"').encode(),
        b'{"method": "io.kabpf.Ping", "parameters": {"\\udc00": 1}}',
        (DEEP % "NaN").encode(),
        (DEEP % "-Infinity").encode(),
        (DEEP % "1.5").encode(),
        (DEEP % "1e9").encode(),
        (DEEP % "9223372036854775808").encode(),
        (DEEP % ("9" * 60_000)).encode(),
        (DEEP % ("[" * 7 + "]" * 7)).encode(),
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b" " * (varlink.MESSAGE_MAX + 1),
        (DEEP % f'"{"x" * varlink.MESSAGE_MAX}"').encode(),
        b"]" * 60_000 + b"[" * 60_000,
    ],
    ids=lambda message: f"{message[:60]!r} {len(message)}",
)
def test_what_is_no_call_is_refused(message: bytes) -> None:
    """Whatever is wrong with a message, it is one error, and nothing is made of it."""
    with pytest.raises(MessageError):
        varlink.parse_call(message)


@pytest.mark.parametrize(
    "message",
    [
        b'"' + b'\\"' * (varlink.MESSAGE_MAX // 2 - 1),
        b'"\\' * (varlink.MESSAGE_MAX // 2),
        b'{"method":"' + b"a-" * (varlink.MESSAGE_MAX // 2 - 10) + b'"}',
        b'{"method":"a' + b".0" * (varlink.MESSAGE_MAX // 2 - 10) + b'."}',
    ],
    ids=lambda message: f"{message[:20]!r}",
)
def test_time_for_a_message_is_bounded(message: bytes) -> None:
    """What makes a search begin anew at each byte is refused in some milliseconds all the same."""
    start = time.process_time()
    with pytest.raises(MessageError):
        varlink.parse_call(message)
    assert time.process_time() - start < 1


def test_messages_end_in_nul_and_are_read_again() -> None:
    """What is sent is JSON of one line with a NUL at the end."""
    sent = varlink.call(PING, {"a": "\0\n\U0001f600"})
    assert sent.count(b"\0") == 1
    assert sent.endswith(b"}\0")
    assert varlink.parse_call(sent[:-1]) == Call(PING, {"a": "\0\n\U0001f600"})
    assert varlink.parse_reply(varlink.reply({"b": 1})[:-1]) == {"b": 1}


def test_error_is_raised_where_it_is_parsed() -> None:
    """An error goes over the wire by its name and its parameters."""
    failed = CallError.of_service("InvalidParameter", parameter="idle")
    message = varlink.error(failed)
    assert json.loads(message[:-1]) == {
        "error": "org.varlink.service.InvalidParameter",
        "parameters": {"parameter": "idle"},
    }
    with pytest.raises(CallError) as raised:
        varlink.parse_reply(message[:-1])
    assert (raised.value.name, raised.value.parameters) == (failed.name, {"parameter": "idle"})


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({}, "path"),
        ({"path": None}, "path"),
        ({"path": 5}, "path"),
        ({"path": ["/a"]}, "path"),
        ({"path": "/a", "more": 5}, "more"),
        ({"path": "/a", "sudo": True}, "sudo"),
        ({"path": "/a", "sudo": None}, "sudo"),
        ({"path": "/a", "is_new": 1}, "is_new"),
        ({"path": "/a", "count": True}, "count"),
    ],
)
def test_wrong_parameter_is_named(parameters: dict[str, object], wrong: str) -> None:
    """A parameter that is missing, unknown, or of another type is answered as Varlink says."""
    types = {"path": str, "is_new": bool, "count": int}
    with pytest.raises(CallError) as raised:
        varlink.checked(Call(PING, parameters), types, ("path",))
    assert raised.value.name == "org.varlink.service.InvalidParameter"
    assert raised.value.parameters == {"parameter": wrong}


def test_null_is_a_parameter_that_is_left_out() -> None:
    """What may be left out may be null as well."""
    call = Call(PING, {"path": "/a", "is_new": None})
    assert varlink.checked(call, {"path": str, "is_new": bool}, ("path",)) == {"path": "/a"}


def test_errors_of_the_service_are_in_its_description() -> None:
    """org.varlink.service describes the errors that are sent in its name."""
    described = re.findall(r"^error (\w+)", varlink.DESCRIPTION, re.MULTILINE)
    assert "PermissionDenied" in described
    assert "InvalidParameter" in described


def test_channel_splits_what_comes_at_nul() -> None:
    """Messages are apart, however the bytes come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, 10)
        theirs.sendall(b"one\0two\0\0thr")
        assert [channel.receive() for _ in range(3)] == [b"one", b"two", b""]
        theirs.sendall(b"ee\0")
        theirs.shutdown(socket.SHUT_WR)
        assert (channel.receive(), channel.receive()) == (b"three", None)


def test_channel_refuses_half_a_message() -> None:
    """An end within a message is not taken for its end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"half")
        theirs.close()
        with pytest.raises(MessageError):
            Channel(ours, 10).receive()


def test_channel_refuses_a_message_without_end() -> None:
    """Not much more is taken in than a message may have."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        sent = theirs.send(b" " * (varlink.MESSAGE_MAX * 2))
        assert sent > varlink.MESSAGE_MAX
        with pytest.raises(MessageError):
            Channel(ours, 10).receive()


def test_channel_waits_no_longer_than_its_time() -> None:
    """Who says nothing more, or takes nothing, is not waited for."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"one\0half")
        channel = Channel(ours, 0.05)
        assert channel.receive() == b"one"
        with pytest.raises(TimeoutError):
            channel.receive()
        with pytest.raises(TimeoutError):
            Channel(ours, 0.05).send(b"x" * 10_000_000)


def test_channel_does_not_wait_for_drops() -> None:
    """Who sends a byte now and then has no more time than who says nothing."""
    ours, theirs = socket.socketpair()
    is_over = threading.Event()

    def drip() -> None:
        while not is_over.wait(0.01):
            theirs.sendall(b" ")

    dripping = threading.Thread(target=drip)
    with ours, theirs:
        dripping.start()
        try:
            with pytest.raises(TimeoutError):
                Channel(ours, 0.2).receive()
        finally:
            is_over.set()
            dripping.join()
