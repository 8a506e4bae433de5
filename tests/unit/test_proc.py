"""What the kernel prints about processes that call themselves what they like."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kabpf
from kabpf import proc
from kabpf.errors import RefusedError
from kabpf.kernel import capabilities, cgroups, syscalls
from kabpf.migration.processes import Processes

# Sets its name, says so, and waits for the end of its standard input.
NAMED = """\
import ctypes, os, sys
assert not ctypes.CDLL(None).prctl(15, os.fsencode(sys.argv[1]), 0, 0, 0)
os.write(1, b".")
sys.stdin.read()
"""
NAMES = {
    "capabilities after CR": b"\rCapEff:-1",
    "capabilities after LF": b"\nCapEff:\tffff",
    "uid after CR": b"\rUid:\t0 0 0 0",
    "uid after NEL": b"\xc2\x85Uid:\t0 0 0 0",
    "uid after LS": b"\xe2\x80\xa8Uid: 0 0 0",
    "end of the name": b"x) R 1 1 1 1 1",
    "many ends": b")))))))))))))))",
    "not UTF-8": b"\xff\xfe\x80",
    "cgroup": b"\r0::/system.sl",
    "populated": b"\rpopulated 0",
}


@pytest.fixture(params=NAMES.values(), ids=NAMES)
def named(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process of this user with such a name."""
    command = [sys.executable, "-I", "-S", "-c", NAMED, request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        assert process.stdout.read(1) == b"."
        yield process.pid
        process.stdin.close()


def test_name_of_a_process_changes_nothing_that_is_read_of_it(named: int) -> None:
    """Capabilities, user, start, cgroup and what runs are those of a process with a usual name."""
    own = os.getpid()
    assert syscalls.effective_capabilities(named) == syscalls.effective_capabilities(own)
    every = tuple(capabilities._BITS)
    assert capabilities.missing(every, named) == capabilities.missing(every)
    assert proc.effective_uid(named) == os.geteuid()
    assert proc.started(own) <= proc.started(named) <= proc.started(own) + 100 * 86400
    assert proc.cgroup_paths(named) == proc.cgroup_paths(own)
    assert Processes(Path("/proc"), frozenset())._cgroup(named) == cgroups.path_of_process("self")


def test_capabilities_agree_with_the_kernels_text() -> None:
    """capget(2) is asked as it is meant: both halves, of this process."""
    shown = proc.fields(proc.read("/proc/self/status"), b"CapEff")
    assert syscalls.effective_capabilities(0) == int(shown[0], 16)
    with pytest.raises(ProcessLookupError):
        syscalls.effective_capabilities((1 << 22) + 1)


@pytest.mark.parametrize(
    "word", [b"", b"-1", b"+1", b" 1", b"1_0", b"0x1", "٣".encode(), b"9" * 21, b"1\n"]
)
def test_number_has_its_exact_shape(word: bytes) -> None:
    """What int() takes beside digits is no number of the kernel's."""
    with pytest.raises(OSError) as raised:
        proc.number(word)
    assert raised.value.errno == errno.EBADMSG


@pytest.mark.parametrize("text", [b"", b"Name:\tx\rUid:\t0\t0\t0\t0\n", b"NoUid:\t0\n"])
def test_field_begins_a_line(text: bytes) -> None:
    """It is looked for at the beginning of lines that end with a newline alone."""
    with pytest.raises(OSError):
        proc.fields(text, b"Uid")


def test_read_stops_at_its_bound(tmp_path: Path) -> None:
    """A file that has no end is read as far as was said."""
    assert proc.read("/dev/zero", 100_000) == bytes(100_000)
    (tmp_path / "short").write_bytes(b"ab")
    assert proc.read(str(tmp_path / "short")) == b"ab"


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"0::/a (deleted)\n", "/a (deleted)"),
        (b"0::/..a/b\n", "/..a/b"),
        (b"1:name=systemd:/x\n0::/\r0::/b\n", "/\r0::/b"),
        (b"0::/caf\xe9\n", "/caf\udce9"),
        (b"1:name=a:/0::/x\n0::/\n", "/"),
        (b"0::/../b\n", None),
        (b"0::/..\n", None),
        (b"1:name=systemd:/x\n", None),
    ],
)
def test_cgroup_of_a_process(
    line: bytes, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is that of the cgroup2 tree, byte for byte; one that leads outside is refused."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_bytes(line)
    read = proc.cgroup_paths
    monkeypatch.setattr(proc, "cgroup_paths", lambda pid: read(pid, str(tmp_path)))
    if path is not None:
        assert cgroups.path_of_process(7) == path
        return
    with pytest.raises(RefusedError, match="outside"):
        cgroups.path_of_process(7)


PACKAGE = Path(kabpf.__file__).parent
# Files of the package itself are read as text; nobody but root writes them.
OWN_TEXTS = {
    "kernel/bcc_compile.py": "SOURCES / SOURCE",
    "policy/presets.py": "presets.yaml",
    "systemd/install.py": "unit",
}


def test_nothing_of_the_kernels_is_read_as_text() -> None:
    """Text mode turns a carriage return in a process's name into the end of a line. So nothing in
    kabpf opens a file as text but what the package brings, and only `proc` opens /proc and /sys."""
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call) and _reads(node, name):
                wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def _reads(call: ast.Call, file: str) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    source = ast.unparse(call)
    if name == "read_text":
        return not (file in OWN_TEXTS and OWN_TEXTS[file] in source)
    if source.startswith(("os.open(", "os.path.")):
        return False
    if name in ("open", "fdopen"):
        modes = [*call.args[1:], *(each.value for each in call.keywords if each.arg == "mode")]
        is_binary = any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes)
        is_ours = not source.startswith(("open(", "os.fdopen(", "io.open("))  # a method of ours
        return not (is_binary or is_ours)
    return name == "read_bytes" and ("'/proc" in source or "'/sys" in source)


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("Path(f'/proc/{pid}/status').read_text()", True),
        ("path.read_text(errors='replace')", True),
        ("Path('/proc/self/stat').read_bytes()", True),
        ("open('/proc/self/stat')", True),
        ("open(path, encoding='utf-8')", True),
        ("open(path, 'rb')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("path.read_bytes()", False),
    ],
)
def test_rule_sees_what_it_refuses(source: str, is_refused: bool) -> None:
    """The rule above can fail."""
    (statement,) = ast.parse(source).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    assert _reads(statement.value, "any.py") is is_refused
