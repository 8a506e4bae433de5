"""Files that strangers wrote: nothing ends `kabpfctl import`, or has it wait, open a device, or
write lines that nobody meant."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kabpf.migration import files, preloads, proposals
from kabpf.policy import parser

UNIT = "etc/systemd/system/db.service"
NAMES = (
    b"a\nmode: enforce\n#", b"\x1b[31m", b"\xff\xfe", b"\xe2\x80\xae", b"a: b", b'"',
    b"x (deleted)", b"-", b"#", b"a\rb", b"\xc2\x85", b"\xe2\x80\xa8mode: enforce",
)  # fmt: skip


def write(root: Path, name: str | bytes, text: str) -> None:
    path = os.path.join(os.fsencode(root), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(text.encode())


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(tmp_path: Path, name: bytes) -> None:
    """Whatever a file is called, it is read, and a policy has its lines and no others."""
    write(tmp_path, UNIT, "[Service]\nEnvironmentFile=/etc/env.d/*\nExecStart=db\n")
    write(tmp_path, b"etc/env.d/" + name, "LD_PRELOAD=libdontdie.so\nDD_TCP_KEEPALIVE_TIME=60\n")
    write(tmp_path, b"etc/cron.d/" + name, "LD_PRELOAD=libdontdie.so\n")
    write(tmp_path, b"etc/containers/systemd/" + name + b".container", "[Container]\n")
    found = proposals.look(tmp_path, proc=None)
    (policy,) = found.policies
    assert policy.text.splitlines()[1:] == [
        "select: [{unit: db.service}]", "keepalive: {idle: 60}",
    ]  # fmt: skip
    assert policy.text.splitlines()[0].isprintable()
    parser.parse(policy.text.encode(), "db.service.yaml")
    assert len(found.unclear) == 1


@pytest.mark.parametrize("kind", ["fifo", "/dev/ptmx", "/dev/zero", "/proc/kmsg", "loop", "huge"])
@pytest.mark.parametrize(
    "place",
    ["opt/db", "etc/env.d/x", "etc/default/x", "root/.bashrc", "etc/cron.d/x", "opt/lib.so",
        "etc/pam.d/cron", "etc/environment", "etc/sv/x/run", "opt/script"],
)  # fmt: skip
def test_what_is_no_file_is_not_opened(tmp_path: Path, place: str, kind: str) -> None:
    """A FIFO, a device, a file of the kernel's or one without end is named, and nothing waits."""
    write(
        tmp_path, UNIT,
        "[Service]\nEnvironmentFile=-/etc/env.d/*\nEnvironment=LD_PRELOAD=/opt/lib.so\n"
        "ExecStart=/opt/db\nExecReload=sh /opt/script\n",
    )  # fmt: skip
    write(tmp_path, "etc/environment", "LD_PRELOAD=libdontdie.so\n")
    path = tmp_path / place
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.write(b"#!")
            file.truncate(1 << 40)
    else:
        path.symlink_to(path.name if kind == "loop" else kind)
    found = proposals.look(tmp_path, proc=None)
    said = [line for line in found.unread if line.startswith(f"{path}: not read: ")]
    is_head = place == "opt/lib.so" and kind == "huge"  # of which only the beginning is looked at
    assert bool(said) != is_head


def test_fifo_with_a_writer(tmp_path: Path) -> None:
    """A FIFO is known before it is opened, so that its writer notices nothing."""
    write(tmp_path, UNIT, "[Service]\nExecStart=/opt/db\n")
    (tmp_path / "opt").mkdir()
    os.mkfifo(tmp_path / "opt/db")
    both = os.open(tmp_path / "opt/db", os.O_RDWR | os.O_NONBLOCK)
    os.write(both, b"#!/bin/sh\n")
    proposals.look(tmp_path, proc=None)
    assert os.read(both, 100) == b"#!/bin/sh\n"
    os.close(both)


@pytest.mark.parametrize("digits", [10, 11, 5000])
def test_numbers_of_any_length(tmp_path: Path, digits: int) -> None:
    """A number that no int holds is out of range, in every variable."""
    number = "9" * digits
    write(
        tmp_path, UNIT,
        f"[Service]\nEnvironment=LD_PRELOAD=libdontdie.so:libkeepalive_socket.so KEEPCNT={number}"
        f" DD_TCP_KEEPALIVE_TIME={number} TCP_USER_TIMEOUT=+{number} DD_DEBUG={number}\n",
    )  # fmt: skip
    found = proposals.look(tmp_path, proc=None)
    assert len(found.policies) == 1
    assert len(found.left_out) == 3
    assert max(map(len, found.left_out)) < 1000


def test_bounds_are_said(tmp_path: Path) -> None:
    """Of many large files some are read, and each of the others is named."""
    write(tmp_path, UNIT, "[Service]\nEnvironmentFile=/etc/env.d/*\n")
    for number in range(60):
        write(tmp_path, f"etc/env.d/{number}", f'A="{"a" * 999_000}"\nB=1\n')
    write(tmp_path, "etc/env.d/many", "DD_DEBUG=1\n" * (preloads.ASSIGNMENTS_MAX + 1))
    write(tmp_path, "etc/env.d/zero", "A" * (files.BYTES_MAX + 1))
    begin = time.process_time()
    found = proposals.look(tmp_path, proc=None)
    assert time.process_time() - begin < 5
    assert len(found.unread) > 55
    assert all("not read: " in line for line in found.unread)


def test_patterns_are_bounded(tmp_path: Path) -> None:
    """A pattern that names too many files says so."""
    write(tmp_path, UNIT, "[Service]\nEnvironmentFile=/etc/env.d/*\n")
    for number in range(files.MATCHES_MAX + 1):
        write(tmp_path, f"etc/env.d/{number}", "A=1\n")
    found = proposals.look(tmp_path, proc=None)
    assert f"more than {files.MATCHES_MAX} files" in "".join(found.unread)
