"""Tables that fit a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kabpf import tables

COLUMNS = tables.columns("POLICY~", "+CGROUPS", "OPTIONS~~", "+NEW", "+TIMED OUT")
ROWS = [
    ("postgresql.service", "1", "60s/10s/6 ut=120s", "20481", "3"),
    ("a", "12", "off", "0", "0"),
]


def test_table_without_a_width_is_as_wide_as_its_cells() -> None:
    """Columns are two spaces apart, numbers stand to the right, and nothing trails."""
    assert tables.table(COLUMNS, ROWS) == (
        "POLICY              CGROUPS  OPTIONS              NEW  TIMED OUT\n"
        "postgresql.service        1  60s/10s/6 ut=120s  20481          3\n"
        "a                        12  off                    0          0\n"
    )


def test_table_that_is_too_wide_has_its_longest_texts_cut_in_the_middle() -> None:
    """Both ends of a name are left, and numbers are whole."""
    assert tables.table(COLUMNS, ROWS, 60) == (
        "POLICY          CGROUPS  OPTIONS              NEW  TIMED OUT\n"
        "postgresql…           1  60s/10s/6 ut=120s  20481          3\n"
        "a                    12  off                    0          0\n"
    )


def test_table_without_room_for_rows_is_blocks() -> None:
    """On the narrowest terminal each cell has a line of its own, and nothing is cut."""
    assert tables.table(COLUMNS, ROWS, 40) == (
        "POLICY     postgresql.service\n"
        "CGROUPS    1\n"
        "OPTIONS    60s/10s/6 ut=120s\n"
        "NEW        20481\n"
        "TIMED OUT  3\n"
        "\n"
        "POLICY     a\n"
        "CGROUPS    12\n"
        "OPTIONS    off\n"
        "NEW        0\n"
        "TIMED OUT  0\n"
    )


def test_column_of_words_is_folded_before_anything_is_cut() -> None:
    """Only a word that is longer than its column is cut."""
    columns = tables.columns("UNIT~", "SET BY|")
    rows = [("billing.service", "billing, application"), ("a.service", "a-very-long-policy")]
    assert tables.table(columns, rows, 40) == (
        "UNIT             SET BY\n"
        "billing.service  billing, application\n"
        "a.service        a-very-long-policy\n"
    )
    assert tables.table(columns, rows, 35) == (
        "UNIT             SET BY\n"
        "billing.service  billing,\n"
        "                 application\n"
        "a.service        a-very-long-policy\n"
    )
    assert tables.table(columns, rows, 28) == (
        "UNIT           SET BY\n"
        "billing…       billing,\n"
        "               application\n"
        "a.service      a-very…policy\n"
    )


TEXTS = st.text(st.characters(whitelist_categories=("L", "N", "P", "S")), min_size=1, max_size=90)
NUMBERS = st.integers(0, 10**9).map(str)


@given(
    st.lists(st.tuples(TEXTS, NUMBERS, TEXTS, NUMBERS, NUMBERS), min_size=1, max_size=5),
    st.integers(40, 200),
)
def test_no_width_drops_or_empties_a_column(
    rows: list[tuple[str, str, str, str, str]], width: int
) -> None:
    """At 40 columns or more no line is wider than the terminal, and every cell is there: whole in a
    block, and in a row with all of a number and both ends of a text."""
    lines = tables.table(COLUMNS, rows, width).splitlines()
    assert all(tables.text_width(line) <= width for line in lines)
    if lines[0].startswith("POLICY") and "CGROUPS" in lines[0]:
        for line, row in zip(lines[1:], rows, strict=True):
            assert line[0] == row[0][0]
            assert line.split()[-2:] == [row[3], row[4]]
            assert f"  {row[1]}  {row[2][0]}" in line
        return
    cells = [line[len("TIMED OUT  ") :] for line in lines]
    assert "".join(cells) == "".join("".join(row) for row in rows)
    heads = [line[: len("TIMED OUT  ")].strip() for line in lines]
    assert [head for head in heads if head] == [each.head for each in COLUMNS] * len(rows)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (26, "postgresql@15-main.service"),
        (25, "postgresql@15-main…"),
        (19, "postgresql@15-main…"),
        (18, "postgresq…@15-main"),
        (14, "postgre…5-main"),
    ],
)
def test_type_of_a_service_is_cut_first(width: int, shown: str) -> None:
    """What tells two instances apart stands before it."""
    assert tables.cut("postgresql@15-main.service", width) == shown


@given(TEXTS, st.integers(1, 30))
def test_cut_text_keeps_its_ends(text: str, width: int) -> None:
    """What is cut fits, and is the text with one piece of its middle left out."""
    shown = tables.cut(text, width)
    assert tables.text_width(shown) <= max(width, 1)
    if shown != text:
        start, _, end = shown.partition(tables.ELLIPSIS)
        assert text.startswith(start)
        assert text.endswith(end)


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("漢字", 4), ("e\N{COMBINING ACUTE ACCENT}", 1), ("…", 1)]
)
def test_width_is_that_on_a_terminal(text: str, width: int) -> None:
    """Wide characters take two columns, and combining ones none."""
    assert tables.text_width(text) == width
