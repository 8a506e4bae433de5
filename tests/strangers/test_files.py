"""What lies where policy files and notes are read: nothing makes a command of root's wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import options_of_new, path_of

POLICY_D, TRANSIENT_D = Path("/run/kabpf/policy.d"), Path("/run/kabpf/transient.d")
NOTES = [Path("/run/kabpf") / name for name in ("applied.json", "former.json")]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # zero, which has no end


def terminal(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(5, 2))  # ptmx, which makes one more when opened


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = [fifo, device, terminal, huge, link_to_device, loop]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "directory",
    [pytest.param(POLICY_D, marks=pytest.mark.core), TRANSIENT_D],
    ids=["policy.d", "transient.d"],
)
def test_nothing_among_the_drop_ins_makes_a_command_wait(
    command: Any, kabpfctl: Any, directory: Path, kind: Callable[[Path], None]
) -> None:
    """A file that is none is named, and the lock is free for the next command."""
    kabpfctl("apply")
    directory.mkdir(exist_ok=True)
    file = directory / "user-1-1.yaml"
    kind(file)
    for words in (["apply"], ["status"], ["check"], ["run", "--", "true"]):
        done = command(*words)
        said = (done.stdout + done.stderr).decode()
        assert "Traceback" not in said
        if words[0] in ("apply", "check"):
            assert done.returncode == 1
            assert f"{file}: " in said
    file.unlink()
    kabpfctl("apply")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("note", NOTES, ids=lambda each: each.name)
def test_nothing_among_the_notes_makes_a_command_wait(
    command: Any, note: Path, kind: Callable[[Path], None]
) -> None:
    """A note that is no file counts as none, and is replaced."""
    assert command("apply").returncode == 0
    note.unlink(missing_ok=True)
    kind(note)
    for words in (["status"], ["detach", "--all"], ["apply"], ["status"]):
        assert command(*words).returncode == 0
    if note.exists():
        assert note.is_file() and not note.is_symlink()


@pytest.mark.core
def test_nothing_of_roots_is_writable_by_others_whatever_the_umask(
    cgroup: Path, write_policy: Any, peer: Any
) -> None:
    """Also where root's umask is 000."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    script = (
        "umask 000; kabpfctl apply && kabpfctl attach --cgroup $1 --idle 62 --persist"
        " && kabpfctl run true && kabpfctl detach --all && kabpfctl apply"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", script, "sh", cgroup], check=True, env=environment, timeout=60)
    assert options_of_new(peer, cgroup)["idle"] in (61, 62)
    wrong = [
        (str(path), oct(path.stat().st_mode))
        for top in ("/run/kabpf", "/etc/kabpf/policy.d", "/var/lib/kabpf", "/sys/fs/bpf/kabpf")
        for path in (Path(top), *Path(top).rglob("*"))
        if path.stat().st_mode & 0o022 and path.name != "a.yaml"
    ]
    assert wrong == []


@pytest.mark.core
def test_check_shows_nothing_of_other_files(command: Any, tmp_path: Path) -> None:
    """Root may run it for somebody else, by sudo: the first line of a secret stays one."""
    secret = "hunter2"
    for name, text in {
        "shadow": f"root:$6${secret}:19000:0:99999:7:::\n",
        "key": f"{secret}\n",
        "list": f"- {secret}\n",
        "mapping": f"{secret}: {secret}\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
        for more in ([], ["--json"]):
            done = command("check", str(tmp_path / name), *more)
            assert done.returncode == 1
            assert secret.encode() not in done.stdout + done.stderr
