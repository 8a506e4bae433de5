"""env(1): what its words say, against itself."""

from __future__ import annotations

import subprocess

import pytest

from kabpf.migration.env_command import Evaluated, evaluate

GIVEN = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "GONE": "1", "STAYS": "2"}


@pytest.mark.parametrize(
    "words",
    [
        ["A=1", "B=x y", "{}"],
        ["-i", "A=1", "{}"],
        ["-", "A=1", "{}"],
        ["-u", "GONE", "A=1", "{}"],
        ["-uGONE", "-iu", "STAYS", "B=", "{}"],
        ["--unset=GONE", "--ignore-env", "--", "A=1", "{}"],
        ["-S", "A=1 {} x", "more"],
        ["-S-i A=1 STAYS=3 {}"],
        ["-iS", "A='a b' B=\"c\\td\" C='e_f' {}"],
        ["--split-string=A=${HOME}/x B=\\$x {} # comment"],
        ["-S", "-u GONE -S 'A=1 {}'"],
        ["--default-signal=PIPE", "A==", "{}"],
    ],
)
def test_environment_is_that_of_env(words: list[str]) -> None:
    """The environment of the command, and its arguments, are what env(1) makes of the words."""
    script = "/usr/bin/printenv"
    words = [word.replace("{}", script) for word in words]
    found = evaluate(words, GIVEN)
    assert found.command[0] == script
    environment = {} if found.clears else dict(GIVEN)
    environment = {name: value for name, value in environment.items() if name not in found.unsets}
    environment |= found.sets
    # Without arguments, so that printenv(1) prints all.
    plain = [word.removesuffix(" x") for word in words if word != "more"]
    done = subprocess.run(["/usr/bin/env", *plain], env=GIVEN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == environment


@pytest.mark.parametrize(
    "words",
    [
        ["-S", "A=$HOME x"],
        ["-S", "'never ends"],
        ["-S", "a\\q"],
        ["-S", "a\\"],
        ["--unknown", "x"],
        ["-z", "x"],
    ],
)
def test_what_env_refuses(words: list[str]) -> None:
    """Where env(1) fails, nothing is started."""
    assert evaluate(words, {}) == Evaluated()
    assert subprocess.run(["/usr/bin/env", *words], capture_output=True).returncode == 125
