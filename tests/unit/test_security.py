"""docs/security.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
TEXT = (SOURCE / "docs/security.md").read_text()


def named() -> list[tuple[str, str]]:
    """Files and functions; one that begins with colons is in the file named before it."""
    found, file = [], ""
    for place in re.findall(r"`((?:tests/\S+\.py)?(?:::\w+)?)`", TEXT):
        path, _, function = place.partition("::")
        file = path or file
        found.append((file, function))
    return found


@pytest.mark.parametrize(("file", "function"), named())
def test_test_is_there(file: str, function: str) -> None:
    """Each test that shows what holds."""
    code = (SOURCE / file).read_text()
    assert not function or re.search(rf"^def {function}\(", code, re.MULTILINE)


def test_it_is_found() -> None:
    """SECURITY.md leads there."""
    assert len(named()) > 30
    assert "docs/security.md" in (SOURCE / "SECURITY.md").read_text()


def test_nobody_is_sent_to_an_address_that_is_none() -> None:
    """The package's metadata have an address that no mail reaches; no page names it but to say
    so, and SECURITY.md has a way that exists."""
    pages = [*SOURCE.glob("*.md"), *SOURCE.glob("docs/*.md"), *SOURCE.glob("man/*.rst")]
    assert [page.name for page in pages if "@kabpf" in page.read_text()] == []
    assert "Report a vulnerability" in (SOURCE / "SECURITY.md").read_text()
    control = (SOURCE / "debian/control").read_text()
    assert "SECURITY.md" in re.split(r"^Maintainer:", control, flags=re.MULTILINE)[0]
