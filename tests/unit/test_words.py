"""One vocabulary: words that were given up come back neither in messages nor in pages, comments,
names and keys."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import output_schema
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "man",
    "docs",
    "examples",
]
SOURCES = ["kabpf", "bpf", "systemd", "debian", "demo", "scripts"]
# Of the past: what was decided, and the former names.
HISTORY = {"docs/decisions.md"}

# By what is written in their place.
GIVEN_UP = {
    "active": r"\bin[ _]force\b|\binto force\b",
    "unload": r"\blift(s|ed|ing)?\b|_lift(s|ed)?\b",
    "update": r"\bvisit(s|ed)?\b|\bretrofitted\b|\bretrofits\b",
    "kept": r"\bKABPF_LEFT\b|\bleft alone by\b",
    "ignored": r"\bswallow(s|ed)?\b|KABPF_SWALLOWED|\bnot obeyed\b",
    "clamped": r"\bKABPF_LIMITED\b",
    "timed out": r"\bdied\b|KABPF_DIED",
    "idle timeout": r"\btime-outs?\b",
    "caller": r"\bwho asks\b|\bwhoever asks\b",
    "preload libraries": r"\blegacy\b|\bits ancestors\b",
    "needs": r"\b(takes|wants) (root|BTF|CAP_\w+|capabilities|no privilege)\b",
}
# A visit in BPF is one run of a program for one socket, a new one included, and no update;
# visitors are the processes that walk through network namespaces.
STAYS = {"update": ("bpf/", "kabpf/apply/visitors.py", "ARCHITECTURE.md")}
# Of messages: the subject is a noun, and what was expected is a value.
MESSAGES = (
    r"^(who|what|whoever)\b(?!.*\?$)",
    r"\bnot looked at\b|\blooked at\b",
    r"\bit takes\b|\btakes (root|BTF)\b",
    r"\bnot root\b",
    r"\bhardly meant\b|\bsomebody else's\b|\bstill there\b",
    r"expected (it|an administrator|kabpfctl|systemctl|none|inside|to )\b",
    r"expected (a|the) (package|kernel|restart|container|process outside)\b",
)
KEYS = {
    "in_force", "retrofitted", "left", "swallowed", "limited", "died", "way", "remote", "death",
    "grade", "advice", "beaten", "after", "births", "retrofits", "asked", "asked_in_vain", "sent",
}  # fmt: skip
HEADERS = {
    "REMOTE", "WAY", "AFTER IT", "GRADE", "FROM", "MORE", "LEFT", "SWALLOWED", "LIMITED", "DIED",
    "RETROFITTED",
}  # fmt: skip


def texts(*places: str) -> Iterator[tuple[str, str]]:
    """The files at these places that are text, by their paths in the repository."""
    found = chain.from_iterable(sorted(ROOT.glob(place)) for place in places)
    for path in chain.from_iterable(
        sorted(each.rglob("*")) if each.is_dir() else [each] for each in found
    ):
        name = str(path.relative_to(ROOT))
        if name in HISTORY or path.is_symlink() or not path.is_file() or path.suffix == ".svg":
            continue
        content = path.read_bytes()
        if b"\0" not in content:  # what is built is none of these
            yield name, content.decode(errors="replace")


@functools.cache
def messages() -> list[tuple[str, str]]:
    """The strings of kabpf that have two words, docstrings left out; a value of a format is {}."""
    return [*_messages()]


def _messages() -> Iterator[tuple[str, str]]:
    for name, text in texts("kabpf/**/*.py"):
        tree = ast.parse(text)
        passed = {
            id(part)
            for node in ast.walk(tree)
            for part in (node.values if isinstance(node, ast.JoinedStr) else ())
        } | {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            said = _said(node)
            if id(node) not in passed and said and " " in said.strip():
                yield f"{name}:{node.lineno}", said  # type: ignore[attr-defined]


def _said(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_said(part) or "{}" for part in node.values)
    return None


@pytest.mark.parametrize("instead", GIVEN_UP)
def test_word_is_given_up(instead: str) -> None:
    """Neither pages nor sources have it: comments, docstrings and names included."""
    word = re.compile(GIVEN_UP[instead])
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts(*PAGES, *SOURCES)
        if not name.startswith(STAYS.get(instead, ()))
        for number, line in enumerate(text.splitlines(), 1)
        if word.search(line)
    ]
    assert found == [], f"write {instead}"


@pytest.mark.parametrize("habit", MESSAGES)
def test_message_says_what_and_why(habit: str) -> None:
    """Its subject is a noun; what to do is a command to try."""
    found = [f"{where}: {said}" for where, said in messages() if re.search(habit, said)]
    assert found == []


def test_sentence_of_a_page_begins_with_a_noun() -> None:
    """Not with "who" and "what", but where it asks; headings and cells may be short."""
    begins = re.compile(r"(?:[.:;] |^|\*\*)((?:So |And )?(?:Who|What)(?:ever)?\b[^.?|]*)([.?])")
    found = [
        f"{name}: {sentence}"
        for name, text in texts(*PAGES)
        for paragraph in re.split(r"\n\n|\n(?=[*|#-] |#|\*\*)", text)
        for sentence, end in begins.findall(re.sub(r"\s+", " ", paragraph.lstrip("*- ")))
        if end == "."
    ]
    assert found == []


def test_keys_of_json_have_the_same_words() -> None:
    """In all schemas of outputs."""
    found = {
        (path.name, key)
        for path in (ROOT / "schema" / "output").glob("*.json")
        for key in output_schema.keys(json.loads(path.read_text()))
    }
    assert found
    assert [each for each in found if each[1] in KEYS] == []


def test_headers_have_the_same_words() -> None:
    """And no hyphens."""
    screens = (ROOT / "tests" / "unit" / "commands" / "screens").glob("*.txt")
    lines = {line for path in screens for line in path.read_text().splitlines()}
    heads = [line for line in lines if line.isupper() and "  " in line.strip()]
    assert heads
    cells = {cell for line in heads for cell in re.split(r" {2,}", line.strip())}
    assert cells & HEADERS == set()
    assert [cell for cell in cells if re.search(r"\w-", cell)] == []
