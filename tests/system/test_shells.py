"""The package's completions in bash, zsh and fish of each Debian, as these load them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import shells
from machine import KEEPALIVE, Machine

# bash-completion loads by name: 2.11 (Debian 12) and 2.16 (Debian 13) call that differently.
LOAD = {
    "bash": (
        "source /usr/share/bash-completion/bash_completion; for name in kabpfctl kabpfd;"
        " do _comp_load $name 2>/dev/null || __load_completion $name; done"
    ),
    "zsh": "autoload -Uz compinit; compinit -u -D",
    "fish": "true",
}


@pytest.fixture
def filled(machine: Machine) -> Machine:
    """A machine with a unit and a policy that begin with kabpf-test."""
    machine.drop_in(
        "kabpf-test-policy.yaml", f"select: [{{unit: kabpf-test.service}}]\n{KEEPALIVE}"
    )
    machine.run("systemd-run", "--quiet", "--unit=kabpf-test.service", "sleep", "infinity")
    return machine


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shell_offers(filled: Machine, shell: str) -> None:
    """Of each command all options, and of options and arguments the values that there are."""
    by: Callable[..., set[str]] = {"bash": shells.by_bash, "fish": shells.by_fish}[shell]
    expected = [*shells.lists(), *shells.VALUES]
    assert [(typed, by(filled.run, LOAD[shell], typed)) for typed, _ in expected] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completes_at_a_terminal(filled: Machine, shell: str) -> None:
    """The tabulator key completes each command, each option and each value."""
    with shells.Terminal(shell, LOAD[shell], *filled.entering()) as terminal:
        found = [(typed, terminal.completed(typed)) for typed, _ in shells.words()]
    assert found == shells.words()
