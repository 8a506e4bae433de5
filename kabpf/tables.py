"""Tables that fit a terminal.

A table is as wide as it has to be. Where that is more than there is room for, texts are folded or
cut in their middle, the longest first. Where even short texts don't fit, each row becomes a block
with a line for each column, and nothing is cut. So every column has its content at any width. Pure.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

GAP = "  "
ELLIPSIS = "…"
TEXT_MIN = 10  # columns of the terminal that a text is left with in a row; below that come blocks
FOLD_MIN = 13  # that a text to be folded is left with, while others can be cut
# In which order texts are cut, and to what: long names, then addresses and options to what an IPv4
# address takes, and then all of them.
_CUTS = ((1, 20), (2, 21), (1, 14), (2, 16), (1, TEXT_MIN), (2, TEXT_MIN))
CELL_MAX = 400  # a cgroup path that a person chose is shorter
NARROWEST = 40  # the least width that a table is made for


class Column(NamedTuple):
    """The head of a column; numbers stand to the right, texts may be cut or folded."""

    head: str
    is_number: bool = False
    may_be_cut: int = 0  # never; those of 1 before those of 2
    is_folded: bool = False  # between words, before anything is cut


def columns(*heads: str) -> tuple[Column, ...]:
    """Columns by their heads: `POLICY~` may be cut, `OPTIONS~~` where that is not enough, `SET BY|`
    is folded between words, and only words are cut; `+NEW` is a number."""
    return tuple(
        Column(
            head.strip("~+|"),
            head.startswith("+"),
            1 if head.endswith("|") else head.count("~"),
            head.endswith("|"),
        )
        for head in heads
    )


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None
) -> str:
    """Lines with a head over each column, at most `width` columns of the terminal wide; None is
    any width. Of a text that is too long to read, the middle is left out in any case."""
    rows = [[shortened(cell) for cell in row] for row in rows]
    if width is None:
        return _lines(columns, rows, _natural(columns, rows))
    widths = _fitted(columns, rows, width)
    return _lines(columns, rows, widths) if widths else blocks(columns, rows, width)


def blocks(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None
) -> str:
    """A block of lines for each row: a head and its cell in each, folded to `width`."""
    head_width = max(text_width(column.head) for column in columns)
    room = sys.maxsize if width is None else width - head_width - len(GAP)
    return "\n".join(
        "".join(
            _padded("" if number else column.head, head_width) + GAP + line + "\n"
            for column, cell in zip(columns, row, strict=True)
            for number, line in enumerate(folded(cell, room))
            if cell
        )
        for row in rows
    )


def shortened(text: str) -> str:
    """A text without its middle where it is too long to read."""
    return cut(text, CELL_MAX)


def cut(text: str, width: int) -> str:
    """The text, without so much of its middle that it fits; the ends of names tell them apart."""
    if text_width(text) <= width:
        return text
    room = width - text_width(ELLIPSIS)
    start, end = "", ""
    for before, after in zip(text, reversed(text), strict=True):
        room -= text_width(before)
        if room < 0:
            break
        start += before
        room -= text_width(after)
        if room < 0:
            break
        end = after + end
    return start + ELLIPSIS + end


def text_width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _natural(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(text_width(column.head), *(text_width(row[place]) for row in rows), 0)
        for place, column in enumerate(columns)
    ]


def _fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int
) -> list[int] | None:
    """The columns' widths; None where there is no room for a row."""
    widths = _natural(columns, rows)
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    words = {
        place: max(map(text_width, _words(row[place] for row in rows)), default=0)
        for place, column in enumerate(columns)
        if column.is_folded
    }
    folds = {place: max(FOLD_MIN, word) for place, word in words.items()}
    cuts = (
        {place: least for place, each in enumerate(columns) if each.may_be_cut == turn}
        for turn, least in _CUTS
    )
    for narrowest in (folds, *cuts):
        least = {
            place: max(to, text_width(columns[place].head), min(FOLD_MIN, words.get(place, 0)))
            for place, to in narrowest.items()
        }
        while excess > 0:
            wider = [place for place in least if widths[place] > least[place]]
            if not wider:
                break
            widths[max(wider, key=widths.__getitem__)] -= 1
            excess -= 1
    return None if excess > 0 else widths


def _lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    lines = []
    for row in ([column.head for column in columns], *rows):
        cells = [
            _within(cell, width) if column.is_folded else [cut(cell, width)]
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        for line in zip_longest(*cells, fillvalue=""):
            padded = (
                _padded(cell, width, column.is_number)
                for cell, width, column in zip(line, widths, columns, strict=True)
            )
            lines.append(GAP.join(padded).rstrip() + "\n")
    return "".join(lines)


def _words(cells: Iterable[str]) -> set[str]:
    return {word for cell in cells for word in cell.split(" ")}


def _within(text: str, width: int) -> list[str]:
    """Lines of whole words, of which those longer than a line are cut."""
    return folded(" ".join(cut(word, width) for word in text.split(" ")), width)


def folded(text: str, width: int) -> list[str]:
    """Lines of whole words; a word that is longer than a line is broken."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if text_width(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _padded(text: str, width: int, is_number: bool = False) -> str:
    padding = " " * (width - text_width(text))
    return padding + text if is_number else text + padding
