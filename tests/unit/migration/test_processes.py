"""What runs now, held against what the files say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kabpf.migration import proposals
from kabpf.migration.processes import Processes
from kabpf.migration.wanted import WATCHED

LIBRARY = "/usr/lib/x86_64-linux-gnu/libdontdie.so.0"
MAPS = (
    "55d0-55d1 r--p 00000000 fe:00 123                        /usr/bin/app\n"
    "7f00-7f01 r-xp 00000000 fe:00 124                        {}\n"
    "7ffd-7ffe rw-p 00000000 00:00 0                          [stack]\n"
)
UNIT = "etc/systemd/system/app.service"
GIVEN = "[Service]\nEnvironment=LD_PRELOAD=libdontdie.so DD_TCP_KEEPALIVE_TIME=60\nExecStart=app\n"


def process(
    root: Path, pid: int, cgroup: str, maps: str, *variables: str, command: str = "app"
) -> None:
    directory = root / f"proc/{pid}"
    directory.mkdir(parents=True)
    (directory / "maps").write_text(maps)
    (directory / "environ").write_text("".join(f"{each}\0" for each in variables))
    (directory / "cgroup").write_bytes(os.fsencode(f"0::{cgroup}\n"))
    (directory / "cmdline").write_bytes(os.fsencode(f"{command}\0--flag\0"))


def look(root: Path, unit: str = "") -> proposals.Found:
    if unit:
        (root / UNIT).parent.mkdir(parents=True)
        (root / UNIT).write_text(unit)
    return proposals.look(root, root / "proc")


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("/system.slice/app.service", "app.service"),
        ("/system.slice/docker-12ab.scope", "docker-12ab.scope"),
        ("/machine.slice/libpod-12ab.scope/container", "libpod-12ab.scope"),
        ("/system.slice/docker-12ab.scope/system.slice/in.service", "docker-12ab.scope"),
        ("/user.slice/user-1.slice/session-4.scope", "session-4.scope"),
        ("/user.slice/user-1.slice/user@1.service/app.slice/a.service",
            "a.service of user@1.service"),
        ("/kubepods/pod1/2", "cgroup /kubepods/pod1/2"),
        ("/", "cgroup /"),
    ],
)  # fmt: skip
def test_process_that_no_file_accounts_for(tmp_path: Path, cgroup: str, name: str) -> None:
    """It is an error with PID, unit and command; several of one unit are one."""
    for pid in (7, 8, 9, 10):
        process(tmp_path, pid, cgroup, MAPS.format(LIBRARY), "DD_TCP_KEEPALIVE_TIME=60")
    process(tmp_path, 11, cgroup, MAPS.format("/usr/lib/libother.so"), "LD_PRELOAD=libother.so")
    (said,) = look(tmp_path).unclear
    assert said.startswith(f"PID 7, 8, 9 and 1 more (app --flag) in {name}: libdontdie.so is")
    assert "no file that was read accounts for it (keepalive: {idle: 60})" in said


def test_process_that_files_account_for(tmp_path: Path) -> None:
    """Nothing is said of what the files say, and a warning where values differ."""
    process(tmp_path, 7, "/system.slice/app.service", MAPS.format(LIBRARY),
        "LD_PRELOAD=libdontdie.so", "DD_TCP_KEEPALIVE_TIME=60")  # fmt: skip
    found = look(tmp_path, GIVEN)
    assert (found.unclear, found.left_out) == ([], [])
    (tmp_path / UNIT).write_text(GIVEN.replace("60", "30"))
    found = look(tmp_path)
    assert found.unclear == []
    (said,) = found.left_out
    assert "runs with keepalive: {idle: 60}, the files say keepalive: {idle: 30}" in said


def test_texts_of_a_process(tmp_path: Path) -> None:
    """What a process calls itself is bounded; where it is over by now, nothing is said."""
    command = "x\n0::/system.slice/app.service\n\x1b[2J\udcff" + "y" * 5000
    process(tmp_path, 7, "/a\x1b/b.service", MAPS.format(f"/x\\012y/{LIBRARY} (deleted)"),
        command=command)  # fmt: skip
    (tmp_path / "proc/8").mkdir()
    (tmp_path / "proc/x").mkdir()
    (said,) = look(tmp_path, GIVEN).unclear
    assert "in b.service: libdontdie.so is preloaded" in said
    assert len(said) < 600


def test_library_of_another_name(tmp_path: Path) -> None:
    """A library that LD_PRELOAD names is known by what is in it."""
    process(tmp_path, 7, "/a.service", MAPS.format("/opt/ka.so"), "LD_PRELOAD=/opt/ka.so")
    path = tmp_path / "proc/7/root/opt/ka.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0DD_TCP_KEEPALIVE_TIME\0")
    (said,) = look(tmp_path).unclear
    assert "ka.so is preloaded" in said


def test_process_of_this_machine() -> None:
    """A process with one of the real libraries is found, with what its environment says."""
    library = next(Path("/usr/lib").glob("*/libdontdie.so.0"), None)
    if library is None:
        pytest.skip("libdontdie0 is not installed")
    environment = {"LD_PRELOAD": str(library), "DD_TCP_KEEPALIVE_TIME": "77"}
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, env=environment) as child:
        assert child.stdin is not None
        deadline = 1000
        found = []
        while not found and deadline:
            deadline -= 1
            processes = Processes(Path("/proc"), WATCHED)
            found = [each for each in processes.find() if each.pid == child.pid]
        child.stdin.close()
    (only,) = found
    assert only.libraries[0].kind == "libdontdie"
    assert only.environment["DD_TCP_KEEPALIVE_TIME"].value == "77"
    assert only.command == "/bin/cat"
