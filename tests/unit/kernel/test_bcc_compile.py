"""What bcc compiled is kept, and found again if it is of the same sources, maps and kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from kabpf.kernel import bcc_compile

SCRIPT = """
import sys
from kabpf.kernel import bcc_compile
sys.path = []
print(bcc_compile.missing())
"""

MAPS = ("kabpf_attached", "kabpf_known")
PROGRAMS = dict.fromkeys(bcc_compile.PROGRAMS, b"\x95" + bytes(7))


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The file that the programs were written to."""
    monkeypatch.setattr(bcc_compile, "KEPT", tmp_path / "fallback.json")
    bcc_compile._keep(bcc_compile._key(MAPS, 7), PROGRAMS)
    return bcc_compile.KEPT


def test_what_was_compiled_is_kept(kept):
    """It takes no compiler to have it again; of other sources or maps nothing is kept."""
    assert bcc_compile.programs(MAPS, 7) == PROGRAMS
    assert not bcc_compile.is_kept(MAPS, 8)
    assert not bcc_compile.is_kept(MAPS[:1], 7)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: [],
        lambda _: 1,
        lambda whole: whole["programs"],
        lambda whole: whole | {"programs": []},
        lambda whole: whole | {"programs": {"kabpf_sockops": "95"}},
        lambda whole: whole | {"programs": dict.fromkeys(bcc_compile.PROGRAMS, "no")},
        lambda whole: whole | {"programs": dict.fromkeys(bcc_compile.PROGRAMS)},
    ],
)
def test_what_is_damaged_counts_as_nothing(kept, damage):
    """Whatever the file holds, it is programs or nothing."""
    kept.write_text(json.dumps(damage(json.loads(kept.read_text()))))
    assert not bcc_compile.is_kept(MAPS, 7)


def test_half_a_file_counts_as_nothing(kept):
    """As of a full disk."""
    kept.write_text(kept.read_text()[:40])
    assert not bcc_compile.is_kept(MAPS, 7)


def test_all_that_is_missing_is_said_at_once():
    """Where there is neither bcc nor a kernel's headers, the packages of both are named."""
    if bcc_compile._has_headers():
        pytest.skip("the kernel's headers are here")
    said = subprocess.check_output([sys.executable, "-P", "-c", SCRIPT], text=True)
    assert said == (
        "bcc and the kernel's headers are missing; install the packages python3-bpfcc and"
        f" linux-headers-{os.uname().release}\n"
    )


def test_compiler_has_a_directory_and_an_environment_of_its_own(monkeypatch, tmp_path):
    """bcc takes kernel headers from $TMPDIR, whoever put them there."""
    show = (
        "import json, os; directory = os.environ['TMPDIR'];"
        "print(json.dumps([directory, os.stat(directory).st_mode & 0o777, os.listdir(directory),"
        " dict(os.environ)]))"
    )
    kept = {}

    def run(command, **given):
        done = real(["/usr/bin/python3", "-c", show], **given)
        kept["seen"] = json.loads(done.stdout)
        return subprocess.CompletedProcess(command, 0, "{}", "")

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(bcc_compile, "KEPT", tmp_path / "fallback.json")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/sources")
    bcc_compile.programs(MAPS, 7)
    directory, mode, listed, environment = kept["seen"]
    assert (mode, listed) == (0o700, [])
    assert os.path.dirname(directory) == str(tmp_path)
    assert not os.path.exists(directory)
    assert environment["BCC_KERNEL_SOURCE"] == "/sources"
    assert environment.keys() - {"LC_CTYPE", "PWD", "SHLVL", "_"} == {
        *("PATH", "TMPDIR", "HOME", "LC_ALL", "BCC_KERNEL_SOURCE")
    }
