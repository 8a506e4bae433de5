"""What systemd and the log are told: what is active, and what went wrong last."""

from __future__ import annotations

from collections import Counter

from kabpf import output
from kabpf.errors import BpfError, KabpfError, NotUpdatedError, PolicyError
from kabpf.kernel import dataplane
from kabpf.kernel.dataplane import Dataplane
from kabpf.policy.files import Snapshot
from kabpf.policy.model import is_asked
from kabpf.runtime.last_good import time_text

WAITING = "policy files have changed; try: systemctl reload kabpf"
_STAYS = "the last good policy stays active"


def text(loaded: Dataplane | None, good: Snapshot | None, problem: KabpfError | None) -> str:
    """One line for STATUS= (sd_notify(3)) about the data plane that is open, the last good policies
    and the last problem, each of which there may be."""
    counts = _counts(loaded, good)
    if problem is None:
        return counts
    # A line, because sd_notify() takes the next one for another assignment.
    lines = str(problem).split("\n")
    stays = f", and {_STAYS}" if _stays(problem) else ""
    text = f"{counts}{_since(problem)}; errors: {len(lines)}{stays}: {'; '.join(lines)}"
    return output.shown(text)


def of_problem(problem: KabpfError) -> str:
    """What the log is told of a problem; of a step that the kernel refused kabpfctl doctor knows
    more."""
    advice = "; try: kabpfctl doctor" if isinstance(problem, BpfError) else ""
    if _stays(problem):
        return f"{_STAYS}: {problem}{advice}"
    if isinstance(problem, PolicyError) and not dataplane.PINS.exists():
        return f"no policy is active until the policy files are right: {problem}"
    return f"{problem}{advice}"


def _since(problem: KabpfError) -> str:
    if isinstance(problem, PolicyError) and problem.since is not None:
        return f"; policy files wrong since {time_text(problem.since)}"
    return ""


def _counts(loaded: Dataplane | None, good: Snapshot | None) -> str:
    if not dataplane.PINS.exists():
        return "no policy is active"
    if loaded is None:
        return "the active policies are of another version of kabpf"
    usage = loaded.usage()
    # Beside wrong files at the start only those are known that cgroups have.
    known = len(usage.keys() - {0}) if good is None else _known(loaded, good, usage)
    covered = usage.total() - usage[0]
    return output.active_text(known, covered, usage.total())


def _known(loaded: Dataplane, good: Snapshot, usage: Counter[int]) -> int:
    """How many policies the files have, and containers that may ask for their own."""
    own = [each for each in good.policies if each.wishes is None]
    if len(own) == len(good.policies):
        return len(own)
    return len(own) + sum(is_asked(loaded.policy_name(id) or "") for id in usage)


def _stays(problem: KabpfError) -> bool:
    """Whether the problem kept what was active before it."""
    return dataplane.PINS.exists() and not isinstance(problem, NotUpdatedError)
