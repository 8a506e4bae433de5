"""How kabpfctl says things."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from typing import TypeVar

import pytest

from kabpf import output, tables
from kabpf.policy.model import Options, Range

Item = TypeVar("Item")


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


def test_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut on a terminal alone, and not where every column is asked for."""
    columns, rows = tables.columns("ONE~", "TWO~"), [("a" * 60, "b" * 60)]
    monkeypatch.setenv("COLUMNS", "80")
    output.print_table(columns, rows)
    assert capsys.readouterr().out.splitlines()[1] == "  ".join(rows[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_table(columns, rows)
    assert len(capsys.readouterr().out.splitlines()[1]) == 80
    output.print_table(columns, rows, is_wide=True)
    assert capsys.readouterr().out.splitlines()[1] == "  ".join(rows[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(keepalive=False), "off"),
        (Options(), "-/-/-"),
        (Options(idle_s=Range(30, 300), probes=Range.exactly(6)), "30s..300s/-/6"),
        (Options(user_timeout_ms=Range.exactly(120_000)), "-/-/- ut=120s"),
    ],
)
def test_options_are_one_word(options: Options, text: str) -> None:
    """In the order idle, interval, probes; - is not set."""
    assert output.options_cell(options) == text


def test_array_of_json_is_printed_item_by_item(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the same as one that is there as a whole."""
    items = [{"cgroup": "/a"}, {"cgroup": "/b"}]
    for some in (items, []):
        output.print_json({"all": output.Streamed(iter(some), len(some)), "other": 1})
        expected = {"version": output.JSON_VERSION, "all": some, "other": 1}
        assert capsys.readouterr().out == json.dumps(expected, indent=2) + "\n"


class Pieces(io.StringIO):
    """Standard output that notes how long what is written is, and how much of it was made then."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, int]] = []
        self.made = 0

    def items(self, one: Item) -> Iterator[Item]:
        for _ in range(1000):
            self.made += 1
            yield one

    def write(self, text: str) -> int:
        self.written.append((len(text), self.made))
        return super().write(text)


def test_long_json_is_written_in_pieces() -> None:
    """Neither all at once, as it may take 200 MB, nor each token, which takes longer than making
    it."""
    pieces = Pieces()
    made = pieces.items({"cgroup": "/" * 4000, "idle": 1})
    with contextlib.redirect_stdout(pieces):
        output.print_json({"all": output.Streamed(made, 1000)})
    (longest, _), *_ = sorted(pieces.written, reverse=True)
    assert longest < 1_000_000
    assert len(pieces.written) < 100
    assert pieces.written[0][1] < 300


def test_long_table_is_written_in_pieces() -> None:
    """Its rows are made once to be measured and again to be written, and none is kept."""
    pieces = Pieces()
    rows = output.Made(lambda: pieces.items(("/" * 4000, "web")))
    with contextlib.redirect_stdout(pieces):
        output.print_table(tables.columns("CGROUP", "POLICY"), rows)
    (longest, _), *_ = sorted(pieces.written, reverse=True)
    assert longest < 100_000
    assert len(pieces.written) < 100
    assert 1000 < pieces.written[0][1] < 1300
