"""What commands print with --json, held against schema/output/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

DIRECTORY = Path(__file__).parents[2] / "schema" / "output"


@cache
def _validator(command: str) -> Any:
    schema = json.loads((DIRECTORY / f"{command}.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def held(command: str, printed: str) -> Any:
    """What a command printed, or one line of `monitor`, as a value; it has to be as its schema
    says."""
    value = json.loads(printed)
    _validator(command).validate(value)
    return value


def keys(schema: object) -> Iterator[str]:
    """The keys that a schema allows, of every object in it."""
    if isinstance(schema, dict):
        yield from schema.get("properties", ())
        for part in schema.values():
            yield from keys(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from keys(part)
