"""How a process without the right to enter network namespaces has open sockets updated."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pytest

from kabpf.apply import one_by_one, retrofit
from kabpf.apply.retrofit import Left
from kabpf.apply.visitors import Outcome, Part
from kabpf.errors import RefusedError
from kabpf.kernel import abi, capabilities, dataplane
from kabpf.kernel.dataplane import Holder
from kabpf.kernel.namespaces import Namespace

NOWHERE = Path("/nowhere")


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of kabpf-retrofit, for a process that lacks CAP_SYS_ADMIN."""
    monkeypatch.setattr(retrofit, "HELPER", tmp_path / "retrofit.socket")
    monkeypatch.setattr(capabilities, "missing", lambda names: names)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(retrofit.HELPER))
        listener.listen()
        listener.settimeout(10)
        yield listener


def test_helper_is_asked_and_not_waited_for(helper: socket.socket) -> None:
    """The descriptor can be read from when it has answered."""
    answer = retrofit.begin({8, 7}, NOWHERE, NOWHERE, {2, 1})
    os.set_blocking(answer, False)
    connection, _ = helper.accept()
    with connection, open(answer, "rb") as stream:
        connection.settimeout(10)
        asked = b"".join(iter(lambda: connection.recv(4096), b""))
        assert json.loads(asked) == {"owed": [7, 8], "processes": [1, 2]}
        assert stream.read() is None  # nothing yet
        connection.sendall(json.dumps({"refused": "", "cgroups": [7], "left": ["why"]}).encode())
        connection.close()
        assert retrofit.answered(stream.read()) == Left(frozenset({7}), ("why",))


def test_helper_that_is_not_there_is_said(helper: socket.socket) -> None:
    """With what to do; and so is one that ends without an answer, or refuses."""
    helper.close()
    with pytest.raises(RefusedError, match="systemctl restart kabpf-retrofit"):
        retrofit.begin({7}, NOWHERE, NOWHERE, None)
    with pytest.raises(RefusedError, match="systemctl restart kabpf-retrofit"):
        retrofit.answered(b"")
    with pytest.raises(RefusedError, match="no way in"):
        retrofit.answered(b'{"refused": "no way in", "cgroups": [], "left": []}')


def test_helper_that_does_not_read_is_waited_for_a_while(
    helper: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked may be more than a socket has room for."""
    assert helper.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 1 << 20
    monkeypatch.setattr(retrofit, "BEGIN_S", 0.01)
    with pytest.raises(RefusedError, match="systemctl restart kabpf-retrofit"):
        retrofit.begin(range(1 << 18), NOWHERE, NOWHERE, None)


def test_namespaces_without_end_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may make any number, each with a socket that is owed the update. What there is no time
    for is tried one by one, and stays owed where that does not do; it is no namespace in which
    nothing is known to be."""
    own, first, second, empty = 1, 2, 3, 4
    holders = [Holder(7, 1, first, 5, 3, abi.OWED), Holder(8, 2, second, 6, 3, abi.OWED)]
    tried: list[int] = []

    def outcomes(_: object, parts: Iterable[Part]) -> Iterator[Outcome]:
        found = [([each.inode for each in part.namespaces], part.seconds) for part in parts]
        assert found == [
            ([own], math.inf),
            ([first, second], retrofit.KNOWN_S),
            ([empty], retrofit.UNKNOWN_S),
        ]
        yield Outcome(first)
        yield Outcome(second, was_skipped=True)
        yield Outcome(empty, was_skipped=True)

    def update(_pins: Path, _root: Path, namespaces: Collection[int]) -> list[Holder]:
        tried.extend(namespaces)
        return holders[1:]

    monkeypatch.setattr(retrofit, "outcomes", outcomes)
    monkeypatch.setattr(retrofit, "own_namespace", lambda: Namespace(own))
    monkeypatch.setattr(retrofit, "held_namespaces", lambda _: {empty: Namespace(empty)})
    monkeypatch.setattr(dataplane, "holders", lambda _: iter(holders))
    monkeypatch.setattr(one_by_one, "update", update)
    left = retrofit._update(NOWHERE, NOWHERE, frozenset({7, 8}), None)
    assert tried == [second]
    assert left.cgroups == {8}
    assert left.reasons == (
        "open sockets in network namespace 3 are not updated yet: the time was used up by others",
        "1 network namespaces were not searched: no process has a socket of these cgroups"
        " open there",
    )
