"""The names that selectors spell out, as numbers: the kernel looks up a name once, by pieces, and
from then on it is a number."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable

PIECE = 64  # bytes: KABPF_PIECE in kabpf.h
# KABPF_NAME_BIT: the numbers of sets of globs are without it.
NAME_BIT = 1 << 63

Piece = tuple[int, bytes]  # the number of what is before it, and up to PIECE bytes without a NUL


@functools.lru_cache(maxsize=4096)  # most names are in the rows of many states
def number(name: str) -> int:
    """A name's number, the same in every process."""
    return _number(os.fsencode(name))


def pieces(names: Iterable[str]) -> dict[Piece, int]:
    """The pieces of these names, and the number of each name up to a piece's end. The last piece
    is shorter than PIECE, if need be empty."""
    found: dict[Piece, int] = {}
    for name in names:
        raw, above = os.fsencode(name), 0
        for start in range(0, len(raw) + 1, PIECE):
            piece = raw[start : start + PIECE]
            here = found[above, piece] = _number(raw[: start + PIECE])
            above = here
    return found


def _number(raw: bytes) -> int:
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest, "little") | NAME_BIT
