"""kabpfctl import: policies in place of libkeepalive and libdontdie; changes nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kabpf import live, output
from kabpf.migration.proposals import Found, look


def import_(arguments: argparse.Namespace) -> int:
    """Print what is found; 1 where something of it was not understood or not read."""
    with live.working("looking at units, scripts and processes"):
        found = look(Path("/"))
    if arguments.json:
        output.print_json(as_json(found))
    else:
        print("\n".join(map(output.shown, text(found))))
    for warning in found.left_out:
        print(f"warning: {output.shown(warning)}", file=sys.stderr)
    for each in (*found.unclear, *found.unread):
        print(output.shown(each), file=sys.stderr)
    return 1 if found.unclear or found.unread else 0


def as_json(found: Found) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "policies": [{"file": str(each.file), "text": each.text} for each in found.policies],
        "remove": [vars(each) for each in found.remove],
        "left_out": found.left_out,
        "unclear": found.unclear,
        "unread": found.unread,
        "searched": found.searched,
        "not_searched": found.not_searched,
    }


def text(found: Found) -> Iterator[str]:
    """Lines for a person, who may copy what is indented."""
    if not (found.policies or found.remove or found.unclear):
        yield "neither libkeepalive nor libdontdie was found where import looks"
    for each in found.policies:
        yield f"write {each.file}:"
        yield from (f"    {line}" for line in each.text.rstrip("\n").split("\n"))
    if found.policies:
        yield "then run: kabpfctl apply"
    for removal in found.remove:
        yield f"remove from {removal.file}:{removal.line}: {removal.what}"
    for what in found.searched:
        yield f"searched: {what}"
    yield f"not searched: {found.not_searched}"
