"""A user holds the lock of a socket of their own, for as long as they like."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, path_of

pytestmark = pytest.mark.alone

USER, OTHER_USER = 4242, 4243
SOON_S = 2
CONNECTED = """\
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
sockets = [listener, socket.create_connection(listener.getsockname()), listener.accept()[0]]
print(flush=True)
for line in sys.stdin:
    print(*(one.getsockopt(6, socket.TCP_KEEPIDLE) for one in sockets), flush=True)
"""


@pytest.mark.parametrize("mode", ["fill", "override", "enforce"])
def test_user_keeps_no_sockets_but_the_held_one_from_a_policy(
    own: Path, other_cgroup: Path, python: Any, hold: Any, write_policy: Any, kabpfctl: Any,
    mode: str,
) -> None:  # fmt: skip
    """In one network namespace: the sockets of another user have the policy when apply returns,
    within 2 s; the held one is owed, which is said, and is updated when it is let go of."""
    other = python(CONNECTED, cgroup=other_cgroup, uid=OTHER_USER, stdin=-1, text=True)
    assert other.stdout.readline() == "\n"

    def options() -> list[int]:
        print(file=other.stdin, flush=True)
        return [int(word) for word in other.stdout.readline().split()]

    cgroups = ", ".join(f"{{cgroup: {path_of(each)}}}" for each in (own, other_cgroup))
    write_policy("a.yaml", f"select: [{cgroups}]\nmode: {mode}\nkeepalive: {{idle: 60}}\n")
    kabpfctl("apply")
    assert options() == [60, 60, 60]
    holder = hold(own, uid=USER)
    write_policy("a.yaml", f"select: [{cgroups}]\nmode: {mode}\nkeepalive: {{idle: 61}}\n")
    began = time.monotonic()
    said = kabpfctl("apply").stderr
    assert time.monotonic() - began < SOON_S * PATIENCE
    assert options() == [61, 61, 61]
    assert f"not updated yet: process {holder.process.pid} holds a socket there" in said
    assert "not updated yet" in kabpfctl("status").stdout
    holder.idle()
    assert kabpfctl("apply").stderr == ""
    assert holder.idle() == 61
