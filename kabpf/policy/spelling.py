"""Words and mappings as the text of policy files has them. What is not printable no file can
say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9/_.@%-]*")


def word(text: str) -> str:
    """A word, in quotes where YAML may need them."""
    return text if _PLAIN.fullmatch(text) else quoted(text)


def quoted(text: str) -> str:
    """A word in quotes."""
    # As it is: YAML knows no escape in two halves, as JSON has for what is beyond 16 bits.
    return json.dumps(text, ensure_ascii=False)


def mapping(keys: Mapping[str, str]) -> str:
    """A mapping on one line, of what is spelled already."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"
