"""What the kernel does in a mkdir, for tests of the tables that it does it by."""

from __future__ import annotations

from typing import TypeVar

from kabpf.plan.automaton import ANYWHERE, Birth
from kabpf.plan.state import BirthEntry, Step

AnyBirth = TypeVar("AnyBirth", Birth, BirthEntry)


def find_birth(table: dict[Step, AnyBirth], state: int, name: str) -> AnyBirth | None:
    """The function of this name in births.h."""
    if (state, name) in table:
        return table[state, name]
    found, rest = table.get((ANYWHERE, name)), table.get((state, ""))
    if found is None or rest is None:
        return rest if found is None else found
    stronger = rest if rest.strength > found.strength else found
    onward = rest.state if found.state == ANYWHERE else found.state
    return stronger._replace(state=onward, ask=found.ask)
