"""Visits the sockets that are open when a policy comes into force.

The iterator sees one network namespace. To visit all of them takes capabilities that kabpfd does
without; it asks kabpf-retrofit (systemd/), which has them and does nothing else: one connection is
one request, which names processes, or none for the whole machine. Both sides speak JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from kabpf.errors import RefusedError, all_refusals
from kabpf.kernel import capabilities, dataplane
from kabpf.kernel.dataplane import PINS
from kabpf.kernel.namespaces import network_namespaces

HELPER = Path("/run/kabpf/retrofit.socket")
ANSWER_S = 120  # what a hundred million sockets take; RuntimeMaxSec= of the helper


def visit(pins: Path = PINS, processes: Iterable[int] | None = None) -> None:
    """Give the open sockets of cgroups that are owed it what their policy says: in the network
    namespaces of these processes, or with None in every one of the machine.

    Raises RefusedError with all that was refused; the other namespaces are visited.
    """
    if capabilities.missing(("CAP_SYS_ADMIN",)):
        _ask(None if processes is None else sorted(processes))
    else:
        _visit(pins, processes)


def serve(descriptor: int) -> None:
    """Do what `visit` asks for at the other end of a stream socket, which may be gone any time.

    Raises RefusedError where the descriptor is no socket.
    """
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError as error:
        raise RefusedError("read a request", error.errno or 0, "expected a socket") from None
    with connection, contextlib.suppress(ConnectionError):
        if not (request := _received(connection)):
            return
        refused = ""
        try:
            _visit(PINS, json.loads(request))
        except RefusedError as error:
            refused = str(error)
        connection.sendall(json.dumps({"refused": refused}).encode())


def _visit(pins: Path, processes: Iterable[int] | None) -> None:
    with all_refusals() as collected:
        for namespace in network_namespaces(processes):
            with collected():
                dataplane.retrofit(pins, namespace)


def _ask(processes: list[int] | None) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(str(HELPER))
            connection.sendall(json.dumps(processes).encode())
            connection.shutdown(socket.SHUT_WR)
            answer = json.loads(_received(connection))
        except (OSError, ValueError) as error:
            raise RefusedError(
                f"visit open sockets by {HELPER}",
                (error.errno or 0) if isinstance(error, OSError) else 0,
                "expected CAP_SYS_ADMIN, or kabpf-retrofit.socket to be active",
            ) from None
    if answer["refused"]:
        raise RefusedError(answer["refused"])


def _received(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))
