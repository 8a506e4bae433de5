"""What becomes of a new cgroup, and what the kernel knows of globs, as values."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from kabpf.policy.model import Policy

# KABPF_STATE_UNKNOWN and KABPF_STATE_ANYWHERE in kabpf.h. The lowest bits of states are 0 here; in
# the kernel they are the generation of globs (diff).
UNKNOWN = 0
ANYWHERE = 8
GENERATIONS = 8  # a power of two: KABPF_GENERATIONS

BLOCK_CELLS = 16384  # of 16 bits, in kabpf_block of kabpf.h

# A state, and a child's name that a selector spells out; or the number of the set of globs that
# match it; or "" for any other.
Step = tuple[int, str | int]


class Birth(NamedTuple):
    """What becomes of a child: its state, its policy, and whether a glob might say otherwise, of
    which only user space can tell.

    The strength is that of the policy's selector: of two births of one child the kernel takes the
    policy of the stronger.
    """

    state: int
    policy: Policy | None  # None: the parent's
    ask: bool
    strength: int = 0


class Matched(NamedTuple):
    """What is known of a name: the globs that match it, and those that only user space can tell."""

    globs: tuple[str, ...] = ()
    doubted: tuple[str, ...] = ()


class NameAutomaton(NamedTuple):
    """The automaton; `sets` by their numbers, of which 0 is the set of none."""

    sets: tuple[Matched, ...]
    packed: bytes = b""  # its cells, of which there may be megabytes; none where there are no globs
    left_out: tuple[str, ...] = ()  # globs that there was no room for

    @property
    def blocks(self) -> tuple[bytes, ...]:
        """The values of the kernel's array."""
        cells, size = zlib.decompress(self.packed) if self.packed else b"", 2 * BLOCK_CELLS
        return tuple(cells[at : at + size].ljust(size, b"\0") for at in range(0, len(cells), size))
