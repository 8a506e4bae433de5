"""Options that a container asks for itself, with a label or an annotation, as
io.kabpf.keepalive="idle=60s,interval=10s,probes=6"."""

from __future__ import annotations

import functools

from kabpf.errors import PolicyError
from kabpf.policy import limits, options
from kabpf.policy.model import (
    ASKED,
    BY_KEY,
    IN_RANGES,
    Limits,
    Options,
    Origin,
    Policy,
    Range,
    Rules,
    ranges,
)
from kabpf.policy.yaml import Node, Source

KEY = "io.kabpf.keepalive"
TEXT_MAX = 256  # characters
EXPECTED = "options such as idle=60s,interval=10s,probes=6"
NOTE = "the container asks for it"


def template(allowed: Limits) -> Policy:
    """What makes policies of containers' wishes, among the policies of the files."""
    source = allowed.source or Source("", 0)
    return Policy(ASKED, (), Rules(Options(keepalive=False)), source, wishes=allowed)


def policy(text: str, template: Policy) -> Policy:
    """The policy that a wish makes: the same values are the same policy, however they are spelled.
    What it leaves out stays as it is on the socket. Raises PolicyError where it is no wish, or
    beyond what is allowed."""
    asked = _parsed(text)
    if template.wishes and (excess := template.wishes.exceeded(asked)):
        raise PolicyError(excess)
    given = ranges(asked)
    values = [f"{key}={value}{BY_KEY[key].unit}" for key, value in given.items()]
    origins = {key: Origin(template.source, NOTE) for key in ("keepalive", *given)}
    name = f"{ASKED}{','.join(values)}"
    return Policy(name, (), Rules(asked), template.source, origins=origins)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Options:
    if len(text) > TEXT_MAX:
        raise PolicyError(f"{len(text)} characters, expected at most {TEXT_MAX}")
    nodes: dict[str, Node] = {}
    for each in text.split(","):
        key, equals, value = (part.strip(" ") for part in each.partition("="))
        node = Node(value, key, Source("", 0))
        if not equals or key not in limits.KEYS:
            raise PolicyError(f"{Node(text, '', node.source)}, expected {EXPECTED}")
        if key in nodes:
            raise PolicyError(f"{key}: given twice, expected each option once")
        nodes[key] = node
    try:
        draft = options.parse(nodes)
    except PolicyError as error:
        raise PolicyError(str(error).removeprefix(f"{Source('', 0)}: ")) from None
    values = {row.key: each.value for row in IN_RANGES if (each := getattr(draft, row.key))}
    for key, value in values.items():
        if not isinstance(value, Range) or value.low != value.high:
            raise PolicyError(f"{key}: {nodes[key]}, expected one value")
    return Options(**{BY_KEY[key].field: value for key, value in values.items()})
