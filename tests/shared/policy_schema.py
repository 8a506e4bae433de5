"""Policy files as an editor sees them: by the schema, and YAML as yaml-language-server reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def _ends_only(part: Any) -> Any:
    """A schema with its patterns as JavaScript takes them: $ is no place before a last newline."""
    if isinstance(part, list):
        return [_ends_only(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        key: re.sub(r"\$$", r"\\Z", each)
        if key == "pattern" and isinstance(each, str)
        else _ends_only(each)
        for key, each in part.items()
    }


PATH = Path(__file__).parents[2] / "schema" / "policy.schema.json"
SCHEMA = _ends_only(json.loads(PATH.read_text()))
INSTALLED = "/usr/share/kabpf/policy.schema.json"  # as modelines name it


class Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `on`, `no` and `1:30` are strings, and 017 is seventeen."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, as in PyYAML


for _type, _pattern, _make in (
    ("null", r"|~|null|Null|NULL", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: _integer(text)),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
):
    _tag = f"tag:yaml.org,2002:{_type}"
    Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
    Loader.add_constructor(_tag, lambda loader, node, make=_make: make(node.value))


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def value(text: str) -> Any:
    """What an editor takes the text of a file, or of a scalar, for. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=Loader)


def is_marked(text: str) -> bool:
    """Whether the schema marks something in a policy file. One without a document has no marks.
    Raises yaml.YAMLError."""
    if not any(True for _ in yaml.compose_all(text, Loader=Loader)):
        return False
    return not VALIDATOR.is_valid(value(text))


def takes(name: str, instance: Any) -> bool:
    """Whether one of the schema's definitions takes a value."""
    part = {**SCHEMA["definitions"][name], "definitions": SCHEMA["definitions"]}
    return jsonschema.Draft7Validator(part).is_valid(instance)


VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
