"""Globs within a name as one automaton over the bytes of the name, which the kernel walks at mkdir.

It tells which of the globs match, as the number of a set; the sets are worked out here. * and
literal text are exact for any bytes. ? and [...] are exact for ASCII: where one of them meets a
byte above 127, of which fnmatch(3) in Python makes characters first, the glob is in doubt.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import sys
import zlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from kabpf.plan.births import Matched, NameAutomaton
from kabpf.policy.model import GLOB

# What one automaton may take. The steps stand for time, about 1 us each: what is left out must not
# depend on how busy the machine is.
STATES_MAX = 65535  # 16 bits
BYTES_MAX = 4 << 20  # two of them are in the kernel during a reload
STEPS_MAX = 250_000

# What is built once for all globs that end alike (_Part).
PART_STATES_MAX, PART_POSITIONS_MAX = 64, 4

# The first block of kabpf_globs tells how to read the cells.
HEAD_CELLS = 130  # the class of each byte, in 256 bytes; the shift; the first state

ASCII = 128
_STAR, _ANY = object(), object()
_Element = object | int | frozenset[int]  # *, ?, a byte, or the ASCII bytes of a [...]


@functools.lru_cache(maxsize=1)  # most reloads leave the globs alone
def compiled_names(globs: frozenset[str]) -> NameAutomaton:
    """The automaton of these globs, without the dearest of them where it takes too much."""
    by_price = sorted(globs, key=_price)
    fits, best, count = 0, _Builder(()).build(), len(by_price)
    too_many = count + 1
    while fits + 1 < too_many:
        if built := _Builder(by_price[:count]).build():
            fits, best = count, built
        else:
            too_many = count
        count = (fits + too_many) // 2
    assert best
    return NameAutomaton(*best, tuple(reversed(by_price[fits:])))


def is_doubtful(glob: str) -> bool:
    """Whether there are names of which only user space can tell whether the glob matches them."""
    if "?" not in glob and "[" not in glob:  # most, of which the elements need not be found
        return False
    return any(element is _ANY or isinstance(element, frozenset) for element in _elements(glob))


def _price(glob: str) -> tuple[int, bool, int, str]:
    """Every * with text behind it remembers more of what came before, and one at the beginning
    does so for every name."""
    return glob.count("*"), glob.startswith("*"), len(glob), glob


def _elements(glob: str) -> list[_Element]:
    """As fnmatch.translate reads it."""
    elements: list[_Element] = []
    at = 0
    while at < len(glob):
        end = at + 1
        if glob[at] == "*":
            if elements[-1:] != [_STAR]:
                elements.append(_STAR)
        elif glob[at] == "?":
            elements.append(_ANY)
        elif glob[at] == "[" and (closed := _end_of_class(glob, at)):
            end = closed
            text = glob[at:end]
            elements.append(
                frozenset(n for n in range(1, ASCII) if fnmatch.fnmatchcase(chr(n), text))
            )
        else:
            special = GLOB.search(glob, end)
            end = special.start() if special else len(glob)
            elements += os.fsencode(glob[at:end])
        at = end
    return elements


def _end_of_class(glob: str, at: int) -> int:
    """Where a [...] ends that begins there; 0 where it does not, so that the [ is a literal one."""
    first = at + 1
    if glob[first : first + 1] == "!":
        first += 1
    return glob.find("]", first + 1) + 1


class _TooDearError(Exception):
    """The automaton takes more than it may."""


class _Part(NamedTuple):
    """States that one state leads to, in a row behind it, and nowhere else: thousands of templates
    differ in what is before their *, so that what is behind it is copied."""

    first: int  # the number of that state
    length: int
    cells: int  # as one number, without those of sets
    targets: int  # 1 in each cell that is the number of a state
    # The places of states in which globs end, and where: an index of the first state's positions,
    # and how far from there.
    ends: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class _Builder:
    """The subset construction, over positions in globs.

    A position waits for one element of its glob. It `loops` where a * is before that, and then
    stays on any byte; all positions before it are of no account then, because whatever they would
    accept it accepts as well.
    """

    def __init__(self, globs: Sequence[str]) -> None:
        elements = [_elements(glob) for glob in globs]
        self._globs = globs
        self._classes, self._ascii_classes, self._class_count = _classes(elements)
        self._read_one = [(each,) for each in self._classes]
        self._shift = (self._class_count - 1).bit_length()
        # By position.
        self._loops: list[bool] = []
        self._of: list[int] = []  # the glob
        self._reads: list[tuple[int, ...]] = []  # classes, but for those of ?
        self._is_any: list[bool] = []
        self._doubt: list[int] = []  # the position of a glob that is in doubt; 0: not from here
        self._ends: dict[int, bool] = {}  # positions that accept, and whether in doubt
        self._lasts: list[int] = []  # of the positions of each glob
        self._rests: dict[int, int] = {}
        self._known_rests: dict[tuple[object, ...], int] = {}
        starts = [self._add(number, each) for number, each in enumerate(elements)]
        self._steps = 0
        first = -(-HEAD_CELLS >> self._shift)
        self._no_row = array("H", bytes(2 << self._shift))
        self._cells = self._no_row * first
        self._numbers: dict[tuple[int, ...], int] = {}
        self._waiting: list[tuple[int, ...]] = []
        self._parts: dict[tuple[int, ...], _Part | None] = {}  # by the rests; None: it is none
        self._in_part = False
        self._sets = {Matched(): 0}
        self._starts = tuple(starts)
        self._first = first

    def build(self) -> tuple[tuple[Matched, ...], bytes] | None:
        """Sets, and the packed cells; None where they take too much."""
        if not self._globs:
            return tuple(self._sets), b""
        try:
            self._number(self._starts)
            while self._waiting:
                self._expand(self._waiting.pop())
        except _TooDearError:
            return None
        return tuple(self._sets), self._packed()

    def _add(self, glob: int, elements: list[_Element]) -> int:
        """Add the positions of a glob; its first one."""
        first = at = len(self._loops)
        texts = [each for each in elements if each is not _STAR]
        in_doubt, length = first + len(texts) + 1, len(texts) + 2
        self._reads += [self._read_one[each] if isinstance(each, int) else () for each in texts]
        self._reads += [(), ()]
        self._loops += [False] * length
        self._is_any += [False] * length
        self._doubt += [0] * length
        for element in elements:
            if element is _STAR:
                self._loops[at] = True
                continue
            if isinstance(element, frozenset):
                self._reads[at] = tuple(sorted({self._classes[byte] for byte in element}))
            self._is_any[at] = element is _ANY
            if not isinstance(element, int):
                self._doubt[at] = in_doubt
            at += 1
        self._loops[in_doubt] = True
        self._ends[in_doubt - 1], self._ends[in_doubt] = False, True
        self._of += [glob] * length
        self._lasts.append(in_doubt)
        return first

    def _rest(self, position: int) -> int:
        """A number of what comes from a position on in its glob: the same number, the same rest."""
        number = self._rests.get(position)
        if number is None:
            end = self._lasts[self._of[position]]
            rest = tuple(
                tuple(each[position:end]) for each in (self._reads, self._loops, self._is_any)
            )
            doubts = tuple(map(bool, self._doubt[position:end]))
            known = self._known_rests
            number = known.setdefault((rest, doubts), len(known))
            self._rests[position] = number
        return number

    def _expand(self, positions: tuple[int, ...]) -> None:
        stay, go_on = [], []
        doubtful = set()
        by_class: dict[int, list[int]] = {}
        for position in positions:
            if self._loops[position]:
                stay.append(position)
            for each in self._reads[position]:
                by_class.setdefault(each, []).append(position + 1)
            if self._is_any[position]:
                go_on.append(position + 1)
            if self._doubt[position]:
                doubtful.add(self._doubt[position])
        doubts = list(doubtful)
        row = array("H", [self._target(stay, go_on)]) * self._class_count
        if go_on or doubts:
            others = self._class_count - self._ascii_classes
            row[self._ascii_classes :] = array("H", [self._target(stay, doubts)]) * others
        for each, advanced in by_class.items():
            rest = go_on if each < self._ascii_classes else doubts
            row[each] = self._target(stay, advanced + rest if rest else advanced)
        row[0] = self._set(positions)
        at = self._numbers[positions] << self._shift
        self._cells[at : at + len(row)] = row

    def _target(self, stay: list[int], advanced: list[int]) -> int:
        """The state of these positions, none of which is in both."""
        positions = stay + advanced
        self._steps += 1 + len(positions)
        for each in advanced:
            if self._loops[each]:
                glob = self._of[each]
                positions = [one for one in positions if one >= each or self._of[one] != glob]
        if len(positions) > 1:
            positions.sort()
        return self._number(tuple(positions))

    def _number(self, positions: tuple[int, ...]) -> int:
        number = self._numbers.get(positions)
        if number is None:
            rests = None if self._in_part else self._rests_if_closed(positions)
            if rests is None:
                number = self._new(positions)
            elif part := self._parts.get(rests):
                number = self._copied(part, positions)
            else:
                number = self._new_with_part(positions, rests)
        return number

    def _new(self, positions: tuple[int, ...]) -> int:
        number = self._numbers[positions] = len(self._cells) >> self._shift
        self._cells.extend(self._no_row)
        self._require_room()
        self._waiting.append(positions)
        return number

    def _require_room(self) -> None:
        too_many = len(self._cells) >> self._shift > STATES_MAX + 1
        if too_many or 2 * len(self._cells) > BYTES_MAX or self._steps > STEPS_MAX:
            raise _TooDearError

    def _rests_if_closed(self, positions: tuple[int, ...]) -> tuple[int, ...] | None:
        """The rests of a few globs that nothing takes away, in which case they alone decide which
        states come next."""
        if not 0 < len(positions) <= PART_POSITIONS_MAX:
            return None
        if not all(self._loops[each] for each in positions):
            return None
        if len({self._of[each] for each in positions}) < len(positions):
            return None
        return tuple(map(self._rest, positions))

    def _new_with_part(self, positions: tuple[int, ...], rests: tuple[int, ...]) -> int:
        """Number a state, and see whether it leads to so few others that they are a part."""
        if rests in self._parts:
            return self._new(positions)
        waiting, self._waiting, self._in_part = self._waiting, [], True
        first = self._new(positions)
        states: list[tuple[int, ...]] = []
        while self._waiting and len(states) < PART_STATES_MAX:
            states.append(self._waiting.pop())
            self._expand(states[-1])
        self._in_part = False
        complete = not self._waiting
        self._waiting = waiting + self._waiting
        self._parts[rests] = self._part(first, positions, states) if complete else None
        return first

    def _part(
        self, first: int, positions: tuple[int, ...], states: list[tuple[int, ...]]
    ) -> _Part | None:
        width = 1 << self._shift
        cells, targets = self._cells[first * width :], array("H")
        row = array("H", [0] + [1] * (self._class_count - 1)) + self._no_row[self._class_count :]
        ends = []
        index = {self._of[each]: at for at, each in enumerate(positions)}
        for state in states:
            place = self._numbers[state] - first
            row_of_state = cells[place * width : (place + 1) * width]
            if min(row_of_state[1 : self._class_count]) < first:  # it leads to one of before
                return None
            if row_of_state[0]:
                cells[place * width] = 0
                here = [(index[self._of[each]], each) for each in state if each in self._ends]
                ends.append((place, tuple((at, each - positions[at]) for at, each in here)))
            targets += row
        one, other = (int.from_bytes(each.tobytes(), sys.byteorder) for each in (cells, targets))
        return _Part(first, len(states), one, other, tuple(ends))

    def _copied(self, part: _Part, positions: tuple[int, ...]) -> int:
        """Number a state, with a copy of the part that another one with the same rests leads to."""
        first = self._numbers[positions] = len(self._cells) >> self._shift
        self._steps += part.length
        size = 2 * part.length << self._shift
        # Before the sum, in which no cell may reach into the next one.
        if first + part.length > STATES_MAX + 1:
            raise _TooDearError
        cells = part.cells + (first - part.first) * part.targets
        self._cells.frombytes(cells.to_bytes(size, sys.byteorder))
        self._require_room()
        for place, ends in part.ends:
            there = tuple(positions[at] + distance for at, distance in ends)
            self._cells[(first + place) << self._shift] = self._set(there)
        return first

    def _set(self, positions: tuple[int, ...]) -> int:
        ends = [each for each in positions if each in self._ends]
        if not ends:
            return 0
        # In the order of the globs, so that one set is always the same.
        globs, doubted = (
            tuple(self._globs[self._of[each]] for each in ends if self._ends[each] is doubt)
            for doubt in (False, True)
        )
        return self._sets.setdefault(Matched(globs, doubted), len(self._sets))

    def _packed(self) -> bytes:
        head = array("H", bytes(self._classes)) + array("H", [self._shift, self._first])
        self._cells[:HEAD_CELLS] = head
        return zlib.compress(self._cells, 1)  # to a tenth; more would take longer


def _classes(globs: list[list[_Element]]) -> tuple[list[int], int, int]:
    """The class of each byte: bytes that the globs don't tell apart have one. How many classes
    there are of ASCII, and in all. 0 is that of the byte behind the name."""
    literals = {each for elements in globs for each in elements if isinstance(each, int)}
    groups = {each for elements in globs for each in elements if isinstance(each, frozenset)}
    ordered = sorted(groups, key=sorted)
    numbers: dict[object, int] = {0: 0}
    classes = [0]
    ascii_classes = 0
    for byte in range(1, 256):
        kind: object = byte
        if byte == ASCII:
            ascii_classes = len(numbers)
        if byte not in literals:
            kind = byte >= ASCII, tuple(byte in group for group in ordered)
        classes.append(numbers.setdefault(kind, len(numbers)))
    return classes, ascii_classes, len(numbers)
