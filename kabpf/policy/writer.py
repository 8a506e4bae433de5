"""Policies as the text of drop-ins: what commands write, and what they propose to write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from kabpf.errors import RefusedError
from kabpf.policy.files import FILE_SIZE_MAX
from kabpf.policy.model import (
    OPTIONS,
    Destination,
    Direction,
    Mode,
    Options,
    Policy,
    Range,
    Selector,
    Until,
)
from kabpf.policy.spelling import mapping, quoted, word

COMMENT_MAX = 1000  # characters

_UNTIL = re.compile(r'^until: \{cgroup: ("[^\n]*"), id: ([0-9]+)\}$', re.MULTILINE)

_OWNER = re.compile(r"^owner: ([0-9]{1,10})$", re.MULTILINE)


def text(policy: Policy, comment: str, words: Mapping[str, str] | None = None) -> str:
    """The text of a drop-in that makes this policy, below a comment, which stays one line.

    `words` are options as somebody has spelled them, to be written so in place of the numbers of
    the policy's own; those of destinations are always numbers. Options that the policy lacks come
    from the defaults of other files, unless it ends with a cgroup. Raises RefusedError where a name
    can't be written, or where the file would be too large to be read.
    """
    content = "".join(f"{line}\n" for line in _lines(policy, comment, words))
    if (size := len(content.encode())) > FILE_SIZE_MAX:
        raise RefusedError(
            f"policy {policy.name} makes {size} bytes", hint=f"expected at most {FILE_SIZE_MAX}"
        )
    return content


def until_of(text: str) -> Until | None:
    """What the policy of a drop-in ends with, if any version of this wrote the text: without the
    parser, which takes longer. Raises ValueError where something else wrote it."""
    match = _UNTIL.search(text)
    return Until(json.loads(match[1]), int(match[2])) if match else None


def owner_of(text: str) -> int | None:
    """The user whose policy a drop-in has, if any version of this wrote the text."""
    match = _OWNER.search(text)
    return int(match[1]) if match else None


def selector(selector: Selector) -> str:
    """An item of `select`."""
    if selector.is_of_containers:
        return mapping({selector.kind: _printable(selector.text)})
    return mapping({selector.kind: _word(selector.text)})


def _lines(policy: Policy, comment: str, words: Mapping[str, str] | None) -> Iterator[str]:
    """Keys are left out where they say what holds without them."""
    rules = policy.rules
    yield f"# {_one_line(comment)}"
    if policy.selectors:
        yield f"select: [{', '.join(map(selector, policy.selectors))}]"
    if policy.offered:
        yield "offered: true"
    yield f"keepalive: {_keepalive(rules.options, words)}"
    if rules.mode != Mode.FILL:
        yield f"mode: {rules.mode}"
    if rules.direction != Direction.BOTH:
        yield f"direction: {rules.direction}"
    if rules.destinations:
        yield "destinations:"
        yield from map(_destination, rules.destinations)
    if not rules.loopback:
        yield "loopback: false"
    if not policy.existing:
        yield "existing: false"
    if policy.log:
        yield "log: sockets"
    if policy.until:
        # As _UNTIL finds it.
        yield f"until: {{cgroup: {_quoted(policy.until.path)}, id: {policy.until.id}}}"
    if policy.owner is not None:
        yield f"owner: {policy.owner}"


def _one_line(comment: str) -> str:
    shown = comment if comment.isprintable() else ascii(comment)[1:-1]
    return shown if len(shown) <= COMMENT_MAX else f"{shown[:COMMENT_MAX]}..."


def _keepalive(options: Options, words: Mapping[str, str] | None) -> str:
    if not options.keepalive:
        return "off"
    given = _spelled(options) if words is None else words
    return mapping({key: _word(word) for key, word in given.items()}) if given else "on"


def _destination(destination: Destination) -> str:
    keys = {"to": _quoted(destination.to)}
    if destination.ports:
        keys["ports"] = str(list(destination.ports))
    if destination.options.keepalive:
        keys |= _spelled(destination.options)
        keys |= {row.key: row.none for row in OPTIONS if row.none and row.key not in keys}
    else:
        keys["keepalive"] = "off"
    return f"  - {mapping(keys)}"


def _spelled(options: Options) -> dict[str, str]:
    """The options that are given, with their units."""
    return {
        row.key: _number(value, row.unit)
        for row in OPTIONS
        if (value := getattr(options, row.field))
    }


def _number(value: Range | int, unit: str) -> str:
    low, high = (value, value) if isinstance(value, int) else value
    return f"{low}{unit}" if low == high else f"{low}{unit}..{high}{unit}"


def _word(text: str) -> str:
    return word(_printable(text))


def _quoted(text: str) -> str:
    return quoted(_printable(text))


def _printable(text: str) -> str:
    if not text.isprintable():  # of all that a policy has, only the path of a cgroup may be so
        raise RefusedError(f"cgroup {text!r}", hint="expected a path that can be printed")
    return text
