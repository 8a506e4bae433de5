"""Desired state, and the actual one that it is compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from kabpf.plan.births import UNKNOWN, Birth, NameAutomaton, Step
from kabpf.plan.names import Piece
from kabpf.plan.state import BirthEntry, CgroupEntry, Needs, PolicyRecord, Resolved, needs_of
from kabpf.policy.model import Policy


@dataclass(frozen=True)
class Plan:
    """Desired state."""

    policies: tuple[Policy, ...] = ()
    births: dict[Step, Birth] = field(default_factory=dict)
    cgroups: dict[int, Resolved] = field(default_factory=dict)
    births_max: int = 0  # that the kernel has room for
    # Cgroups that could not be reached, and may be there, or whose containers are not known: their
    # entries stay as they are.
    unreached: frozenset[int] = frozenset()
    globs: NameAutomaton = field(default_factory=lambda: NameAutomaton(()))
    globs_digest: int = 0  # 0: the data plane sees no births
    asked: tuple[Policy, ...] = ()  # that containers ask for and have
    # Of the data plane without BTF: cgroups that need an attachment of their own, and whether
    # another one is above or below.
    attachments: dict[int, bool] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether some new cgroups have to wait for user space: containers that selectors name, or
        others because there are more globs or rules than the kernel has room for."""
        if any(policy.is_of_containers for policy in self.policies):
            return True
        unknown = (birth.state == UNKNOWN for birth in self.births.values())
        return bool(self.globs.left_out) or any(unknown)

    @property
    def made(self) -> tuple[Policy, ...]:
        """The policies that cgroups may have: those of the files, and those of containers."""
        return (*(each for each in self.policies if each.wishes is None), *self.asked)

    @functools.cached_property
    def needs(self) -> Needs:
        """What the policies need."""
        return needs_of(self.policies)


@dataclass(frozen=True)
class Actual:
    """What is in the kernel."""

    records: dict[int, PolicyRecord] = field(default_factory=dict)
    births: dict[tuple[int, int], BirthEntry] = field(default_factory=dict)  # by state and number
    cgroups: dict[int, CgroupEntry] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    attachments: dict[int, bool | None] = field(default_factory=dict)  # None: one half of it
    names: dict[Piece, int] = field(default_factory=dict)
    generations: dict[int, int] = field(default_factory=dict)  # the digests by number

    def leave_out_unreadable(self) -> None:
        """Leave out the cgroups whose policies have no record: both went while they were read."""
        unreadable = [
            id
            for id, entry in self.cgroups.items()
            if not {entry.policy_id, *entry.was} - {0} <= self.records.keys()
        ]
        for id in unreadable:
            del self.cgroups[id]
