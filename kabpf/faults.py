"""Points at which the tests have a process die."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter

_fault = os.environ.get("KABPF_FAULT")  # read once: 10,000 cgroups are as many steps
_faults: Counter[str] = Counter()


def fault_point(step: str) -> None:
    """Called before each step that changes what outlives a process. The tests have it die there:
    KABPF_FAULT is the step and how often it was come to, or "trace" to print them all."""
    if not _fault:
        return
    _faults[step] += 1
    point = f"{step}, {_faults[step]}"
    if _fault == "trace":
        print(f"fault point: {point}", file=sys.stderr)
    elif _fault == point:
        os.kill(os.getpid(), signal.SIGKILL)
