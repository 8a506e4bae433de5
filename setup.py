"""Compiles the BPF object into the package; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
OBJECT = "kabpf/kabpf.bpf.o"


class BuildWithBpf(build_py):
    """build_py, and then clang."""

    def run(self):
        super().run()
        target = HERE if self.editable_mode else Path(self.build_lib)
        compile_bpf(target / OBJECT)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), os.path.join(self.build_lib, OBJECT)]


def compile_bpf(target):
    """Compile bpf/kabpf.bpf.c to `target`, or say what is missing."""
    clang = os.environ.get("CLANG", "clang")
    if not shutil.which(clang):
        raise SystemExit(f"kabpf: {clang} is missing, expected the package clang")
    # Debian keeps asm/ in a folder of the architecture, which clang does not search for BPF.
    includes = [f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}"]
    source = HERE / "bpf/kabpf.bpf.c"
    for header, package in (
        ("bpf/bpf_helpers.h", "libbpf-dev (Debian) or libbpf-devel (Fedora)"),
        ("asm/socket.h", "linux-libc-dev (Debian) or kernel-headers (Fedora)"),
    ):
        probe = [clang, "-target", "bpf", "-E", *includes, "-include", "linux/types.h"]
        if subprocess.run(
            [*probe, "-include", header, "-x", "c", "/dev/null"], capture_output=True
        ).returncode:
            raise SystemExit(f"kabpf: {header} is missing, expected the package {package}")
    flags = ["-g", "-O2", "-Wall", "-Werror", "-target", "bpf", *includes]
    subprocess.run([clang, *flags, "-c", str(source), "-o", str(target)], check=True)


setup(cmdclass={"build_py": BuildWithBpf})
