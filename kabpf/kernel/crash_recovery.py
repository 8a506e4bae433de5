"""The directories of pins, and what a process that was killed has left in them.

All state is in the pins below one directory of a BPF file system. The directory appears complete,
and so it disappears; a process that dies meanwhile leaves the old state or the new, and what the
next one has to do can be seen:

    kabpf        active
    kabpf-new    being built; active from the moment in which the link works with its maps
    kabpf-old    on its way out
"""

from __future__ import annotations

import os
from pathlib import Path

from kabpf.errors import RefusedError
from kabpf.faults import fault_point
from kabpf.kernel import dataplane, syscalls

WRITABLE = "the BPF file system must be writable"


def complete(pins: Path) -> None:
    """Complete what a killed process had begun. The caller holds the lock."""
    staging = staging_of(pins)
    if staging.exists() and is_active(staging):
        publish(pins)
    for leftover in (staging, unloading_of(pins)):
        unpin(leftover)


def is_interrupted(pins: Path) -> bool:
    """Whether a process was killed while it loaded or unloaded; its pins may be active."""
    return staging_of(pins).exists() or unloading_of(pins).exists()


def directories(pins: Path) -> tuple[Path, ...]:
    """Where pins may be: active, being built, and on their way out."""
    return pins, staging_of(pins), unloading_of(pins)


def staging_of(pins: Path) -> Path:
    """Where a data plane is built that is to be pinned at `pins`."""
    return pins.with_name(f"{pins.name}-new")


def unloading_of(pins: Path) -> Path:
    """Where a data plane goes that was pinned at `pins`, on its way out."""
    return pins.with_name(f"{pins.name}-old")


def unpin(directory: Path) -> None:
    """Remove pins and their directory, if it is there. Raises RefusedError."""
    if not directory.exists():
        return
    try:
        for path in directory.iterdir():
            fault_point("unpin")
            path.unlink()
        path = directory
        fault_point("remove the pins' directory")
        path.rmdir()
    except OSError as error:
        hint = "files or mounts of others are in the way"
        raise RefusedError(f"remove {path}", error.errno or 0, hint) from None


def rename(pins: Path, other: Path) -> None:
    """Rename a directory of pins. Raises RefusedError."""
    try:
        os.rename(pins, other)
    except OSError as error:
        raise RefusedError(f"rename {pins}", error.errno or 0, WRITABLE) from None


def is_active(staging: Path) -> bool:
    """Whether the link has the program that is pinned beside it."""
    try:
        return dataplane.is_linked(staging)
    except RefusedError:
        return False


def publish(pins: Path) -> None:
    """Put what was built in the place of what is pinned, and remove that."""
    staging, unloaded = staging_of(pins), unloading_of(pins)
    if pins.exists():
        if syscalls.exchange(str(staging), str(pins)):
            unpin(staging)
            return
        unpin(unloaded)
        fault_point("rename the old pins")
        rename(pins, unloaded)
    fault_point("rename the new pins")
    rename(staging, pins)
    unpin(unloaded)
