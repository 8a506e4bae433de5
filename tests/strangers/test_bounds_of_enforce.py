"""What a covered process does to get out of `enforce` or of a range, as the user that it is."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from harness import path_of

MILLISECONDS = 500
FLIPS = [
    # mode, keepalive, option, the two values, what may be found
    ("enforce", "{idle: 61, user_timeout: 90s}", socket.TCP_KEEPIDLE, (61, 9999), {61}),
    ("enforce", "{idle: 61, user_timeout: 90s}", socket.TCP_USER_TIMEOUT, (90_000, 0), {90_000}),
    ("fill", "{idle: 30s..5m}", socket.TCP_KEEPIDLE, (40, 9999), {40, 300}),
]


@pytest.mark.parametrize("case", FLIPS)
@pytest.mark.parametrize(
    "length", [4, 16, 17, 4096, pytest.param(4097, marks=pytest.mark.core), 1 << 20]
)
def test_second_thread_flips_nothing(
    own: Path, peer: Any, compiled: Any, stranger: Any, write_policy: Any, kabpfctl: Any,
    case: Any, length: int,
) -> None:  # fmt: skip
    """A thread changes the memory that setsockopt(2) is given, for any length of it."""
    mode, keepalive, option, values, allowed = case
    select = f"select: [{{cgroup: {path_of(own)}}}]"
    write_policy("a.yaml", f"{select}\nmode: {mode}\nkeepalive: {keepalive}\n")
    kabpfctl("apply")
    _, (_, port) = peer().listener()
    program = compiled("flipper.c", "-pthread")
    program.chmod(0o755)
    for directory in program.parents:
        if directory.stat().st_mode & 0o5 != 0o5 and str(directory).startswith("/tmp/"):
            directory.chmod(directory.stat().st_mode | 0o5)
    words = (program, port, socket.SOL_TCP, option, *values, length, MILLISECONDS)
    output, _ = stranger(*words, cgroup=own).communicate(timeout=30)
    found = {int(word) for word in output.split()}
    assert found and found <= allowed


CHILDREN = """\
import os, socket, sys, time
# In a cgroup of its own making, of whatever name, below the covered one.
for name in (b"a", b"x.service", b"x" * 255, b"\\xff\\xfe", b"a (deleted)"):
    os.mkdir(name)
    with open(os.path.join(name, b"cgroup.procs"), "w") as file:
        file.write("0")
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as one:
        for option, value in ((4, 15), (18, 0)):
            one.setsockopt(6, option, value)
        print(one.getsockopt(6, 4), one.getsockopt(1, 9), flush=True)
"""


@pytest.mark.core
def test_cgroups_of_a_users_making_are_covered(
    own: Path, peer: Any, python: Any, write_policy: Any, kabpfctl: Any
) -> None:
    """A policy for all below holds in every cgroup that a user makes there, at once."""
    select = f'select: [{{cgroup: "{path_of(own)}/**"}}]'
    write_policy("a.yaml", f"{select}\nmode: enforce\nkeepalive: {{idle: 61}}\n")
    kabpfctl("apply")
    _, (_, port) = peer().listener()
    output, _ = python(CHILDREN, port, cgroup=own, cwd=own).communicate(timeout=30)
    assert output.split(b"\n") == [b"61 1"] * 5 + [b""]
