"""What kabpf says on Linux 5.10, which is too old; in a machine that is thrown away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
TOO_OLD = (
    f"kernel {os.uname().release} is too old (it has no bpf_iter_tcp_get_func_proto),"
    " expected Linux 5.15 or later\n"
)


@pytest.fixture
def cgroup():
    """A cgroup."""
    path = Path("/sys/fs/cgroup/kabpf-test")
    path.mkdir()
    yield path
    path.rmdir()


def _run(*command):
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def _objects():
    """What there is of kabpf in the kernel."""
    listed = [
        subprocess.check_output(["bpftool", kind, "list"]) for kind in ("prog", "map", "link")
    ]
    return [*os.listdir("/sys/fs/bpf"), *(one for one in listed if b"kabpf" in one)]


@pytest.mark.parametrize("verb", ["apply", "attach"])
def test_command_refuses(cgroup, verb):
    """What would load the programs says which kernel it takes, and leaves nothing behind."""
    options = ("--cgroup", cgroup, "--idle", "60") if verb == "attach" else ()
    done = _run("kabpfctl", verb, *options)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"kabpfctl: {TOO_OLD}")
    assert not _objects()


def test_daemon_refuses():
    """kabpfd says the same, with the status after which systemd does not start it again."""
    done = _run("kabpfd")
    assert (done.returncode, done.stderr) == (os.EX_CONFIG, f"kabpfd: {TOO_OLD}")
    assert not _objects()


def test_status_has_nothing_interrupted():
    """status says what there is, which is nothing, also after apply was refused."""
    _run("kabpfctl", "apply")
    done = _run("kabpfctl", "status")
    assert done.returncode == 0
    assert done.stdout.startswith("data plane: not loaded;")
    assert "interrupted" not in done.stdout


def test_files_are_checked(tmp_path):
    """check needs nothing of the kernel's."""
    file = tmp_path / "a.service.yaml"
    file.write_text("keepalive: {idle: 60}\n")
    done = _run("kabpfctl", "check", file)
    assert (done.returncode, done.stderr) == (0, "")


def test_sockets_without_the_kernel_module():
    """Where the module that lists sockets can't be loaded, that is said."""
    Path("/proc/sys/kernel/modules_disabled").write_text("1")
    done = _run("kabpfctl", "sockets")
    assert done.returncode == 1
    assert done.stderr.endswith("the kernel lists no TCP sockets; try: modprobe tcp_diag\n")
