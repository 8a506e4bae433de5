"""Which selectors name a cgroup: an automaton over the names of its path, and their precedence.

User space walks the automaton to resolve the cgroups that exist. The kernel walks a table of it
(`Automaton.table`) at every mkdir, so that a cgroup that does not exist yet is resolved as well,
and a parent that is removed and made again changes nothing. Which globs within a name match is
told there by an automaton over the name's bytes (globs), as the number of a set.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from kabpf.digests import blake2b
from kabpf.plan import globs
from kabpf.plan.births import ANYWHERE, GENERATIONS, UNKNOWN, Birth, Matched, NameAutomaton, Step
from kabpf.plan.patterns import (
    ANY_DEPTH,
    Kind,
    Pattern,
    Rank,
    compiled,
    patterns_of,
    rank_of,
    strength,
)
from kabpf.policy.model import GLOB, Policy

if TYPE_CHECKING:
    from kabpf.plan.containers import Naming

_Position = tuple[int, int]  # a pattern, and how many of its names have matched
_Positions = frozenset[_Position]


class _Globs:
    """Globs within a name, by the literal text at their ends, so that few are tried on a name."""

    def __init__(self) -> None:
        self.by_text: dict[str, list[_Position]] = {}
        self._lengths: set[tuple[int, int]] = set()  # of the ends of those with one * and no more
        self._by_ends: dict[tuple[str, str], list[str]] = {}  # the others
        self._other_lengths: set[tuple[int, int]] = set()

    def add(self, glob: str, position: _Position) -> None:
        if positions := self.by_text.get(glob):
            positions.append(position)
            return
        self.by_text[glob] = [position]
        start, _, end = glob.partition("*")
        if GLOB.search(start) or GLOB.search(end):
            start = GLOB.split(glob, maxsplit=1)[0]
            end = re.split(r"[*?\[\]]", glob)[-1]
            self._by_ends.setdefault((start, end), []).append(glob)
            self._other_lengths.add((len(start), len(end)))
        else:
            self._lengths.add((len(start), len(end)))

    def matching(self, name: str) -> list[_Position]:
        positions: list[_Position] = []
        for start, end in self._lengths:
            if start + end > len(name):
                continue
            before, after = name[:start], name[len(name) - end :]
            found = self.by_text.get(f"{before}*{after}")
            # A name may have a * itself, and look like one of the others.
            if found and not GLOB.search(before) and not GLOB.search(after):
                positions += found
        for start, end in self._other_lengths:
            ends = name[:start], name[len(name) - end :]
            for glob in self._by_ends.get(ends, ()):
                if compiled(glob).match(name):
                    positions += self.by_text[glob]
        return positions


class _Arrival(NamedTuple):
    """Where a move leads: a state, and the strongest pattern that is complete there."""

    state: int
    best: Pattern | None
    asks: bool = False  # only user space can tell what else names it


_NOWHERE = _Arrival(ANYWHERE, None)


class _Moves(NamedTuple):
    """Where positions go from: by any name, which selectors that apply anywhere have a part in; by
    a literal name; by a glob on the name."""

    always: _Arrival
    literal: dict[str, list[_Position]]
    globs: _Globs


class Automaton:
    """The selectors of `policies`, which come in the order they were read.

    Policies that end with a cgroup are not among them: they hold for that one by its id, and what
    is below inherits them without a rule. One of `kabpfctl run` beats any selector that names the
    cgroup; one of a user is beaten by any. Nor are selectors of containers and pods: as long as
    there are any, user space is asked about each cgroup that may be a container's.
    """

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        ending = [(policy.until.id, policy) for policy in policies if policy.until]
        self.bound = {id: policy for id, policy in ending if policy.owner is None}
        self.owned = {id: policy for id, policy in ending if policy.owner is not None}
        self._patterns = [
            Pattern(names, Rank(kind, prefix, order), policy)
            for order, policy in enumerate(policies)
            if policy.until is None
            for selector in policy.selectors
            for kind, prefix, names in patterns_of(selector)
        ]
        self.containers = self._containers(policies)
        # Selectors that apply anywhere, by how many ** they begin with, are possible in every
        # state; states leave them out.
        self._leading = [
            sum(1 for _ in itertools.takewhile(ANY_DEPTH.__eq__, each.names))
            for each in self._patterns
        ]
        elsewhere = ((index, 0) for index, leading in enumerate(self._leading) if not leading)
        starts = self._closed(elsewhere)
        self._positions: dict[int, _Positions] = {ANYWHERE: frozenset()}
        self._numbers: dict[_Positions, int] = {frozenset(): ANYWHERE}
        self._moves: dict[int, _Moves] = {}
        self._others: dict[int, Birth] = {}  # of the names that nothing spells out, by state
        self._tables: dict[int, dict[Step, Birth]] = {}
        self._anywhere_moves = self._moves_of(
            (index, leading) for index, leading in enumerate(self._leading) if leading
        )
        self._anywhere_literals = {
            name: self._by_name(self._anywhere_moves, name) for name in self._anywhere_moves.literal
        }
        self.root = _birth(self._arrive(starts), False)

    def _containers(self, policies: tuple[Policy, ...]) -> Naming | None:
        """The selectors of containers and pods, if there are any; then the kernel asks, too."""
        if not any(policy.is_of_containers for policy in policies):
            return None
        from kabpf.plan import containers  # here, because most machines do without

        rank = Rank(Kind.GLOB, 0, 0)
        self._patterns += [Pattern((ANY_DEPTH, glob), rank, None) for glob in containers.CGROUPS]
        return containers.Naming(policies)

    @functools.cached_property
    def globs(self) -> NameAutomaton:
        """The globs within names as the kernel has them; without those of `run` and of users."""
        return globs.compiled_names(
            frozenset(name for each in self._with_globs for name in each.names if _is_glob(name))
        )

    @functools.cached_property
    def globs_digest(self) -> int:
        """A digest of the selectors with a glob within a name, in the order they were read. As long
        as it stays, so do the numbers of sets, and what they mean for a state. It is none of the
        numbers below 2."""
        ranked = [
            (each.names, each.rank.kind, each.rank.literal_prefix) for each in self._with_globs
        ]
        digest = blake2b(repr(ranked).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") | 2

    @functools.cached_property
    def _with_globs(self) -> list[Pattern]:
        """The patterns that have a glob within a name."""
        return [each for each in self._patterns if any(map(_is_glob, each.names))]

    def step(self, state: int, name: str | None) -> Birth:
        """From a parent in `state` to its child `name`; None stands for a name that no selector
        spells out, assuming that it matches no glob within a name."""
        moves = self._moves_from(state)
        if name is None:
            return _birth(moves.always, self._is_any_possible(moves, self._left_out))
        anywhere = self._anywhere_literals.get(name) or self._by_name(self._anywhere_moves, name)
        here = self._by_name(moves, name)
        if anywhere is _NOWHERE and here is _NOWHERE:  # as that of most names is
            if state not in self._others:
                self._others[state] = _birth(moves.always, False)
            return self._others[state]
        return _birth(self._both(moves.always, self._both(anywhere, here)), False)

    def table(self, limit: int) -> dict[Step, Birth]:
        """The automaton as kabpf_births, breadth first, with at most `limit` entries.

        The kernel takes (state, name). Where there is none it takes (ANYWHERE, name) and (state,
        "") together, as `_merged` does; and where the name is spelled out for neither, the same
        with the number of its set of globs. A state that the limit leaves out is UNKNOWN, so that
        user space is asked; so is one that several globs lead to together of which only user space
        can tell.
        """
        if limit not in self._tables:
            self._tables[limit] = self._new_table(limit)
        return self._tables[limit]

    def _new_table(self, limit: int) -> dict[Step, Birth]:
        literals = sorted(self._anywhere_literals)
        anywhere = _Anywhere[str]({name: self.step(ANYWHERE, name) for name in literals})
        in_play = self._sets_with(self._anywhere_moves.globs)
        anywhere_sets = _Anywhere[int](
            {number: self._by_set(ANYWHERE, number) for number in in_play}
        )
        entries: dict[Step, Birth] = {}
        included = set()
        waiting = [ANYWHERE, self.root.state]
        for state in waiting:
            if state in included:
                continue
            found = itertools.chain(
                self._rows(state, anywhere), self._rows_of_sets(state, anywhere_sets)
            )
            rows = dict(itertools.islice(found, limit - len(entries) + 1))
            if len(entries) + len(rows) > limit:
                break
            included.add(state)
            entries |= rows
            waiting += [birth.state for birth in rows.values()]
            waiting += self._globbed(state)
        return {
            step: birth if birth.state in included else birth._replace(state=UNKNOWN)
            for step, birth in entries.items()
        }

    def _rows(self, state: int, anywhere: _Anywhere[str]) -> Iterator[tuple[Step, Birth]]:
        """The rows of a state, without those that the kernel finds by merging."""
        rest = self.step(state, None)
        yield (state, ""), rest
        if state == ANYWHERE:
            yield from (((state, name), birth) for name, birth in anywhere.births.items())
            return
        moves = self._moves_from(state)
        names = moves.literal.keys() | anywhere.names(rest, all=bool(moves.globs.by_text))
        for name in sorted(names):
            birth = self.step(state, name)
            if name not in anywhere.births or birth != _merged(anywhere.births[name], rest):
                yield (state, name), birth

    def _rows_of_sets(self, state: int, anywhere: _Anywhere[int]) -> Iterator[tuple[Step, Birth]]:
        """The same for the sets of globs."""
        if state == ANYWHERE:
            yield from (((state, number), birth) for number, birth in anywhere.births.items())
            return
        rest = self.step(state, None)
        numbers = {
            *self._sets_with(self._moves_from(state).globs),
            *anywhere.names(rest, all=False),
        }
        for number in sorted(numbers):
            birth, merged = self._by_set(state, number), rest
            if number in anywhere.births:
                merged = _merged(anywhere.births[number], rest)
                merged = merged._replace(ask=merged.ask or rest.ask)
            if birth != merged:
                yield (state, number), birth

    def _sets_with(self, some: _Globs) -> list[int]:
        """The numbers of the sets that any of these globs is in, or may be in."""
        return sorted({number for glob in some.by_text for number in self._sets.get(glob, ())})

    @functools.cached_property
    def _sets(self) -> dict[str, list[int]]:
        """The numbers of the sets that a glob is in, or may be in."""
        found: dict[str, list[int]] = {}
        for number, matched in enumerate(self.globs.sets):
            for glob in (*matched.globs, *matched.doubted):
                found.setdefault(glob, []).append(number)
        return found

    def _by_set(self, state: int, number: int) -> Birth:
        """From a parent in `state` to a child whose name no selector spells out that matters here,
        and matches a set of globs."""
        moves, matched = self._moves_from(state), self.globs.sets[number]
        anywhere = self._by_globs(self._anywhere_moves, matched)
        arrival = self._both(moves.always, self._both(anywhere, self._by_globs(moves, matched)))
        in_doubt = (*matched.doubted, *self._left_out)
        return _birth(arrival, self._is_any_possible(moves, in_doubt))

    def _by_globs(self, moves: _Moves, matched: Matched) -> _Arrival:
        texts = moves.globs.by_text
        reached = [each for glob in matched.globs for each in texts.get(glob, ())]
        return self._arrive(self._closed(reached)) if reached else _NOWHERE

    @functools.cached_property
    def _left_out(self) -> frozenset[str]:
        return frozenset(self.globs.left_out)

    def _is_any_possible(self, moves: _Moves, some: Iterable[str]) -> bool:
        """Whether a selector goes on from here by one of these globs."""
        here, anywhere = moves.globs.by_text, self._anywhere_moves.globs.by_text
        return any(glob in here or glob in anywhere for glob in some)

    def _globbed(self, state: int) -> Iterator[int]:
        """The states that user space may find a child in, by one glob of which only it can tell."""
        moves = self._moves_from(state)
        texts = (self._anywhere_moves if state == ANYWHERE else moves).globs.by_text
        for glob, positions in texts.items():
            if glob in self._left_out or globs.is_doubtful(glob):
                yield self._both(moves.always, self._arrive(self._closed(positions))).state

    def _by_name(self, moves: _Moves, name: str) -> _Arrival:
        """Where a name leads that a selector spells out or has a glob for."""
        reached = [*moves.literal.get(name, ()), *moves.globs.matching(name)]
        return self._arrive(self._closed(reached)) if reached else _NOWHERE

    def _arrive(self, positions: _Positions) -> _Arrival:
        done = [
            self._patterns[index]
            for index, matched in positions
            if matched == len(self._patterns[index].names)
        ]
        pending = frozenset(
            (index, matched)
            for index, matched in positions
            if matched < len(self._patterns[index].names) and not self._is_anywhere(index, matched)
        )
        selecting = [each for each in done if each.policy]
        best = max(selecting, key=rank_of, default=None)
        return _Arrival(self._number(pending), best, len(selecting) < len(done))

    def _both(self, one: _Arrival, other: _Arrival) -> _Arrival:
        if _NOWHERE in (one, other):
            return other if one == _NOWHERE else one
        if ANYWHERE in (one.state, other.state):
            state = max(one.state, other.state)
        else:
            state = self._number(self._positions[one.state] | self._positions[other.state])
        best = one.best or other.best
        if one.best and other.best:
            best = max(one.best, other.best, key=rank_of)
        return _Arrival(state, best, one.asks or other.asks)

    def _number(self, positions: _Positions) -> int:
        """A number that depends on what can still match and on nothing else, so that a reload
        leaves the states alone that it does not concern."""
        known = self._numbers.get(positions)
        if known is not None:
            return known
        words = sorted(f"{'/'.join(self._patterns[i].names)}\0{n}" for i, n in positions)
        digest = blake2b("\1".join(words).encode(), digest_size=8).digest()
        number = (int.from_bytes(digest, "little") | 2 * ANYWHERE) & -GENERATIONS
        self._positions[number] = positions
        self._numbers[positions] = number
        return number

    def _closed(self, positions: Iterable[_Position]) -> _Positions:
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
            moves = self._moves_of(self._positions[state])
            always = self._both(moves.always, self._anywhere_moves.always)
            moves = self._moves[state] = moves._replace(always=always)
        return moves

    def _is_anywhere(self, index: int, matched: int) -> bool:
        return 0 < self._leading[index] >= matched

    def _moves_of(self, positions: Iterable[_Position]) -> _Moves:
        always: list[_Position] = []
        literal: dict[str, list[_Position]] = {}
        within = _Globs()
        for index, matched in positions:
            names = self._patterns[index].names
            name = names[matched] if matched < len(names) else ""
            if name == ANY_DEPTH:
                if not self._is_anywhere(index, matched):  # there it stays anyway
                    always.append((index, matched))
            elif name == "*":
                always.append((index, matched + 1))
            elif GLOB.search(name):
                within.add(name, (index, matched + 1))
            elif name:
                literal.setdefault(name, []).append((index, matched + 1))
        return _Moves(self._arrive(self._closed(always)), literal, within)


_Name = TypeVar("_Name")


class _Anywhere(Generic[_Name]):
    """What becomes of children whose names selectors that apply anywhere spell out, or are in sets
    that their globs are in."""

    def __init__(self, births: dict[_Name, Birth]) -> None:
        self.births = births
        self._by_strength: dict[int, set[_Name]] = {}
        self._leading: set[_Name] = set()
        for name, birth in births.items():
            self._by_strength.setdefault(birth.strength, set()).add(name)
            if birth.state != ANYWHERE:
                self._leading.add(name)

    def names(self, rest: Birth, *, all: bool) -> set[_Name]:
        """Those that merging with `rest` may not do justice to."""
        if all:
            return set(self.births)
        names = set(self._by_strength.get(rest.strength, ())) if rest.strength else set()
        return names | self._leading if rest.state != ANYWHERE else names


def _merged(anywhere: Birth, rest: Birth) -> Birth:
    """What the kernel makes of a birth by a name anywhere and one by any other name here."""
    stronger = rest if rest.strength > anywhere.strength else anywhere
    state = rest.state if anywhere.state == ANYWHERE else anywhere.state
    return Birth(state, stronger.policy, anywhere.ask, stronger.strength)


def _is_glob(name: str) -> bool:
    """Whether it is a glob within a name; * and ** are whole ones."""
    return name not in ("*", ANY_DEPTH) and GLOB.search(name) is not None


def _birth(arrival: _Arrival, ask: bool) -> Birth:
    ask = ask or arrival.asks
    if arrival.best is None:
        return Birth(arrival.state, None, ask)
    return Birth(arrival.state, arrival.best.policy, ask, strength(arrival.best.rank))
