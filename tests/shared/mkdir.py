"""What the kernel does in a mkdir, for tests of the tables that it does it by."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kabpf.plan.births import ANYWHERE, BLOCK_CELLS, GENERATIONS
from kabpf.plan.names import PIECE, Piece
from kabpf.plan.state import BirthEntry


@dataclass(frozen=True)
class Tables:
    """What births.h looks at; the automata for globs by generation."""

    births: Mapping[tuple[int, int], BirthEntry]
    names: Mapping[Piece, int]
    globs: Mapping[int, Sequence[bytes]]


def find_birth(tables: Tables, state: int, name: str) -> BirthEntry | None:
    """The function of this name in births.h."""
    generation = state % GENERATIONS
    raw = os.fsencode(name)
    births, anywhere = tables.births, ANYWHERE | generation
    number, set = number_of(tables.names, raw), set_of(tables.globs.get(generation, ()), raw)
    found = None
    is_set = False
    if number:
        if (state, number) in births:
            return births[state, number]
        found = births.get((anywhere, number))
    if not found and set:
        if (state, set) in births:
            return births[state, set]
        found = births.get((anywhere, set))
        is_set = True
    rest = births.get((state, 0))
    if found is None or rest is None:
        return rest if found is None else found
    stronger = rest if rest.strength > found.strength else found
    onward = rest.state if found.state == anywhere else found.state
    return stronger._replace(state=onward, ask=found.ask or (is_set and rest.ask))


def number_of(names: Mapping[Piece, int], raw: bytes) -> int:
    """The function of this name there."""
    above = 0
    for start in range(0, len(raw) + 1, PIECE):
        above = names.get((above, raw[start : start + PIECE]), 0)
        if not above:
            return 0
    return above


def set_of(blocks: Sequence[bytes], raw: bytes) -> int:
    """The function of this name there."""
    if not blocks:
        return 0
    classes = blocks[0][:256]
    shift, state = struct.unpack_from("=HH", blocks[0], 256)
    for byte in raw + b"\0":
        block, cell = divmod(state << shift | classes[byte], BLOCK_CELLS)
        (state,) = struct.unpack_from("=H", blocks[block], 2 * cell)
    return int(state)
