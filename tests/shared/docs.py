"""What scripts/docs builds: the manual pages and the shells' completions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
