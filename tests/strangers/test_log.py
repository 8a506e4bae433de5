"""`log: sockets`: one covered process does not take the lines of other policies."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, path_of, wait_until

BUSY = """\
import socket, sys, time
end = time.monotonic() + float(sys.argv[2])
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as one:
    while time.monotonic() < end:
        for value in range(1000):
            one.setsockopt(6, 4, 15 + value % 7)  # in vain
"""
SECONDS = 6


@pytest.fixture
def written() -> Iterator[Counter[str]]:
    """How many lines journald would have of each policy; what stands in for it reads at once."""
    directory = Path("/run/systemd/journal")
    directory.parent.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory.parent], check=True)
    directory.mkdir()
    found: Counter[str] = Counter()
    # As systemd sets it at boot; a socket keeps what it was when it was made.
    length = Path("/proc/sys/net/unix/max_dgram_qlen")
    before = length.read_text()
    length.write_text("512")
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    length.write_text(before)
    channel.bind(str(directory / "socket"))

    def read() -> None:
        while raw := channel.recv(1 << 16):
            match = re.search(rb"^KABPF_POLICY=(.*)$", raw, re.MULTILINE)
            found[os.fsdecode(match[1]) if match else ""] += 1

    reader = threading.Thread(target=read)
    reader.start()
    yield found
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
        last.sendto(b"", str(directory / "socket"))
    reader.join()
    channel.close()
    subprocess.run(["umount", directory.parent], check=True)


def test_busy_process_leaves_other_policies_their_lines(
    own: Path, make_cgroup: Any, peer: Any, python: Any, write_policy: Any, kabpfd: Any,
    written: Counter[str],
) -> None:  # fmt: skip
    """While one process makes calls in vain as fast as it can, a connection of another policy is
    logged, and so is how much was not."""
    quiet = make_cgroup("quiet")
    for name, cgroup in (("busy", own), ("quiet", quiet)):
        select = f"policies:\n  {name}:\n    select: [{{cgroup: {path_of(cgroup)}}}]\n"
        rest = "    mode: enforce\n    keepalive: {idle: 61}\n    log: sockets\n"
        write_policy(f"{name}.yaml", select + rest)
    kabpfd()
    _, address = peer().listener()
    client = peer(quiet)
    busy = python(BUSY, address[1], SECONDS, cgroup=own)
    wait_until(lambda: written["busy"] > 1000, "the busy process", SECONDS)
    for _ in range(20):
        client.connection(address)
    wait_until(lambda: written["quiet"] >= 20, "the lines of the quiet policy", SECONDS)
    busy.wait(20 * PATIENCE)
    assert written["busy"] <= 4000
