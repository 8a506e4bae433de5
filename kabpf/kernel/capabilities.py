"""The capabilities(7) of processes."""

from __future__ import annotations

import os

from kabpf.errors import RefusedError
from kabpf.kernel import syscalls

# capability.h; root has them all unless a container or a unit took some away.
_BITS = {
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

# What loading, attaching and the maps take.
DATAPLANE = ("CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF")

# What entering the network namespaces of other processes needs, and finding them.
NAMESPACES = ("CAP_SYS_ADMIN", "CAP_SYS_PTRACE")


def missing(names: tuple[str, ...], process: int = 0) -> list[str]:
    """Those of these capabilities that a process, or this one, does not have in effect. Raises
    OSError where there is no such process."""
    effective = syscalls.effective_capabilities(process)
    return [name for name in names if not effective >> _BITS[name] & 1]


def require_root(command: str) -> None:
    """Raise RefusedError, which names the command, unless this process is root's."""
    if os.geteuid() != 0:
        raise RefusedError(f"{command}: must be run as root")
