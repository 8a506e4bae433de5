"""What doctor knows of a step that bpf(2) refused: the likely reason, and the remedy."""

from __future__ import annotations

import errno

from kabpf.doctor.checks import CHECKS, Here, carried_out
from kabpf.doctor.findings import Grade
from kabpf.errors import BpfError, KabpfError

# The checks that look at what the kernel answers so for.
_CHECKS = {
    errno.EPERM: ("capabilities", "bpf(2)", "lockdown", "neighbours"),
    errno.EBUSY: ("neighbours", "pins"),
    errno.E2BIG: ("neighbours", "limits"),
    errno.ENOSPC: ("limits", "bpffs"),
}


def explained(problem: KabpfError) -> list[str]:
    """Lines to put below an error; none where it is no refusal, or nothing is found."""
    if not isinstance(problem, BpfError):
        return []
    here = Here()
    lines = []
    for name in _CHECKS.get(problem.error, ()):
        for finding in carried_out(CHECKS[name], here):
            if finding.grade in (Grade.WARNING, Grade.ERROR):
                lines.append(f"  {finding.text}")
                lines += [f"    fix: {finding.advice}"] if finding.advice else []
    return lines
