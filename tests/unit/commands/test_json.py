"""What commands print with --json: its schemas are those of the code, and hold."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import output_schema
import pytest
from jsonschema import ValidationError
from kabpfctl import as_nobody, kabpfctl

from kabpf import cli, output

ROOT = Path(__file__).parents[3]
SCHEMAS = {path.name.split(".")[0]: path for path in output_schema.DIRECTORY.glob("*.json")}


def commands_with_json() -> set[str]:
    """The commands that have the option."""
    (commands,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {name for name, each in commands.choices.items() if "--json" in each.format_help()}


def test_every_command_has_a_schema() -> None:
    """One that comes without is found here."""
    assert set(SCHEMAS) == commands_with_json()


def test_schemas_are_current() -> None:
    """The files are what scripts/output-schema makes of the code."""
    program = "import json, runpy, sys; made = runpy.run_path(sys.argv[1])['schemas']()"
    program = f"{program}; json.dump(made, sys.stdout)"
    command = [sys.executable, "-P", "-c", program, ROOT / "scripts" / "output-schema"]
    made = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    files = {name: json.loads(path.read_text()) for name, path in SCHEMAS.items()}
    assert json.loads(made.stdout) == files, "scripts/output-schema renews schema/output"


@pytest.mark.parametrize(
    "command",
    ["presets", "check", "check {}", "doctor"],
)
def test_output_is_as_its_schema_says(command: str, tmp_path: Path) -> None:
    """Of what needs neither root nor kabpf in the kernel; the kernel tier has the others."""
    file = tmp_path / "a.service.yaml"
    file.write_text("keepalive: {idle: 200}\n")
    words = command.format(file).split()
    printed = as_nobody(*words, "--json") if words[0] == "doctor" else kabpfctl(*words, "--json")
    value = output_schema.held(words[0], printed.output)
    assert value["version"] == output.JSON_VERSION


def test_output_that_a_page_shows_is_as_its_schema_says() -> None:
    """The one of `verify` in docs/operations.md."""
    _, _, rest = (ROOT / "docs" / "operations.md").read_text().partition("```\n{\n")
    assert output_schema.held("verify", "{" + rest.partition("```")[0])["reasons"]


@pytest.mark.parametrize("change", [{"more": 1}, {"version": 2}, {"verified": "yes"}])
def test_schema_refuses_another_output(change: dict[str, object]) -> None:
    """A key that nobody documented, another version, and another type."""
    right = {"version": output.JSON_VERSION, "verified": True, "reasons": []}
    output_schema.held("verify", json.dumps(right))
    with pytest.raises(ValidationError):
        output_schema.held("verify", json.dumps(right | change))


def test_page_names_every_key() -> None:
    """kabpfctl(1) has each key of each output under JSON."""
    _, _, rest = (ROOT / "man" / "kabpfctl.1.rst").read_text().partition("\nJSON\n====\n")
    page = rest.partition("\nEXIT STATUS\n")[0]
    missing = {
        (name, key)
        for name, path in SCHEMAS.items()
        for key in output_schema.keys(json.loads(path.read_text()))
        if f"**{key}**" not in page
    }
    assert missing == set()
