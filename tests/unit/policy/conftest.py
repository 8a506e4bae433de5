"""What policy files the parser takes, the schema takes as well, in every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import policy_schema
import pytest
import yaml

from kabpf.policy import of_commands, options, parser


@pytest.fixture(autouse=True)
def _texts_that_parse_are_in_the_schema(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    taken: dict[bytes, None] = {}
    parse = parser.parse

    def remembered(content: bytes, path: str, **rest: Any) -> parser.PolicyFile:
        found = parse(content, path, **rest)
        says_nothing = found == parser.PolicyFile(options.NOTHING, ())
        has_keys_more = Path(path).parent in (of_commands.RUNTIME, of_commands.TRANSIENT)
        if not says_nothing and not has_keys_more:
            taken[content] = None
        return found

    monkeypatch.setattr(parser, "parse", remembered)
    yield
    assert [text for text in taken if _is_marked(text.decode("utf-8-sig"))] == []


def _is_marked(text: str) -> bool:
    try:
        return policy_schema.is_marked(text)
    except yaml.YAMLError:  # of tabs and question marks that libyaml alone takes
        return False
