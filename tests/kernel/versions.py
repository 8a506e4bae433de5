"""Other versions of kabpf, made from the installed one: another build of the same layout, another
layout, other names of pins, and a file system that can't exchange two directories; and, from the
repository's history, the last version that had another layout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import former
from harness import Kabpfctl

import kabpf
from kabpf.kernel.abi import LAYOUT

SOURCES = Path(__file__).parents[2] / "bpf"

BUILD = {"kabpf.h": [("EVENTS (256 * 1024)", "EVENTS (512 * 1024)")]}
KINDS: dict[str, dict[str, list[tuple[str, str]]]] = {  # what differs, by file
    "this": {},
    "rebuilt": BUILD,
    "relaid": {
        "kabpf.h": [("FORMER 4", "FORMER 2"), (f"LAYOUT {LAYOUT}", "LAYOUT 1000")],
        "kernel/abi.py": [("FORMER = 4", "FORMER = 2"), (f"LAYOUT = {LAYOUT}", "LAYOUT = 1000")],
        "plan/state.py": [("FORMER_MAX = 4", "FORMER_MAX = 2")],
    },
    # With a pin that this one has not, and without one that it has, as before it was renamed.
    "renamed": {
        "kabpf.bpf.c": [("BPF_PROG(kabpf_cgroup_mkdir,", "BPF_PROG(kabpf_birth,")],
        "kernel/dataplane.py": [('"kabpf_cgroup_mkdir"', '"kabpf_birth"')],
    },
    # Any unknown flag is EINVAL, as a flag that the file system does not know.
    "no-exchange": {**BUILD, "kernel/syscalls.py": [("EXCHANGE = 2", "EXCHANGE = 1 << 30")]},
}


@dataclass(frozen=True)
class Version:
    """A kabpf that runs from a directory of its own."""

    directory: Path
    run: Kabpfctl  # takes the fault as KABPF_FAULT

    def command(self, module: str, *arguments: object, fault: object = "") -> list[str]:
        """The command line of kabpf.cli or kabpf.daemon."""
        environment = [f"PYTHONPATH={self.directory}", f"KABPF_FAULT={fault}"]
        python = [sys.executable, "-P", "-m", f"kabpf.{module}"]
        return ["env", *environment, *python, *map(str, arguments)]

    def kabpfctl(
        self, *arguments: object, status: int = 0, fault: object = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs kabpfctl, which has to end with `status`."""
        done = self.run(*arguments, KABPF_FAULT=str(fault))
        assert done.returncode == status, done.stdout + done.stderr
        return done

    @property
    def object(self) -> Path:
        return self.directory / "kabpf/kabpf.bpf.o"


def make(kind: str, directory: Path) -> Version:
    """One of KINDS, or the "former" version, in a new directory."""
    package, sources = directory / "kabpf", directory / "bpf"
    if kind == "former":
        former.extract(directory, "kabpf", "bpf")
        _compile(sources, package)
        return at(directory)
    shutil.copytree(os.path.dirname(kabpf.__file__), package)
    shutil.copytree(SOURCES, sources)
    for name, changes in KINDS[kind].items():
        file = (package if name.endswith(".py") else sources) / name
        text = file.read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name}: {old}"
            text = text.replace(old, new)
        file.write_text(text)
    if KINDS[kind]:
        _compile(sources, package)
    return at(directory)


def _compile(sources: Path, package: Path) -> None:
    include = f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}"
    command = ["clang", "-g", "-O2", "-target", "bpf", include, "-c", "kabpf.bpf.c"]
    subprocess.run([*command, "-o", package / "kabpf.bpf.o"], cwd=sources, check=True)


def at(directory: Path) -> Version:
    """What is in a directory now; another version that is put there later takes another call."""
    return Version(directory, Kabpfctl("env", f"PYTHONPATH={directory}", sys.executable, "-P"))
