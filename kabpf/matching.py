"""Which selectors name a cgroup: an automaton over the names of its path, and their precedence.

User space walks the automaton to resolve the cgroups that exist. The kernel walks a table of it
(`Automaton.table`) at every mkdir, so that a cgroup that does not exist yet is resolved as well,
and a parent that is removed and made again changes nothing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kabpf.policy import GLOB, Policy, Selector

# KABPF_STATE_UNKNOWN and KABPF_STATE_ANYWHERE in kabpf.h.
UNKNOWN = 0
ANYWHERE = 1

ANY_DEPTH = "**"


class Kind(IntEnum):
    """What a selector is, the weakest first."""

    GLOB = 0
    SOCKET = 1  # foo.socket, because foo.service is selected
    UNIT = 2
    PATH = 3


class Rank(NamedTuple):
    """Of two selectors that name one cgroup the greater wins."""

    kind: Kind
    literal_prefix: int
    order: int  # of reading


class Birth(NamedTuple):
    """What becomes of a child: its state, its policy, and whether a glob might say otherwise."""

    state: int
    policy: Policy | None  # None: the parent's
    ask: bool


@dataclass(frozen=True)
class _Pattern:
    names: tuple[str, ...]
    rank: Rank
    policy: Policy


_Position = tuple[int, int]  # a pattern, and how many of its names have matched
_Positions = frozenset[_Position]


class _Moves(NamedTuple):
    """Where positions go from: by a literal name, by any name, by a glob on the name."""

    literal: dict[str, list[_Position]]
    always: list[_Position]
    globs: list[tuple[re.Pattern[str], _Position]]


class Automaton:
    """The selectors of `policies`, which come in the order they were read."""

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        self._patterns = [
            _Pattern(names, Rank(kind, prefix, order), policy)
            for order, policy in enumerate(policies)
            for selector in policy.selectors
            for kind, prefix, names in _patterns(selector)
        ]
        starts = self._closed((index, 0) for index in range(len(self._patterns)))
        # Selectors that apply anywhere are possible in every state; states leave them out.
        self._anywhere = frozenset(
            position for position in starts if self._patterns[position[0]].names[:1] == (ANY_DEPTH,)
        )
        self._positions: dict[int, _Positions] = {ANYWHERE: frozenset()}
        self._moves: dict[int, _Moves] = {}
        self._anywhere_moves = self._moves_of(self._anywhere)
        self._steps: dict[tuple[int, str | None], Birth] = {}
        self.root = self._arrive(starts)

    def step(self, state: int, name: str | None) -> Birth:
        """From a parent in `state` to its child `name`; None stands for a name that no selector
        spells out, assuming that it matches no glob within a name."""
        known = self._steps.get((state, name))
        if known is None:
            known = self._steps[state, name] = self._step(state, name)
        return known

    def table(self, limit: int) -> dict[tuple[int, str], Birth]:
        """The automaton as kabpf_births, breadth first, with at most `limit` entries.

        The kernel looks for (state, name), then (ANYWHERE, name), then (state, ""). A state that
        the limit leaves out is UNKNOWN, so that user space is asked.
        """
        entries: dict[tuple[int, str], Birth] = {}
        included = set()
        waiting = [ANYWHERE, self.root.state]
        for state in waiting:
            if state in included:
                continue
            rows = dict(itertools.islice(self._rows(state), limit - len(entries) + 1))
            if len(entries) + len(rows) > limit:
                break
            included.add(state)
            entries |= rows
            waiting += [birth.state for birth in rows.values()]
        return {
            step: birth if birth.state in included else birth._replace(state=UNKNOWN)
            for step, birth in entries.items()
        }

    def _rows(self, state: int) -> Iterator[tuple[tuple[int, str], Birth]]:
        moves = self._moves_from(state)
        names = set(moves.literal)
        if moves.always or moves.globs:
            names |= set(self._anywhere_moves.literal)
        yield (state, ""), self.step(state, None)
        for name in sorted(names):
            birth = self.step(state, name)
            is_default = name in self._anywhere_moves.literal and state != ANYWHERE
            if not (is_default and birth == self.step(ANYWHERE, name)):
                yield (state, name), birth
        if state == ANYWHERE:
            for name in sorted(self._anywhere_moves.literal):
                yield (state, name), self.step(state, name)

    def _step(self, state: int, name: str | None) -> Birth:
        reached: list[_Position] = []
        ask = False
        for moves in (self._moves_from(state), self._anywhere_moves):
            reached += moves.always
            if name is None:
                ask = ask or bool(moves.globs)
            else:
                reached += moves.literal.get(name, ())
                reached += [position for glob, position in moves.globs if glob.match(name)]
        return self._arrive(self._closed(reached))._replace(ask=ask)

    def _arrive(self, positions: _Positions) -> Birth:
        done = [
            self._patterns[index]
            for index, matched in positions
            if matched == len(self._patterns[index].names)
        ]
        policy = max(done, key=lambda pattern: pattern.rank).policy if done else None
        pending = frozenset(
            (index, matched)
            for index, matched in positions - self._anywhere
            if matched < len(self._patterns[index].names)
        )
        return Birth(self._number(pending), policy, False)

    def _number(self, positions: _Positions) -> int:
        """A number that depends on what can still match and on nothing else, so that a reload
        leaves the states alone that it does not concern."""
        if not positions:
            return ANYWHERE
        words = sorted(f"{'/'.join(self._patterns[i].names)}\0{n}" for i, n in positions)
        digest = hashlib.blake2b("\1".join(words).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") | 2
        self._positions[number] = positions
        return number

    def _closed(self, positions: Iterator[_Position] | list[_Position]) -> _Positions:
        """With the positions reached because ** may stand for no name at all."""
        closed = set()
        for index, matched in positions:
            names = self._patterns[index].names
            closed.add((index, matched))
            while matched < len(names) and names[matched] == ANY_DEPTH:
                matched += 1
                closed.add((index, matched))
        return frozenset(closed)

    def _moves_from(self, state: int) -> _Moves:
        moves = self._moves.get(state)
        if moves is None:
            moves = self._moves[state] = self._moves_of(self._positions[state])
        return moves

    def _moves_of(self, positions: _Positions) -> _Moves:
        moves = _Moves({}, [], [])
        for index, matched in positions:
            name = self._patterns[index].names[matched : matched + 1]
            if name == (ANY_DEPTH,):
                if (index, matched) not in self._anywhere:  # there it stays anyway
                    moves.always.append((index, matched))
            elif name == ("*",):
                moves.always.append((index, matched + 1))
            elif name and GLOB.search(name[0]):
                glob = re.compile(fnmatch.translate(name[0]))
                moves.globs.append((glob, (index, matched + 1)))
            elif name:
                moves.literal.setdefault(name[0], []).append((index, matched + 1))
        return moves


def _patterns(selector: Selector) -> Iterator[tuple[Kind, int, tuple[str, ...]]]:
    """A selector's kind, literal prefix and names; a service brings its socket unit, in whose
    cgroup systemd creates the listener."""
    text = selector.text
    found = GLOB.search(text)
    prefix = found.start() if found else len(text)
    if selector.kind == "cgroup":
        names = tuple(text.split("/")[1:]) if text != "/" else ()
        if names[-1:] == (ANY_DEPTH,):
            names += ("*",)  # everything inside, not the directory itself
        yield Kind.GLOB if found else Kind.PATH, prefix, names
        return
    yield Kind.GLOB if found else Kind.UNIT, prefix, (ANY_DEPTH, text)
    if text.endswith(".service"):
        socket = text.removesuffix("service") + "socket"
        yield Kind.GLOB if found else Kind.SOCKET, prefix, (ANY_DEPTH, socket)
