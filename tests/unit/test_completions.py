"""bash, zsh and fish complete every command, option and value. tests/system/test_shells.py has the
same for the package, with the shells of each Debian."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import shells

CONTAINER = {"engine": "crio", "id": "0" * 64, "name": "web-test", "image": "registry.example/web"}
POD = {"namespace": "shop", "name": "pod-test", "uid": "1"}
# What the shells ask for values; kabpfctl also says its arguments at a terminal, as a function.
ANSWERS = {
    "systemctl": "kabpf-test.service loaded active running A unit\nother.service loaded",
    "kabpfctl": json.dumps(
        [
            {"policies": ["kabpf-test-policy", "other"]},
            {
                "sockets": [
                    {"container": None, "name": "web-test-not"},
                    {"container": CONTAINER | {"pod": POD}, "name": "web-test-not"},
                    {"container": CONTAINER | {"pod": None}},
                    # Names that would be commands on the line.
                    *({"container": {"name": name}} for name in ("$(a)", "a b", "-a", "a;b", "")),
                ]
            },
        ],
        indent=2,
    ),
}


OFFERED = [*shells.lists(), *shells.VALUES, *shells.VALUES_OF_CONTAINERS]
WORDS = [*shells.words(), *shells.values(shells.VALUES_OF_CONTAINERS)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH of a machine with a unit, a policy and a container."""
    directory = tmp_path_factory.mktemp("bin")
    for name, answer in ANSWERS.items():
        (directory / name).write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.mark.parametrize(("typed", "expected"), OFFERED)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shell_offers(
    built: Path, asked: str, tmp_path: Path, shell: str, typed: str, expected: set[str]
) -> None:
    """Of each command all options, and of options and arguments the values that there are."""
    _require(shell)

    def run(*command: str) -> str:
        own = dict.fromkeys(("XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(tmp_path))
        environment = {**os.environ, "PATH": asked, **own}
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    program = typed.split()[0]
    if shell == "bash":
        found = shells.by_bash(run, f"source {built}/completions/bash/{program}", typed)
    else:
        found = shells.by_fish(run, f"source {built}/completions/fish/{program}.fish", typed)
    assert found == expected


@pytest.fixture(scope="module", params=["bash", "zsh"])
def terminal(built: Path, asked: str, request: pytest.FixtureRequest) -> Iterator[shells.Terminal]:
    shell = request.param
    _require(shell)
    load = {
        "bash": f"source {built}/completions/bash/kabpfctl; source {built}/completions/bash/kabpfd",
        "zsh": f"fpath=({built}/completions/zsh $fpath); autoload -Uz compinit; compinit -u -D",
    }
    with shells.Terminal(shell, load[shell], "env", f"PATH={asked}") as terminal:
        yield terminal


@pytest.mark.slow
def test_shell_completes_at_a_terminal(terminal: shells.Terminal) -> None:
    """The tabulator key completes each command, each option and each value."""
    found = [(typed, terminal.completed(typed)) for typed, _ in WORDS]
    assert found == WORDS


def _require(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
