"""Tables that fit a terminal.

A table is as wide as it has to be. Where that is more than there is room for, texts are folded or
cut in their middle, the longest first. Where even short texts don't fit, each row becomes a block
with a line for each column, and nothing is cut. So every column has its content at any width. Pure.
"""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Rows = Iterable[Sequence[str]]  # gone through more than once, so that none need be kept

GAP = "  "
ELLIPSIS = "…"
TEXT_MIN = 10  # columns of the terminal that a text is left with in a row; below that come blocks
FOLD_MIN = 13  # that a text to be folded is left with, while others can be cut
# In which order texts are cut, and to what: long names, then addresses and options to what an IPv4
# address takes, and then all of them.
_CUTS = ((1, 20), (2, 21), (1, 14), (2, 16), (1, TEXT_MIN), (2, TEXT_MIN))
TYPE = ".service"  # most units have it
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


def table(columns: Sequence[Column], rows: Rows, width: int | None = None) -> str:
    """`lines` as one text."""
    return "".join(lines(columns, rows, width))


def lines(columns: Sequence[Column], rows: Rows, width: int | None = None) -> Iterator[str]:
    """Lines with a head over each column, at most `width` columns of the terminal wide; None is
    any width. Of a text that is too long to read, the middle is left out in any case."""
    measured = _measured(columns, rows)
    widths = measured.natural if width is None else _fitted(columns, measured, width)
    return _lines(columns, rows, widths) if widths else _blocks(columns, _short(rows), width)


def blocks(columns: Sequence[Column], rows: Rows, width: int | None = None) -> str:
    """A block of lines for each row: a head and its cell in each, folded to `width`."""
    return "".join(_blocks(columns, rows, width))


def _blocks(columns: Sequence[Column], rows: Rows, width: int | None) -> Iterator[str]:
    head_width = max(text_width(column.head) for column in columns)
    room = sys.maxsize if width is None else width - head_width - len(GAP)
    for place, row in enumerate(rows):
        if place:
            yield "\n"
        for column, cell in zip(columns, row, strict=True):
            for number, line in enumerate(folded(cell, room) if cell else ()):
                yield _padded("" if number else column.head, head_width) + GAP + line + "\n"


def shortened(text: str) -> str:
    """A text without its middle where it is too long to read."""
    return cut(text, CELL_MAX)


def cut(text: str, width: int) -> str:
    """The text, without so much of its middle that it fits; the ends of names tell them apart, and
    of a service's name that is what stands before its type."""
    if text_width(text) <= width:
        return text
    text = text.removesuffix(TYPE)
    if text_width(text) < width:
        return text + ELLIPSIS
    room = width - text_width(ELLIPSIS)
    if text.isascii():
        return text[: (room + 1) // 2] + ELLIPSIS + text[len(text) - room // 2 :]
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
    if text.isascii() or text.replace(ELLIPSIS, "").isascii():
        return len(text)
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class _Measured(NamedTuple):
    """How wide columns have to be, and the longest word of each that is folded, by its place."""

    natural: list[int]
    words: dict[int, int]


def _measured(columns: Sequence[Column], rows: Rows) -> _Measured:
    natural = [text_width(column.head) for column in columns]
    words = {place: 0 for place, column in enumerate(columns) if column.is_folded}
    for row in _short(rows):
        for place, cell in enumerate(row):
            natural[place] = max(natural[place], text_width(cell))
        for place in words:
            words[place] = max(words[place], *map(text_width, row[place].split(" ")))
    return _Measured(natural, words)


def _short(rows: Rows) -> Iterator[list[str]]:
    for row in rows:
        yield [shortened(cell) for cell in row]


def _fitted(columns: Sequence[Column], measured: _Measured, width: int) -> list[int] | None:
    """The columns' widths; None where there is no room for a row."""
    widths, words = [*measured.natural], measured.words
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
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


def _lines(columns: Sequence[Column], rows: Rows, widths: Sequence[int]) -> Iterator[str]:
    for row in itertools.chain([[column.head for column in columns]], _short(rows)):
        cells = [
            _within(cell, width) if column.is_folded else [cut(cell, width)]
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            padded = (
                _padded(cell, width, column.is_number)
                for cell, width, column in zip(line, widths, columns, strict=True)
            )
            yield GAP.join(padded).rstrip() + "\n"


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
