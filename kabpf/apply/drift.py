"""How the policy files compare with what is active."""

from __future__ import annotations

from typing import NamedTuple

from kabpf.errors import PolicyError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Dataplane
from kabpf.policy import files
from kabpf.policy.model import ASKED, Policy, is_asked
from kabpf.runtime import notes
from kabpf.runtime.locks import RUN, locked_if_free

WAIT_S = 2  # for a command that changes policies


class Comparison(NamedTuple):
    """What the policy files say, and whether it is active."""

    sources: dict[str, str]  # file and line by the policy's name
    applied: bool
    asks: bool = False  # some new cgroups need user space
    errors: tuple[str, ...] = ()  # in the policy files
    wrong_since: float | None = None  # in seconds since the epoch, where that is known
    refused: str = ""  # what the kernel refused at the last reconcile

    def source(self, policy: str | None) -> str | None:
        """File and line of a policy; of one that a container asks for, those that allow it."""
        key = ASKED if policy and is_asked(policy) else policy
        return self.sources.get(key or "")

    @property
    def policies(self) -> int:
        """How many policies the files have."""
        return len(self.sources.keys() - {ASKED})


def compare(tree: CgroupTree, loaded: Dataplane | None) -> Comparison:
    """Compare the two: by the note of the last reconcile, or by resolving the files where they have
    changed since. A command that is at work is waited for, as it may be half-way."""
    comparison = _compare(tree, loaded)
    if comparison.applied or comparison.errors:
        return comparison
    with locked_if_free(WAIT_S):
        return _compare(tree, loaded)


def _compare(tree: CgroupTree, loaded: Dataplane | None) -> Comparison:
    applied = notes.read_applied(RUN)
    if loaded and applied and applied.stamp == files.stamp(files.SYSTEM):
        return Comparison(
            applied.sources, not applied.refused, applied.asks, refused=applied.refused
        )
    from kabpf.apply import reconcile  # here, because most commands find the files applied

    policies, problem = _load_or_problem(loaded)
    errors = problem.findings if problem else ()
    resolution = reconcile.preview(policies, tree, loaded)
    sources = {each.name: str(each.source) for each in policies}
    return Comparison(
        applied.sources if errors and applied else sources,
        not errors and not (resolution.changes if loaded else policies),
        resolution.plan.asks,
        errors,
        wrong_since=problem.since if problem else None,
    )


def _load_or_problem(
    loaded: Dataplane | None,
) -> tuple[tuple[Policy, ...], PolicyError | None]:
    try:
        policies = files.load(files.SYSTEM)
        if loaded:
            loaded.require_supported(policies)
        return policies, None
    except PolicyError as error:
        return (), error
