"""What a check found, how grave it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from kabpf.tables import shortened

SHOWN_MAX = 5  # names in one finding


class Grade(StrEnum):
    """An error keeps kabpf from its work, a warning is probably unintended, a note informs."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found. The advice is a command or an act, or nothing; it destroys
    nothing."""

    grade: Grade
    text: str
    advice: str = ""


Findings = Iterator[Finding]
_Graded = Callable[..., Finding]

ok: _Graded = partial(Finding, Grade.OK)
note: _Graded = partial(Finding, Grade.NOTE)
warning: _Graded = partial(Finding, Grade.WARNING)
error: _Graded = partial(Finding, Grade.ERROR)


def listed(names: Collection[str]) -> str:
    """Names as a person would list them; of many the first ones."""
    shown = ", ".join(map(shortened, list(names)[:SHOWN_MAX]))
    more = len(names) - SHOWN_MAX
    return f"{shown} and {more} more" if more > 0 else shown
