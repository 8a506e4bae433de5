"""How kabpfctl says things."""

from __future__ import annotations

import sys

import pytest

from kabpf import output
from kabpf.commands import sockets


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


def test_row_that_is_too_wide_is_stacked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal of 80 columns every cell of a wide row is there, whole or folded."""
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    heads = ("CGROUP", "NETNS", *sockets.HEADS)
    address = "[2001:db8:1234:5678:9abc:def0:1234:5678]:48956"
    row = (
        *("user@1000.service/init.scope", "4026531840", address, "10.1.0.7:5432", "established"),
        *("on", "32767s", "32768s", "127", "2147484ms", "29966.2s"),
        "billing (/etc/kabpf/policy.d/billing.yaml:1), application (idle)",
    )
    output.print_table(heads, [row, row], sockets.STACKS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    starts = [lines[2].index(stack[-1]) for stack in sockets.STACKS]
    texts = [
        "".join("".join(line[start:end].split()) for line in lines)
        for start, end in zip(starts, [*starts[1:], 80], strict=True)
    ]
    by_head = dict(zip(heads, row, strict=True))
    for stack, text in zip(sockets.STACKS, texts, strict=True):
        cells = "".join(by_head[head] for head in stack).replace(" ", "")
        assert text == "".join(stack) + 2 * cells


def test_row_that_fits_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns stand side by side where there is room."""
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    output.print_table(("ONE", "TWO"), [("a", "b")], (("ONE", "TWO"),))
    assert capsys.readouterr().out.split() == ["ONE", "TWO", "a", "b"]
