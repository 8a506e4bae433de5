"""Selectors of containers and pods as policy files spell them: keys with globs, which all have to
match."""

from __future__ import annotations

from kabpf.containers.facts import ENGINES
from kabpf.policy.model import GLOB, Condition, Selector
from kabpf.policy.spelling import mapping, word
from kabpf.policy.yaml import Node, Source

KEYS = {  # by what is selected
    "container": ("name", "image", "label", "annotation", "engine"),
    "pod": ("namespace", "name", "label", "container"),
}
OF_KEYS = ("label", "annotation")  # which have keys of their own
NAMED = {"label": "labels", "annotation": "annotations"}
VALUE = "a text or a glob"
ENGINE = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}, or a glob"


def parse(kind: str, node: Node) -> Selector:
    """The selector of a `container:` or a `pod:`. Raises PolicyError."""
    keys = node.mapping(KEYS[kind])
    if not keys:
        raise node.error(f"no keys, expected at least one of {', '.join(KEYS[kind])}")
    conditions: list[Condition] = []
    for key in KEYS[kind]:
        if key in OF_KEYS and key in keys:
            conditions += _conditions(key, keys[key])
        elif key in keys:
            conditions.append(Condition(key, "", _value(key, keys[key])))
    return of(kind, tuple(conditions), node.source)


def of(kind: str, conditions: tuple[Condition, ...], source: Source) -> Selector:
    """The selector with these conditions, and with the text that policy files have for it."""
    words: dict[str, str] = {}
    inner: dict[str, dict[str, str]] = {}
    for key, of_key, glob in conditions:
        if key in OF_KEYS:
            inner.setdefault(key, {})[word(of_key)] = word(glob)
            words[key] = mapping(inner[key])
        else:
            words[key] = word(glob)
    return Selector(kind, mapping(words), source, conditions=conditions)


def _conditions(key: str, node: Node) -> list[Condition]:
    values = node.named(f"{NAMED[key]} with their values, as {{app: web}}")
    if not values:
        raise node.error(f"no {NAMED[key]}, expected at least one, as {{app: web}}")
    if "" in values:
        raise values[""].error(f"no name, expected that of {key}s")
    return [Condition(key, name, _value(key, value)) for name, value in values.items()]


def _value(key: str, node: Node) -> str:
    if key != "engine":
        return node.word(VALUE)
    engine = node.word(ENGINE)
    if engine not in ENGINES and not GLOB.search(engine):
        raise node.expected(ENGINE)
    return engine
