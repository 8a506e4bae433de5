"""Building from source where something is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
IMPORT = "import setuptools; setuptools.setup = lambda **_: None; import setup"


def in_setup(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{IMPORT}; {code}"],
        cwd=SOURCE,
        env={**os.environ, **environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def compile_bpf(target: Path, clang: str) -> subprocess.CompletedProcess[str]:
    return in_setup(f"setup.compile_bpf({str(target)!r})", CLANG=clang)


def test_missing_clang_is_named(tmp_path: Path) -> None:
    """Without clang the build says which package it takes."""
    done = compile_bpf(tmp_path / "object", "no-such-clang")
    assert done.stderr == "kabpf: no-such-clang is missing; install the package clang\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("header", "package"),
    [
        ("bpf/bpf_helpers.h", "libbpf-dev (Debian) or libbpf-devel (Fedora)"),
        ("asm/socket.h", "linux-libc-dev (Debian) or kernel-headers (Fedora)"),
    ],
)
def test_missing_header_is_named(tmp_path: Path, header: str, package: str) -> None:
    """Without a header the build says which package has it."""
    clang = tmp_path / "clang-without-it"
    clang.write_text(
        f'#!/bin/sh\ncase "$*" in *"-include {header}"*) exit 1;; esac\nexec clang "$@"\n'
    )
    clang.chmod(0o755)
    done = compile_bpf(tmp_path / "object", str(clang))
    assert done.stderr == f"kabpf: {header} is missing; install the package {package}\n"
    assert done.returncode == 1


def test_fallback_is_carried_with_what_it_includes() -> None:
    """Every file that bcc needs to compile fallback.bpf.c is in the package, and no other."""
    carried = in_setup("print(*(file.name for file in setup.CARRIED['bpf']))").stdout.split()
    assert sorted(carried) == sorted(included("fallback.bpf.c"))


def included(name: str) -> set[str]:
    """A file of bpf/, and what it and those include from there."""
    text = (SOURCE / "bpf" / name).read_text()
    names = re.findall(r'^#include "(.*)"$', text, re.MULTILINE)
    return {name}.union(*map(included, names))
