"""How kabpfctl says things."""

from __future__ import annotations

import pytest

from kabpf import output


def test_table_is_as_wide_as_its_cells() -> None:
    """Columns are aligned, two spaces apart, and nothing trails."""
    assert output.table(("A", "LONG", "B"), [("one", "x", ""), ("y", "z", "last")]) == (
        "A    LONG  B\none  x\ny    z     last\n"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("web.service", "web.service"),
        ("é", "é"),
        ("\x1b[31m", "\\x1b[31m"),
        ("two\nlines", "two\\nlines"),
        ("\udcff", "\\udcff"),
    ],
)
def test_shown_name_is_safe_for_a_terminal(name: str, text: str) -> None:
    """What a terminal would obey or can't show is escaped."""
    assert output.shown(name) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "-"),
        (60, "s", "60s"),
        (6, "", "6"),
        (1500, "ms", "1500ms"),
        (90000, "ms", "90s"),
    ],
)
def test_cell_has_its_unit(value: int | None, unit: str, text: str) -> None:
    """Whole seconds are written as seconds."""
    assert output.cell(value, unit) == text
