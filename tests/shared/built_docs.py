"""What scripts/docs builds: the manual pages and the shells' completions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COLUMNS = 80
ROOT = Path(__file__).parents[2]


def build(directory: Path) -> Path:
    """Build it, with the date of a release."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/docs", directory],
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory


def faults(run: Callable[..., subprocess.CompletedProcess[str]], *page: str) -> list[str]:
    """What man warns of, and the lines that are wider than a terminal of 80 columns."""
    environment = ("env", "MANWIDTH=80", "LC_ALL=C.UTF-8", "MAN_KEEP_FORMATTING=", "TERM=dumb")
    done = run(*environment, "man", "--warnings", *page)
    assert done.returncode == 0
    shown = re.sub(".\b", "", done.stdout)  # printed twice, for bold
    assert "SYNOPSIS" in shown or "DESCRIPTION" in shown
    wide = [line for line in shown.splitlines() if len(line) > COLUMNS]
    return done.stderr.splitlines() + wide
