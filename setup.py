"""Puts the BPF object, its sources for bcc, and the units into the package; everything else is in
pyproject.toml."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCE, OBJECT = "bpf/kabpf.bpf.c", "kabpf/kabpf.bpf.o"
CARRIED = {  # directories of the package, for kabpfd --install-units and the bcc loader
    "systemd/shipped": sorted(HERE.glob("systemd/*")),
    "bpf": [HERE / "bpf" / name for name in ("fallback.bpf.c", "kabpf.h", "options.h")],
}


class BuildWithBpf(build_py):
    """build_py, and then clang; and what is carried along."""

    def run(self):
        super().run()
        if self.editable_mode:
            compile_bpf(HERE / OBJECT)
            return
        built = Path(self.build_lib)
        compile_bpf(built / OBJECT)
        for name, files in CARRIED.items():
            self.mkpath(str(built / "kabpf" / name))
            for file in files:
                self.copy_file(str(file), str(built / "kabpf" / name / file.name))

    def get_outputs(self, include_bytecode=True):
        carried = [f"kabpf/{name}/{file.name}" for name, files in CARRIED.items() for file in files]
        ours = [OBJECT, *carried]
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, *(os.path.join(self.build_lib, path) for path in ours)]


def compile_bpf(target):
    """Compile SOURCE to `target`, or say what is missing."""
    clang = os.environ.get("CLANG", "clang")
    if not shutil.which(clang):
        raise SystemExit(f"kabpf: {clang} is missing; install the package clang")
    # Debian keeps asm/ in a folder of the architecture, which clang does not search for BPF.
    includes = [f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}"]
    for header, package in (
        ("bpf/bpf_helpers.h", "libbpf-dev (Debian) or libbpf-devel (Fedora)"),
        ("asm/socket.h", "linux-libc-dev (Debian) or kernel-headers (Fedora)"),
    ):
        probe = [clang, "-target", "bpf", "-E", *includes, "-include", "linux/types.h"]
        if subprocess.run(
            [*probe, "-include", header, "-x", "c", "/dev/null"], capture_output=True
        ).returncode:
            raise SystemExit(f"kabpf: {header} is missing; install the package {package}")
    flags = ["-g", "-O2", "-Wall", "-Werror", "-target", "bpf", *includes]
    flags += ["-fdebug-compilation-dir=."]  # the same object wherever it is compiled
    command = [clang, *flags, "-c", SOURCE, "-o", os.path.abspath(target)]
    subprocess.run(command, check=True, cwd=HERE)


setup(cmdclass={"build_py": BuildWithBpf})
