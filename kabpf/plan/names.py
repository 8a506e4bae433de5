"""The names that selectors spell out, as numbers: the kernel looks up a name once, by pieces, and
from then on it is a number."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable

from kabpf.digests import blake2b

PIECE = 64  # bytes: KABPF_PIECE in kabpf.h
# KABPF_NAME_BIT: the numbers of sets of globs are without it.
NAME_BIT = 1 << 63

Piece = tuple[int, bytes]  # the number of what is before it, and up to PIECE bytes without a NUL


def number(name: str) -> int:
    """A name's number, the same in every process."""
    return _of_name(name)[-1][1]


def pieces(names: Iterable[str]) -> dict[Piece, int]:
    """The pieces of these names, and the number of each name up to a piece's end. The last piece
    is shorter than PIECE, if need be empty."""
    return dict(itertools.chain.from_iterable(map(_of_name, names)))


@functools.lru_cache(maxsize=4096)  # most are asked about for many states, in each pass
def _of_name(name: str) -> tuple[tuple[Piece, int], ...]:
    raw, above = os.fsencode(name), 0
    found = []
    for start in range(0, len(raw) + 1, PIECE):
        digest = blake2b(raw[: start + PIECE], digest_size=8).digest()
        here = int.from_bytes(digest, "little") | NAME_BIT
        found.append(((above, raw[start : start + PIECE]), here))
        above = here
    return tuple(found)
