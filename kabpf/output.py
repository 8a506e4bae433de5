"""How kabpfctl says things: tables, cells, counts, JSON, names made safe to show."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from kabpf.apply.reconcile import Resolution
from kabpf.kernel.dataplane import Counters
from kabpf.plan.state import PolicyRecord
from kabpf.policy.model import ON_SOCKETS, OPTIONS, Direction, Options, Policy, Range

# Rich takes 1 ms a row.
_RICH_ROWS = 300
_CELL_MAX = 400  # characters; a cgroup path that a person chose is shorter
_NARROW = 12  # characters; a column of such cells is not folded

OPTION_HEADS = tuple(row.name.upper().replace(" ", "-") for row in ON_SOCKETS)
COUNTER_HEADS = (
    "NEW",
    "LISTENERS",
    "RETROFITTED",
    "LEFT",
    "SWALLOWED",
    "LIMITED",
    "DIED",
    "FAILED",
)


def answer(arguments: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    """Print the result as JSON or the text, whichever was asked for; the exit status."""
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0


def shown(text: str) -> str:
    """A name from the file system, safe for a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shortened(text: str) -> str:
    """A text without its middle where it is too long to read."""
    half = _CELL_MAX // 2
    return text if len(text) <= _CELL_MAX else f"{text[: half - 2]}...{text[1 - half :]}"


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Lines of columns as wide as they have to be, up to a bound."""
    lines = [heads, *(tuple(map(shortened, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def print_table(
    heads: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    stacks: Sequence[tuple[str, ...]] = (),
) -> None:
    """Print a table: plainly, or by rich, if it is installed, so that it fits the terminal. Where
    that is too narrow for a row, columns of one of `stacks` stand above each other."""
    if sys.stdout.isatty() and len(rows) <= _RICH_ROWS:
        with contextlib.suppress(ImportError):
            _print_fitted(heads, rows, stacks)
            return
    print(table(heads, rows), end="")


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def cell(value: int | Range | None, unit: str) -> str:
    """A number or range with its unit; - is none."""
    if value is None:
        return "-"
    low, high = (value, value) if isinstance(value, int) else value
    if unit == "ms" and not (low % 1000 or high % 1000):
        low, high, unit = low // 1000, high // 1000, "s"
    return f"{high}{unit}" if low == high else f"{low}{unit}..{high}{unit}"


def option_cells(options: Options) -> tuple[str, ...]:
    """One cell for each of OPTION_HEADS."""
    if not options.keepalive:
        return ("off",) * len(OPTION_HEADS)
    return tuple(cell(getattr(options, row.field), row.unit) for row in ON_SOCKETS)


def options_text(options: Options) -> str:
    """Options as a person would say them."""
    if not options.keepalive:
        return "keepalive off"
    cells = zip(ON_SOCKETS, option_cells(options), strict=True)
    words = [f"{row.name} {cell}" for row, cell in cells if cell != "-"]
    return ", ".join(["keepalive on", *words, *_rarer(options)])


def more_cell(record: PolicyRecord) -> str:
    """What a policy says beyond OPTION_HEADS; - is nothing."""
    words = list(_rarer(record.options))
    if record.direction != Direction.BOTH:
        words.append(f"only {record.direction}")
    if not record.loopback:
        words.append("no loopback")
    if not record.existing:
        words.append("no open sockets")
    if record.log:
        words.append("logs sockets")
    if record.digest:
        words.append("by destination")
    return ", ".join(words) or "-"


def conditions_json(record: PolicyRecord) -> dict[str, Any]:
    """What a policy says beyond its options."""
    return {
        "mode": str(record.mode),
        "direction": str(record.direction),
        "loopback": record.loopback,
        "existing": record.existing,
        "log": "sockets" if record.log else "off",
        "destinations": record.digest != 0,
    }


def _rarer(options: Options) -> Iterator[str]:
    for row in OPTIONS:
        if not row.on_sockets and (value := getattr(options, row.field)):
            yield f"{row.name} {cell(value, row.unit)}"


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
        counters.died,
    )
    return (*map(str, counts), failed or "0")


def covered(resolution: Resolution) -> list[tuple[str, Policy]]:
    """The paths of the cgroups that have a policy, with it, in the order of the paths."""
    paths = resolution.cgroups
    return sorted(
        (
            (paths[id].path, resolved.policy)
            for id, resolved in resolution.plan.cgroups.items()
            if resolved.policy
        ),
        key=lambda item: item[0],
    )


def changes_json(resolution: Resolution) -> dict[str, int]:
    """What apply wrote, or would write, in numbers."""
    changes = resolution.changes
    return {
        "policies": len(changes.records),
        "births": len(changes.births),
        "cgroups": len(changes.cgroups),
        "retrofits": len(changes.retrofits),
    }


def changes_text(resolution: Resolution) -> str:
    """What apply wrote, or would write, as a person would say it."""
    changes = resolution.changes
    counts = (
        (len(changes.records), "policy", "policies"),
        (
            len(changes.cgroups.keys() | changes.retrofits.keys()) + len(changes.stale_cgroups),
            "cgroup",
            "cgroups",
        ),
        (len(changes.births), "rule for new cgroups", "rules for new cgroups"),
    )
    return ", ".join(count(*each) for each in counts if each[0]) or "nothing"


def _print_fitted(
    heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], stacks: Sequence[tuple[str, ...]]
) -> None:
    from rich.console import Console  # here, because it takes 70 ms
    from rich.table import Table
    from rich.text import Text

    console = Console()
    needed = max(map(len, table(heads, rows).splitlines()))
    is_stacked = bool(stacks) and console.width < needed
    if is_stacked:
        places = [[heads.index(head) for head in stack if head in heads] for stack in stacks]
        heads, *rows = (
            tuple("\n".join(row[place] for place in stack) for stack in places)
            for row in (heads, *rows)
        )
    fitted = Table(box=None, pad_edge=False)
    for column, head in enumerate(heads):
        lines = [line for row in rows for line in row[column].split("\n")]
        is_narrow = all(len(line) <= _NARROW for line in lines)
        title = head if is_stacked else head.replace("-", "\n")
        fitted.add_column(title, overflow="fold", no_wrap=is_narrow)
    styles = {"off": "yellow", "-": "dim"}
    for row in rows:
        fitted.add_row(
            *(
                Text("\n").join(Text(line, styles.get(line, "")) for line in cell.split("\n"))
                for cell in row
            )
        )
        if is_stacked:
            fitted.add_row()
    console.print(fitted)
