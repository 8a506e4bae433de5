"""`import` over a tree in which every file may be a stranger's: within 2 s and 100 MB."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from harness import PATIENCE

SECONDS, MEGABYTES = 2, 100
MIB = 1 << 20
UNREADABLE = {
    "fifo": lambda path: os.mkfifo(path),
    "fifo with a writer": lambda path: (os.mkfifo(path), os.open(path, os.O_RDWR | os.O_NONBLOCK)),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o666),
    "disk": lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 0)),
    "tty": lambda path: path.symlink_to("/dev/tty"),
    "ptmx": lambda path: path.symlink_to("/dev/ptmx"),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "kmsg": lambda path: path.symlink_to("/proc/kmsg"),
    "environment of root's": lambda path: path.symlink_to("/proc/1/environ"),
    "loop": lambda path: path.symlink_to(path.name),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "1 MiB and one byte": lambda path: path.write_bytes(b"x" * (MIB + 1)),
}
OF_WHICH_THE_HEAD_SAYS = ("huge", "1 MiB and one byte")  # that they are no scripts
PLACES = ("etc/env.d", "etc/default", "etc/cron.d", "etc/profile.d", "etc/init.d", "opt/bin")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A machine's root, with every hostile file of the catalogue in each place that is read."""
    writers: list[int] = []
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for place in PLACES:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for number, make in enumerate(UNREADABLE.values()):
            made = make(tmp_path / place / f"u{number}")
            if isinstance(made, tuple) and isinstance(made[1], int):
                writers.append(made[1])
        for raw in (*hostile.NAMES.values(), *hostile.WITH_NEWLINES.values()):
            path = os.path.join(os.fsencode(tmp_path / place), raw[:200])
            with open(path, "wb") as file:
                file.write(b"#!/bin/sh\nLD_PRELOAD=libdontdie.so\nexport LD_PRELOAD\n")
                file.write(b"DD_TCP_KEEPALIVE_TIME=" + b"9" * 5000 + b"\n")
        for name, content in {
            "quoted": b'A="' + b"a" * (MIB - 10) + b'"\n',
            "quotes": b'A="' * (MIB // 4),
            "backslashes": b"A=" + b"\\" * (MIB - 10) + b"\n",
            "dollars": b"A=" + b"${A" * (MIB // 4),
            "nothing but NUL": bytes(MIB - 10),
            "words": b"LD_PRELOAD " * (MIB // 12),
            "calls itself": b"#!/bin/sh\n. /" + place.encode() + b"/calls-itself\n" * 1000,
        }.items():
            (tmp_path / place / name.replace(" ", "-")).write_bytes(content)
    lines = ["[Service]", "EnvironmentFile=-/etc/env.d/*"]
    lines += [f"ExecStartPre=/opt/bin/u{number}" for number in range(len(UNREADABLE))]
    lines += ["ExecStart=/opt/bin/calls-itself", f"Environment=A={'9' * 5000}"]
    (units / "db.service").write_text("\n".join(lines) + "\n")
    for number in range(60):
        (tmp_path / f"etc/env.d/z{number}").write_bytes(b'B="' + b"b" * (MIB - 100) + b'"\nC=1\n')
    yield tmp_path
    for each in writers:
        os.close(each)


PROGRAM = """\
import json, os, resource, sys
from pathlib import Path
from kabpf import output
from kabpf.commands import import_
from kabpf.migration import proposals
found = proposals.look(Path(sys.argv[1]), proc=None)
status = dict(line.split(":\t") for line in open("/proc/self/status").read().splitlines())
print(json.dumps(import_.as_json(found) | {"kilobytes": int(status["VmHWM"].split()[0])}))
for line in import_.text(found):
    print(output.shown(line), file=sys.stderr)
for line in found.unread:
    print(output.shown(line), file=sys.stderr)
"""


@pytest.mark.core
def test_every_hostile_file_at_once(tree: Path) -> None:
    """It ends in time and within its memory, names each file that it did not read, with the
    reason, and no name or text makes a line of a policy."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output_file, tempfile.TemporaryFile() as errors_file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, tree],
            stdout=output_file,
            stderr=errors_file,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (30, 30)),
        )
        _, status, used = os.wait4(process.pid, 0)  # of this process, and of no other
        process.returncode = os.waitstatus_to_exitcode(status)
        took = time.monotonic() - begin
        output, errors = (
            os.pread(each.fileno(), 1 << 26, 0) for each in (output_file, errors_file)
        )
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert hostile.wrong_with(errors, "C.UTF-8") == ""
    unread = "\n".join(found["unread"])
    for place in PLACES:
        for number, kind in enumerate(UNREADABLE):
            if not (place == "opt/bin" and kind in OF_WHICH_THE_HEAD_SAYS):
                assert f"{tree}/{place}/u{number}: not read: " in unread, (place, kind)
    for policy in found["policies"]:
        assert all(line.isprintable() for line in policy["text"].split("\n"))
        assert "enforce" not in policy["text"].replace("#", "\n#").split("\n#")[0]
    # Beside other tests the processor's time says more than the clock's.
    assert used.ru_utime + used.ru_stime < SECONDS * PATIENCE, f"{used.ru_utime:.1f} s"
    assert took < 5 * SECONDS * PATIENCE, f"{took:.1f} s"
    assert found["kilobytes"] < MEGABYTES * 1024, f"{found['kilobytes'] >> 10} MB"


def test_import_of_this_machine_ends(command: Any) -> None:
    """Processes may have any name and environment while it looks."""
    done = command("import", "--json", seconds=20)
    assert done.returncode in (0, 1)
    json.loads(done.stdout)
