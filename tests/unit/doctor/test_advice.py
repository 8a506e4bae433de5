"""What doctor advises: each is a command that there is, or an act, and none destroys anything."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabpf import cli

DOCTOR = Path(__file__).parents[3] / "kabpf/doctor"
GRADES = {"note", "warning", "error", "grade"}
# What ends, removes or overwrites something, and what is no command on a machine without a desktop.
DESTROYS = re.compile(
    r"\b(rm|rmdir|unlink|umount|dd|kill|pkill|killall|truncate|shred|purge|reset-failed|detach"
    r"|open|mv(?! -n))\b|--all\b|[^-]>"
)
PROGRAMS = {
    "kabpfctl", "kabpfd", "systemctl", "journalctl", "bpftool", "apt", "mount", "chown", "chmod",
    "sysctl", "mv", "diff", "ls", "man", "sudo",
}  # fmt: skip
ACTS = {
    "add", "ask", "boot", "correct", "give", "have", "if", "let", "name", "nothing", "rename",
    "report", "run", "select", "set", "start", "when", "write",
}  # fmt: skip


def texts(node: ast.expr) -> Iterator[str]:
    """What a string may be; X stands for what is worked out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else _part(part)
            for part in node.values
        )
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)


def _part(part: ast.expr) -> str:
    """A command that a function makes stands for itself."""
    is_edit = isinstance(part, ast.FormattedValue) and "_edit" in ast.unparse(part.value)
    return "kabpfctl edit X" if is_edit else "X"


def advice() -> dict[str, str]:
    """Every advice that stands in doctor's modules, by its place."""
    found = {}
    for file in sorted(DOCTOR.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            given: list[ast.expr] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in GRADES or ast.unparse(node.func).startswith("("):
                    given = node.args[1:]
                elif node.func.id == "Elsewhere":
                    given = node.args[3:]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.IfExp):
                given = node.args[1:]  # (warning if late else note)(text, advice)
            elif isinstance(node, ast.FunctionDef) and "advice" in node.name:
                returns = [each for each in ast.walk(node) if isinstance(each, ast.Return)]
                given = [each.value for each in returns if each.value]
            elif isinstance(node, ast.Assign):
                names = {ast.unparse(target) for target in node.targets}
                given = [node.value] if names & {"advice", "show", "_CORRECT", "_LIMIT"} else []
            for each in given:
                for text in texts(each):
                    found[f"{file.name}:{each.lineno}: {text}"] = text
    return found


ADVICE = advice()


def test_advice_is_found() -> None:
    """The test looks where advice is: some of each module is there."""
    assert len(ADVICE) > 55
    assert {place.partition(":")[0] for place in ADVICE} == {
        "checks.py", "containers.py", "elsewhere.py", "machine_checks.py", "other_programs.py",
        "policy_checks.py", "units.py",
    }  # fmt: skip


@pytest.mark.parametrize("place", ADVICE)
def test_advice_can_be_followed_and_destroys_nothing(place: str) -> None:
    """It begins with a program that there is or with a verb, and its kabpfctl is one."""
    text = ADVICE[place]
    assert not DESTROYS.search(text)
    first = text.split()[0].rstrip(":,;")
    assert first in PROGRAMS | ACTS | {"X"}
    for command in re.findall(r"kabpfctl[^;,)]*", text):
        words = shlex.split(re.split(r" && | or ", command)[0])[1:]
        assert _is_taken(words), command


def _is_taken(words: list[str]) -> bool:
    parser: argparse.ArgumentParser = cli.parser()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            parser.parse_args(words)
        except SystemExit as end:
            return not end.code
    return True


@pytest.mark.parametrize(
    "text", ["rm -r /sys/fs/bpf/kabpf", "kabpfctl detach --all", "mv a b", "open a.yaml", "echo >a"]
)
def test_what_destroys_is_told(text: str) -> None:
    """So the test above can fail."""
    assert DESTROYS.search(text)
