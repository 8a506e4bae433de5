"""YAML as policy files may use it: words, lists and mappings, each with its file, line and key.

Anchors, aliases, tags, duplicate keys, deep nesting and control characters are refused. A scalar
stays the text that it is; the key that it stands under gives it a type.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

from kabpf.errors import PolicyError

DEPTH_MAX = 8
TEXT_MAX = 4095  # PATH_MAX without its NUL
HIDDEN = "?"  # in messages
SHOWN_MAX = 300  # characters of a wrong value in a message


class Source(NamedTuple):
    """A place in a policy file; the line counts from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class Node(NamedTuple):
    """A YAML node with the key that leads to it."""

    value: str | list[Node] | dict[str, Node]
    key: str
    source: Source

    def error(self, what: str) -> PolicyError:
        """An error that says `what`, with the place before it."""
        return PolicyError(self.at(what))

    def at(self, what: str) -> str:
        """`file:line: key: what`."""
        return f"{self.source}: {self.key}: {what}" if self.key else f"{self.source}: {what}"

    def expected(self, what: str) -> PolicyError:
        """An error that shows the value and says what was expected instead."""
        return self.error(f"{self}, expected {what}")

    def __str__(self) -> str:
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        if len(self.value) > SHOWN_MAX:
            return f"{self.value[:SHOWN_MAX]}..."
        return self.value or "nothing"

    def word(self, expected: str) -> str:
        """The text of a scalar that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.expected(expected)
        return self.value

    def items(self, expected: str) -> list[Node]:
        """The items of a list that is not empty."""
        if self.value == []:
            raise self.error(f"nothing, expected {expected}")
        if not isinstance(self.value, list):
            raise self.expected(expected)
        return self.value

    def mapping(self, known: tuple[str, ...]) -> dict[str, Node]:
        """The values of a mapping whose keys are all `known`."""
        values = self.named(f"keys ({', '.join(known)})")
        for key, value in values.items():
            if key not in known:
                import difflib  # here, because it takes 3 ms

                close = difflib.get_close_matches(key, known, 1)
                expected = f"expected one of {', '.join(known)}"
                raise value.error(
                    f"unknown key, {f'did you mean {close[0]}?' if close else expected}"
                )
        return values

    def named(self, expected: str) -> dict[str, Node]:
        """The values of a mapping of any keys."""
        if not isinstance(self.value, dict):
            raise self.expected(expected)
        return self.value


def parse(text: str, path: str, only: tuple[str, ...] | None = None) -> Node | None:
    """The document of `text`, or None if it is empty; `path` names it in messages. With `only`
    messages show nothing of the text but these keys and what is below them."""
    return _Tree(text, path, only).build()


class _Tree:
    """Builds nodes from YAML events."""

    def __init__(self, text: str, path: str, only: tuple[str, ...] | None) -> None:
        import yaml  # late: what only reads the kernel's state starts faster without it

        self._yaml = yaml
        self._path = path
        self._only = only
        self._events = self._parse(text)
        self._sources: dict[int, Source] = {}  # by line

    def build(self) -> Node | None:
        # Else it would refer to itself, and the 20 KiB of libyaml's parser stay for a while.
        with closing(self._events):
            return self._document()

    def _document(self) -> Node | None:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), self._yaml.StreamEndEvent):
            return None
        root = self._node(next(self._events), "", 1)
        next(self._events)  # the document's end
        event = next(self._events)
        if not isinstance(event, self._yaml.StreamEndEvent):
            line = event.start_mark.line + 1
            raise PolicyError(f"{self._path}:{line}: a second document, expected one")
        if self._only is not None and isinstance(root.value, str) and root.value:
            raise root.error(f"text, expected keys ({', '.join(self._only)})")
        return None if root.value == "" else root

    def _parse(self, text: str) -> Generator[Any, None, None]:
        yaml = self._yaml
        try:
            yield from yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            # libyaml marks the end of the text by a line that is not there.
            line = min(mark.line + 1, len(text.splitlines()) or 1) if mark else 1
            raise PolicyError(f"{self._path}:{line}: not YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, _position(text, error.character)) + 1
            raise PolicyError(f"{self._path}:{line}: not YAML: {error.reason}") from None

    def _node(self, event: Any, key: str, depth: int) -> Node:
        yaml = self._yaml
        line = event.start_mark.line + 1
        source = self._sources.setdefault(line, Source(self._path, line))
        node = Node("", key, source)
        if isinstance(event, yaml.AliasEvent):
            shown = self._shown(f"*{event.anchor}", key)
            raise node.error(f"{shown}: an alias, expected the value itself")
        if event.anchor is not None:
            shown = self._shown(f"&{event.anchor}", key)
            raise node.error(f"{shown}: an anchor, expected the value alone")
        if event.tag is not None:
            shown = self._shown(event.tag.replace("tag:yaml.org,2002:", "!!"), key)
            raise node.error(f"{ascii(shown)[1:-1]}: a tag, expected the value alone")
        if depth > DEPTH_MAX:
            raise node.error(f"nested too deep, expected at most {DEPTH_MAX} levels")
        if isinstance(event, yaml.ScalarEvent):
            if not event.value.isprintable() or len(event.value) > TEXT_MAX:
                raise node.error(f"expected one line of at most {TEXT_MAX} printable characters")
            return Node(sys.intern(event.value), key, source)  # thousands of files say the same
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(self._items(key, depth), key, source)
        return Node(self._pairs(key, depth), key, source)

    def _shown(self, text: str, key: str) -> str:
        """What messages show of a text that stands under a key."""
        if self._only is None or text in self._only or key.partition(".")[0] in self._only:
            return text
        return HIDDEN

    def _items(self, key: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self._events), self._yaml.SequenceEndEvent):
            items.append(self._node(event, f"{key}[{len(items)}]", depth + 1))
        return items

    def _pairs(self, key: str, depth: int) -> dict[str, Node]:
        pairs: dict[str, Node] = {}
        while not isinstance(event := next(self._events), self._yaml.MappingEndEvent):
            name = self._node(event, key, depth + 1)
            if not isinstance(name.value, str):
                raise name.error(f"{name} as a key, expected a word")
            word = self._shown(name.value or "''", key)
            inner = sys.intern(f"{key}.{word}") if key else word
            if name.value in pairs:
                first = pairs[name.value].source.line
                raise PolicyError(f"{name.source}: {inner}: given twice, first in line {first}")
            value = self._node(next(self._events), inner, depth + 1)
            pairs[name.value] = Node(value.value, inner, name.source)
        return pairs


def _position(text: str, character: int | str) -> int:
    """Where the offending character is; libyaml counts bytes and characters inconsistently."""
    return text.find(chr(character) if isinstance(character, int) else character)
