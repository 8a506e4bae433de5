"""Building from source where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
COMPILE = "import setuptools; setuptools.setup = lambda **_: None; import setup; setup.compile_bpf"


def compile_bpf(target: Path, clang: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{COMPILE}({str(target)!r})"],
        cwd=SOURCE,
        env={**os.environ, "CLANG": clang, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def test_missing_clang_is_named(tmp_path: Path) -> None:
    """Without clang the build says which package it takes."""
    done = compile_bpf(tmp_path / "object", "no-such-clang")
    assert done.stderr == "kabpf: no-such-clang is missing, expected the package clang\n"
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
    assert done.stderr == f"kabpf: {header} is missing, expected the package {package}\n"
    assert done.returncode == 1
