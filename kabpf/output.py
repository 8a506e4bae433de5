"""How kabpfctl says things: tables, cells, counts, JSON, and names that are safe to show."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from kabpf.dataplane import Counters
from kabpf.policy import Options, Policy, Range
from kabpf.reconcile import Resolution

OPTION_HEADS = ("IDLE", "INTERVAL", "PROBES", "USER-TIMEOUT")
COUNTER_HEADS = ("NEW", "LISTENERS", "RETROFITTED", "LEFT", "SWALLOWED", "LIMITED", "FAILED")


def answer(arguments: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    """Print the result as JSON or the text, whichever was asked for; the exit status."""
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0


def shown(text: str) -> str:
    """A name from the file system, safe for a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Lines of columns as wide as they have to be."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def option_cells(options: Options) -> tuple[str, str, str, str]:
    """One cell for each of OPTION_HEADS."""
    if not options.keepalive:
        return ("off",) * 4
    return (
        _cell(options.idle_s, "s"),
        _cell(options.interval_s, "s"),
        _cell(options.probes, ""),
        _cell(options.user_timeout_ms, "ms"),
    )


def options_json(options: Options) -> dict[str, Any]:
    """Options by name; a range is a list of its bounds."""
    return {
        key: (value[0] if value[0] == value[1] else list(value))
        if isinstance(value, Range)
        else value
        for key, value in vars(options).items()
    }


def options_text(options: Options) -> str:
    """Options as a person would say them."""
    if not options.keepalive:
        return "keepalive off"
    cells = zip(OPTION_HEADS, option_cells(options), strict=True)
    words = [f"{head.lower().replace('-', ' ')} {cell}" for head, cell in cells if cell != "-"]
    return "keepalive on" + "".join(f", {word}" for word in words)


def counter_cells(counters: Counters) -> tuple[str, ...]:
    """One cell for each of COUNTER_HEADS."""
    failed = ", ".join(f"{name} {times}" for name, times in sorted(counters.failed.items()))
    counts = (
        counters.established,
        counters.listening,
        counters.retrofitted,
        counters.left,
        counters.swallowed,
        counters.limited,
    )
    return (*map(str, counts), failed or "0")


def covered(resolution: Resolution) -> list[tuple[str, Policy]]:
    """The paths of the cgroups that have a policy, with it, in the order of the paths."""
    paths = resolution.cgroups
    return sorted(
        (
            (paths[id].path, found.policy)
            for id, found in resolution.plan.cgroups.items()
            if found.policy
        ),
        key=lambda item: item[0],
    )


def changes_json(resolution: Resolution) -> dict[str, int]:
    """How many of what apply wrote, or would write."""
    changes = resolution.changes
    return {
        "policies": len(changes.records),
        "births": len(changes.births),
        "cgroups": len(changes.cgroups),
        "retrofits": len(changes.retrofits),
    }


def changes_text(resolution: Resolution) -> str:
    """The same for a person."""
    changes = resolution.changes
    counts = (
        (len(changes.records), "policy", "policies"),
        (len(changes.cgroups) + len(changes.stale_cgroups), "cgroup", "cgroups"),
        (len(changes.births), "rule for new cgroups", "rules for new cgroups"),
    )
    return ", ".join(count(*each) for each in counts if each[0]) or "nothing"


def _cell(value: Range | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "ms" and not any(bound % 1000 for bound in value):
        value, unit = Range(value.low // 1000, value.high // 1000), "s"
    low = "" if value.low == value.high else f"{value.low}{unit}.."
    return f"{low}{value.high}{unit}"
