"""kabpfctl verify: whether everything that the policy files say is active, for scripts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from kabpf import output
from kabpf.commands import status
from kabpf.errors import RefusedError


def verify(arguments: argparse.Namespace) -> int:
    """Exit status 0 where everything that the files say is active and nothing is failing; else 1,
    and a line for each reason."""
    result: dict[str, Any] = {}
    try:
        result, _ = status.look()
        reasons = list(_reasons(result))
    except RefusedError as error:  # what is pinned is not attached, or not all there
        reasons = [str(error)]
    text = "\n".join(map(output.shown, reasons)) if reasons else _active(result)
    output.answer(arguments, {"verified": not reasons, "reasons": reasons}, text)
    return 1 if reasons else 0


def _active(result: dict[str, Any]) -> str:
    if not result["loaded"]:
        return "there are no policies; kabpf is not loaded"
    return output.active_text(**result["active"])


def _reasons(result: dict[str, Any]) -> Iterator[str]:
    files = result["policy_files"]
    yield from files["errors"]
    if result["refused"]:
        yield result["refused"]
    elif not result["loaded"] and files["policies"]:
        yield "kabpf is not loaded; try: kabpfctl apply"
    elif not files["applied"] and not files["errors"]:
        yield "the policy files changed since the last apply; try: kabpfctl apply"
    if result["interrupted"]:
        yield "leftover pins of an interrupted command; try: kabpfctl apply"
    if unrecorded := result["not_recorded"]["cgroups"]:
        yield f"{output.count(unrecorded, 'new cgroup')} not recorded, because the table is full"
    if result["new_cgroups_wait"]:
        yield "new cgroups wait for kabpfd, which does not run; try: systemctl start kabpf"
