"""The Vagrantfile, where Vagrant is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("vagrant"), reason="vagrant is not installed")
def test_vagrantfile_is_valid(tmp_path: Path) -> None:
    """Vagrant accepts the file, whatever provider there is."""
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "VAGRANT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
