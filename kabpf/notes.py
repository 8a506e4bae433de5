"""What one command leaves for the next in /run/kabpf, beside what is in the kernel.

`former.json` has, after every policy was lifted, which values open sockets still have from them.
`applied.json` says what the last reconcile was made of, so that status need not do it again. Both
may be missing or damaged: then the values count as the applications' own, and status looks itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kabpf import layout
from kabpf.plan import Actual, Changes, Entry

FORMER, APPLIED = "former.json", "applied.json"


@dataclass(frozen=True)
class Applied:
    """What the last reconcile was made of."""

    stamp: str  # of the policy files
    asks: bool  # some new cgroups need user space
    sources: dict[str, str]  # file and line by the policy's name
    refused: str = ""  # what the kernel refused


def keep_former(actual: Actual, run: Path) -> None:
    """Keep which policies the sockets of which cgroups have values from."""
    cgroups = {
        id: was
        for id, entry in actual.cgroups.items()
        for was in [[one for one in (entry.policy_id, *entry.was) if one in actual.records]]
        if was
    }
    used = {id for was in cgroups.values() for id in was}
    # Destinations are not kept: a former policy is measured by its own options.
    policies = {
        id: layout.policy(replace(actual.records[id], digest=0)).hex()
        for id in used
        if actual.records[id].acts
    }
    _write(run / FORMER, {"layout": layout.LAYOUT, "policies": policies, "cgroups": cgroups})


def former(run: Path) -> Changes:
    """The records and entries that were kept, for cgroups that have no policy yet."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads((run / FORMER).read_text())
        if kept["layout"] == layout.LAYOUT:
            records = {
                int(id): layout.read_policy(bytes.fromhex(raw))
                for id, raw in kept["policies"].items()
            }
            entries = {
                int(id): Entry(0, 0, False, tuple(one for one in was if one in records))
                for id, was in kept["cgroups"].items()
            }
            return Changes(records=records, cgroups=entries)
    return Changes()


def forget_former(run: Path) -> None:
    """The kernel has it again."""
    (run / FORMER).unlink(missing_ok=True)


def keep_applied(applied: Applied, run: Path) -> None:
    """Keep what was applied; only where it differs, to spare a write."""
    if read_applied(run) != applied:
        _write(run / APPLIED, vars(applied))


def read_applied(run: Path) -> Applied | None:
    """What was applied, or None where that is not known."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Applied(**json.loads((run / APPLIED).read_text()))
    return None


def _write(file: Path, content: dict[str, Any]) -> None:
    # The file is small and of use for one boot: it need not reach a disk, only be whole.
    fresh = file.with_name(f".{file.name}")
    with contextlib.suppress(OSError):
        fresh.write_text(json.dumps(content))
        os.replace(fresh, file)
