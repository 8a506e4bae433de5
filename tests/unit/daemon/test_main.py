"""kabpfd's options: what each selects, and what the daemon does without."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from kabpf.daemon import main

OPTIONS = ("--compile", "--install-units", "--prune", "--retrofit", "--request", "--unload")


@pytest.mark.parametrize(
    "package", ["kabpf.requests", "kabpf.observe", "kabpf.systemd.install", "hashlib"]
)
def test_daemon_does_without(package: str) -> None:
    """The daemon stays in memory, so it does not import what only other programs need, or only
    machines that log sockets; nor hashlib, which brings OpenSSL."""
    program = "import sys, kabpf.daemon.main;"
    program += f" print([name for name in sys.modules if name.startswith({package!r})])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("option", OPTIONS)
def test_option_selects_its_program(option: str) -> None:
    """Each option has a program of its own, of its name."""
    program = getattr(main, f"_{option.removeprefix('--').replace('-', '_')}")
    assert main.parser().parse_args([option]).run is program


def test_without_an_option_it_is_the_daemon() -> None:
    """kabpfd alone is what keeps the policies active."""
    assert main.parser().parse_args([]).run is main._daemon


def test_options_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two options none is run."""
    with pytest.raises(SystemExit) as ended:
        main.parser().parse_args(["--unload", "--prune"])
    assert ended.value.code == 2
    assert "argument --prune: not allowed with argument --unload" in capsys.readouterr().err


def test_log_has_lines_of_printable_characters() -> None:
    """Whatever a name in them has: nothing moves the cursor or hides what follows."""
    name = "a\x1b[2J\u202e\r\u2028b"
    record = logging.LogRecord("kabpfd", logging.INFO, "", 0, "1:\t%s\n2", (name,), None)
    shown = main._Lines("%(name)s: %(message)s").format(record)
    assert shown == "kabpfd: 1:      a\\x1b[2J\\u202e\\r\\u2028b\n2"
