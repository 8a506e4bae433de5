"""`log: sockets`: one covered process does not take the lines of other policies."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, PINS, path_of, wait_until

from kabpf.kernel.dataplane import READERS

USER = 4242

BUSY = """\
import socket, sys, time
end = time.monotonic() + float(sys.argv[2])
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as one:
    while time.monotonic() < end:
        for value in range(1000):
            one.setsockopt(6, 4, 15 + value % 7)  # in vain
"""
BIRTHS = """\
import os, sys, time
end = time.monotonic() + float(sys.argv[2])
os.chdir(sys.argv[1])
made = 0
while time.monotonic() < end:
    for _ in range(100):
        os.mkdir("storm")
        os.rmdir("storm")
    made += 100
print(made)
"""
SECONDS = 6
PART, WINDOW_S = 256, (1 << 28) / 1e9  # KABPF_LOG_PART; has_part() in bpf/report.h


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


def test_storm_of_cgroups_leaves_other_policies_their_lines(
    own: Path, make_cgroup: Any, peer: Any, python: Any, write_policy: Any, kabpfd: Any,
    written: Counter[str],
) -> None:  # fmt: skip
    """Users make and remove cgroups as fast as they can, covered ones and others: the log has a
    bounded part of these events, and each connection of another policy."""
    quiet, loud = make_cgroup("quiet"), make_cgroup("loud")
    os.chown(loud, USER, USER)
    for name, cgroup in (("busy", own), ("quiet", quiet)):
        select = f"policies:\n  {name}:\n    select: [{{cgroup: {path_of(cgroup)}}}]\n"
        write_policy(f"{name}.yaml", f"{select}    keepalive: {{idle: 61}}\n    log: sockets\n")
    kabpfd()
    _, address = peer().listener()
    client = peer(quiet)
    storms = [python(BIRTHS, cgroup, SECONDS) for cgroup in (own, loud)]
    deadline = time.monotonic() + SECONDS
    connections = 0
    while time.monotonic() < deadline - 2:
        client.close(client.connection(address))
        connections += 1
        time.sleep(0.01)
    made = sum(int(storm.communicate(timeout=20 * PATIENCE)[0]) for storm in storms)
    dumped = subprocess.check_output(["bpftool", "-j", "map", "dump", "pinned", PINS / READERS])
    lost = {row["formatted"]["key"]: row["formatted"]["value"] for row in json.loads(dumped)}
    windows = SECONDS * PATIENCE / WINDOW_S + 2
    assert made - lost[1] <= len(storms) * windows * PART
    wait_until(lambda: written["quiet"] >= connections, "a line for each connection", SECONDS)
