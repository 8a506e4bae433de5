"""ARCHITECTURE.md is a map of the tree as it is."""

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
TEXT = (SOURCE / "ARCHITECTURE.md").read_text()
ITEMS = re.findall(r"^- (?:.|\n  )+", TEXT, re.MULTILINE)
# A command's file has the command's name.
MODULES = [
    path
    for path in sorted(SOURCE.glob("kabpf/**/*.py"))
    if path.parent.name != "commands" and not path.name.startswith("__")
]
CODE = {path: path.read_text() for path in (*MODULES, *sorted(SOURCE.glob("bpf/*")))}
CALLS = sorted(
    (owner, name)
    for owner, name in set(re.findall(r"`(\w+)\.(\w\w+)`", TEXT))
    if any(path.stem == owner for path in MODULES) or owner[0].isupper()
    if not [*(SOURCE / "kabpf").rglob(f"{owner}.{name}")]  # a file's name
)


def test_it_is_read_at_one_sitting() -> None:
    """It has at most 200 lines."""
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_is_named_with_its_package(module: Path) -> None:
    """A reader finds each module beside the package that it is in."""
    parts = module.relative_to(SOURCE).parts
    where = f"`{'/'.join(parts)}`" if len(parts) == 2 else f"`kabpf/{parts[1]}/`"
    name = where if len(parts) == 2 else f"`{module.stem}`"
    assert any(where in item and name in item for item in ITEMS)


@pytest.mark.parametrize("file", sorted((SOURCE / "bpf").iterdir()), ids=lambda path: path.name)
def test_file_of_the_programs_is_named(file: Path) -> None:
    """So is each file of the BPF programs."""
    assert any("`bpf/`" in item and f"`{file.name}`" in item for item in ITEMS)


@pytest.mark.parametrize(("owner", "name"), CALLS)
def test_function_is_where_the_text_says(owner: str, name: str) -> None:
    """A function that is named with its module or its class is there."""
    if owner[0].isupper():
        found = [code for code in CODE.values() if re.search(rf"^class {owner}\b", code, re.M)]
    else:
        found = [code for path, code in CODE.items() if path.stem == owner]
    assert any(re.search(rf"^ *(def|class) {name}\b", code, re.M) for code in found)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+_\w+)`", TEXT))))
def test_name_is_in_the_code(name: str) -> None:
    """So is a program, a map, or a function that is named alone."""
    assert any(re.search(rf"\b{name}\b", code) for code in CODE.values())
