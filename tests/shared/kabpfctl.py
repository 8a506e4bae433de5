"""Runs kabpfctl where it needs no kernel, by its caller or by nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

KABPFCTL = str(Path(sys.executable).with_name("kabpfctl"))
NOBODY = 65534


class Outcome(NamedTuple):
    status: int
    output: str
    errors: str


def kabpfctl(*arguments: str) -> Outcome:
    return run(KABPFCTL, *arguments)


def as_nobody(*arguments: str) -> Outcome:
    """kabpfctl by a user who is not root."""
    if os.geteuid() != 0:
        return kabpfctl(*arguments)
    drop = [shutil.which("setpriv") or "setpriv", f"--reuid={NOBODY}", "--clear-groups"]
    skip_unless_executable(*drop)
    return run(*drop, KABPFCTL, *arguments)


def skip_unless_executable(*as_somebody: str) -> None:
    if subprocess.run([*as_somebody, "test", "-x", KABPFCTL]).returncode:
        pytest.skip(f"{KABPFCTL} is in a directory that only root may enter")


def run(*command: str) -> Outcome:
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return Outcome(done.returncode, done.stdout, done.stderr)
