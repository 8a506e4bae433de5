"""What a command takes, without what the process that starts it has in memory.

The kernel counts in ru_maxrss what a process had before its exec, which after vfork(2) is its
parent's memory; so that a small process starts the command."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

_PROGRAM = """\
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss >> 10]))
"""


class Measured(NamedTuple):
    status: int
    seconds: float  # of processor
    megabytes: int  # resident, at most


def measured(*command: object, **how: Any) -> Measured:
    """Run a command to its end, without its output; `how` is for subprocess.run."""
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, command)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, **how)
    return Measured(*json.loads(done.stdout))
