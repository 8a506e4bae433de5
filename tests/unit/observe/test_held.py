"""Which TCP sockets a process holds."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest

from kabpf.observe import held
from kabpf.observe.sockets import Address, Socket


@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "")],
    ids=["ipv4", "ipv6", "any"],
)
def test_sockets_of_a_process_are_found(family: socket.AddressFamily, host: str) -> None:
    """By both ends, in its own network namespace; those of others are not."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((host or "::1", port)) as client:
            mine = client.getsockname()[1]
            there = host or "::1"
            listening = made(Address(host or "::", port), Address("0.0.0.0", 0))
            connected = made(Address(there, mine), Address(there, port))
            apart = replace(connected, namespace=namespace + 1)
            other = made(Address(there, mine), Address(there, port + 1))
            sockets = [listening, connected, apart, other]
            assert held.of_process("self", sockets) == [listening, connected]
            assert held.of_process("4194304", sockets) == []
    assert held.of_process("self", sockets) == []


def test_listeners_of_processes_are_found() -> None:
    """By the address, in the process's own network namespace; connections are left out, and a
    process that is gone holds nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listening = made(Address("127.0.0.1", port), Address("0.0.0.0", 0))
        apart = replace(listening, namespace=listening.namespace + 1)
        connected = replace(listening, state="established")
        sockets = [listening, apart, connected]
        assert list(held.listeners([4194304, os.getpid()], sockets)) == [(os.getpid(), [listening])]
    assert list(held.listeners([os.getpid()], sockets)) == []


def test_descriptors_without_end_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """For listeners; a process has them among its first."""
    looks: list[str] = []
    real = os.readlink

    def look(path: str) -> str:
        looks.append(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", look)
    monkeypatch.setattr(held, "LISTENERS_AMONG", 64)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listening = made(Address("127.0.0.1", listener.getsockname()[1]), Address("0.0.0.0", 0))
        many = [os.dup(listener.fileno()) for _ in range(300)]
        try:
            found = list(held.listeners([os.getpid()], [listening]))
        finally:
            for each in many:
                os.close(each)
    assert found == [(os.getpid(), [listening])]
    assert len(looks) == 64


def made(local: Address, remote: Address) -> Socket:
    namespace = os.stat("/proc/self/ns/net").st_ino
    options = (None, None, None, None, None, None, None)
    return Socket(1, "/a", namespace, "ipv4", local, remote, "listen", *options, {})
