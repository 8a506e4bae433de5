"""Serves one connection of a user (Varlink)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator

from kabpf.errors import KabpfError, PolicyError, RefusedError
from kabpf.requests import peercred, varlink
from kabpf.requests.access import TABLE, allowed
from kabpf.requests.channel import Channel
from kabpf.requests.interface import INTERFACE, refused
from kabpf.requests.methods import WRONG
from kabpf.requests.peercred import Peer
from kabpf.requests.varlink import Call, CallError
from kabpf.runtime.locks import RUN, open_lock

TALK_S = 10  # for all that the caller has to send and to take
CALLS_MAX = 16  # in a connection; varlinkctl makes three
CONNECTIONS_MAX = 4  # of a user at once; systemd counts them by users since version 256


def serve(descriptor: int, say: Callable[[str], None]) -> None:
    """Answer the calls that come by a connected socket, which is closed then.

    `say` is told what was done, and what was no message. Raises RefusedError where the descriptor
    is no Unix socket.
    """
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
        peer = peercred.peer(connection)
    except OSError as error:
        raise RefusedError("read a request", error.errno or 0, "expected a Unix socket") from None
    os.umask(0o022)  # policy files are for everybody to read
    # Somebody in other user namespaces may have uids by the ten thousand.
    holder = peer.uid if peer.is_full else peercred.OVERFLOW_UID
    with connection, _slot(holder) as is_free:
        if not is_free:
            return
        channel = Channel(connection, TALK_S)
        try:
            for _ in range(CALLS_MAX):
                if (message := channel.receive()) is None:
                    return
                call = varlink.parse_call(message)
                answer = _answer(call, peer, say)
                if not call.oneway:
                    channel.send(answer)
        except ConnectionError:
            pass  # gone before its answer
        except (varlink.MessageError, TimeoutError) as problem:
            say(f"uid {peer.uid}: {problem}")


@contextlib.contextmanager
def _slot(uid: int) -> Iterator[bool]:
    """Whether the user has not too many connections already. Each has one byte of a file locked, of
    as many as a user may have; the lock goes with its process."""
    descriptor = open_lock(RUN, "request.lock")
    try:
        first = uid * CONNECTIONS_MAX
        yield any(_locked(descriptor, first + number) for number in range(CONNECTIONS_MAX))
    finally:
        os.close(descriptor)


def _locked(descriptor: int, byte: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except BlockingIOError:
        return False
    return True


def _answer(call: Call, peer: Peer, say: Callable[[str], None]) -> bytes:
    try:
        try:
            request = allowed(call, peer)
            parameters = TABLE[call.method].handle(request)
        except PolicyError:
            raise refused(WRONG) from None  # users may not read them
        except KabpfError as error:
            raise refused(str(error)) from None
    except CallError as error:
        return varlink.error(error)
    if call.interface == INTERFACE:
        say(f"uid {peer.uid}: {call.method} {request.cgroup.path}")
    return varlink.reply(parameters)
