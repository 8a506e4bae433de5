"""What a command imports is part of the time it takes, each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

# With what these import in their turn, they take 1 to 50 ms each.
DEAR = {
    *("dataclasses", "yaml", "kabpf.apply.reconcile", "kabpf.plan.automaton"),
    *("hashlib", "shutil", "threading", "http.server", "kabpf.kernel.bcc"),
}


@pytest.mark.parametrize("command", ["metrics", "run", "status", "verify"])
def test_quick_commands_import_nothing_dear(command: str) -> None:
    """These modules are imported where they are used."""
    code = (
        f"import sys, kabpf.cli, kabpf.commands.{command}; kabpf.cli.parser('{command}');"
        " print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert DEAR.intersection(done.stdout.decode().split()) == set()
