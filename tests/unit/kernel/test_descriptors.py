"""What a process may have of one socket: as many descriptors as its limit allows."""

from __future__ import annotations

import ctypes
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabpf.apply import retrofit
from kabpf.kernel import abi, dataplane
from kabpf.kernel.dataplane import OPEN_LISTER, Holder

PIECES, IN_A_PIECE = 1000, 300
ROOM = 4 << 20  # bytes; all of it has 30 MB and 10 MB


def test_descriptors_of_one_socket_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is listed without waiting for a held socket, and so in a scrape."""
    records = [abi.CSocket(cgroup_id=7, next_probe_ms=number % 2) for number in range(IN_A_PIECE)]
    raw = b"".join(map(bytes, records))

    def output(iterator: Path) -> Iterator[bytes]:
        assert iterator.name == OPEN_LISTER
        for _ in range(PIECES):
            yield bytes(bytearray(raw))

    monkeypatch.setattr(dataplane, "output", output)
    tracemalloc.start()
    try:
        found = [one.next_probe_ms for one in dataplane.open_sockets(Path("/nowhere"))]
        assert tracemalloc.get_traced_memory()[1] < ROOM < PIECES * len(raw)
    finally:
        tracemalloc.stop()
    assert found == [0, 1]


def test_descriptors_of_two_sockets_in_turn_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what tells where open sockets are: of two in a row in one cgroup the kernel tells one."""
    pack = abi.HOLDER.pack
    piece = b"".join(pack(7 + number % 2, 1, 2, 3, number, 0) for number in range(IN_A_PIECE))
    assert len(piece) == IN_A_PIECE * ctypes.sizeof(abi.CHolder)

    def output(_: Path) -> Iterator[bytes]:
        for _ in range(PIECES // 10):
            yield bytes(bytearray(piece))

    monkeypatch.setattr(dataplane, "output", output)
    tracemalloc.start()
    try:
        found = retrofit._holders(Path("/nowhere"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert found == [Holder(7, 1, 2, 3, 0, 0), Holder(8, 1, 2, 3, 1, 0)]
