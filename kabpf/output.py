"""How kabpfctl says things: tables, cells, counts, JSON, names made safe to show."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kabpf import tables
from kabpf.policy.model import ON_SOCKETS, OPTIONS, Direction, Options, Policy, Range
from kabpf.tables import Column

if TYPE_CHECKING:
    from kabpf.apply.reconcile import Resolution
    from kabpf.kernel.dataplane import Counters
    from kabpf.plan.state import Cgroup, PolicyRecord

Item = TypeVar("Item")

UNKNOWN = "?"  # in a cell; - is not set

OPTION_HEADS = tuple(row.name.upper() for row in ON_SOCKETS)
COUNTER_HEADS = (
    "+NEW",
    "+LISTENERS",
    "+UPDATED",
    "+KEPT",
    "+IGNORED",
    "+CLAMPED",
    "+TURNED OFF",
    "+TIMED OUT",
    "FAILED",
)


# Of all JSON that is printed (schema/output/). It rises when a key goes or changes its meaning; new
# keys do not raise it.
JSON_VERSION = 1
TOKENS = 1024  # that are written together; with a cgroup of 4 KiB in every 60 it is some 70 KiB
LINES = 100  # of a table


def answer(arguments: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    """Print the result as JSON or the text, as --json says; the exit status."""
    if arguments.json:
        print_json(result)
    else:
        print(text)
    return 0


def print_json(result: dict[str, Any]) -> None:
    """Print a result as JSON, with the version of its keys."""
    tokens = json.JSONEncoder(indent=2).iterencode({"version": JSON_VERSION, **result})
    # Not all at once: strangers' paths may be long, and many. Nor one by one, as a write takes
    # longer than a token.
    while piece := "".join(itertools.islice(tokens, TOKENS)):
        print(piece, end="")
    print()


class Streamed(list[Any]):
    """An array of JSON whose items are made one by one, when `print_json` prints them."""

    def __init__(self, items: Iterable[Any], count: int) -> None:
        super().__init__()
        self._items, self._count = items, count

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return self._count


def warn(lines: Iterable[str]) -> None:
    """Say on standard error what a command could not do, although it did the rest."""
    for line in lines:
        print(f"kabpfctl: {shown(line)}", file=sys.stderr)


def shown(text: str) -> str:
    """A name from the file system, safe for a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


class Made(Iterable[Item]):
    """What is made anew each time that somebody goes through it, and so takes no room."""

    def __init__(self, make: Callable[[], Iterator[Item]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Item]:
        return self._make()


def print_table(columns: Sequence[Column], rows: tables.Rows, *, is_wide: bool = False) -> None:
    """Print a table: at most as wide as the terminal; in a pipe, or if it `is_wide`, as wide as it
    has to be. It goes through the rows more than once."""
    lines = tables.lines(columns, _shown(rows), None if is_wide else room())
    while piece := "".join(itertools.islice(lines, LINES)):
        print(encodable(piece), end="")


def fitted(columns: Sequence[Column], rows: tables.Rows) -> str:
    """A table that fits standard output."""
    return encodable(tables.table(columns, _shown(rows), room()))


def encodable(text: str) -> str:
    """A text whose cuts standard output has a character for."""
    try:
        tables.ELLIPSIS.encode(sys.stdout.encoding)
    except UnicodeError:
        return text.replace(tables.ELLIPSIS, "~")
    return text


def print_blocks(columns: Sequence[Column], rows: tables.Rows) -> None:
    """Print rows as blocks, with a line for each cell; on a terminal folded."""
    print(tables.blocks(columns, _shown(rows), room()), end="")


def print_folded(start: str, text: str) -> None:
    """Print a text after `start`; on a terminal folded below itself."""
    print("\n".join(_folded(start, shown(text), room())))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, on a terminal those that are too long folded below their beginning."""
    print("\n".join(folded_lines(lines)))


def folded_lines(lines: Iterable[str]) -> list[str]:
    """Lines, on a terminal those that are too long folded below their beginning."""
    width = room()
    folded = []
    for line in map(shown, lines):
        if width is None or tables.text_width(line) <= width:
            folded.append(line)
        else:
            text = line.lstrip(" ")
            folded += _folded(line.removesuffix(text), text, width)
    return folded


def _folded(start: str, text: str, width: int | None) -> list[str]:
    lines = [text] if width is None else tables.folded(text, width - len(start))
    return [f"{' ' * len(start) if number else start}{line}" for number, line in enumerate(lines)]


def room() -> int | None:
    """The width of the terminal that standard output is; None where it is a file or a pipe."""
    if not sys.stdout.isatty():
        return None
    import shutil  # here, because a pipe does without

    return max(shutil.get_terminal_size().columns, tables.NARROWEST)


def _shown(rows: tables.Rows) -> tables.Rows:
    return Made(lambda: (tuple(map(shown, row)) for row in rows))


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


def options_cell(options: Options) -> str:
    """The options in one cell: 60s/10s/6 ut=120s."""
    if not options.keepalive:
        return "off"
    idle, interval, probes, user_timeout = option_cells(options)
    timeout = "" if user_timeout == "-" else f" ut={user_timeout}"
    return f"{idle}/{interval}/{probes}{timeout}"


def options_text(options: Options) -> str:
    """Options as a person would say them."""
    if not options.keepalive:
        return "keepalive off"
    cells = zip(ON_SOCKETS, option_cells(options), strict=True)
    words = [f"{row.name} {cell}" for row, cell in cells if cell != "-"]
    return ", ".join(["keepalive on", *words, *_rarer(options)])


def other_cell(record: PolicyRecord) -> str:
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
        counters.updated,
        counters.kept,
        counters.ignored,
        counters.clamped,
        counters.turned_off,
        counters.timed_out,
    )
    return (*map(str, counts), failed or "0")


def active_text(policies: int, covered: int, cgroups: int) -> str:
    """How many policies are active, and how many of all cgroups they cover."""
    active = count(policies, "policy", "policies")
    return f"{active} active, covering {covered} of {count(cgroups, 'cgroup')}"


def covered_count(resolution: Resolution) -> int:
    """How many cgroups have a policy; without their paths, which may be long."""
    cgroups = resolution.plan.cgroups
    return sum(1 for id in resolution.present if (found := cgroups.get(id)) and found.policy)


def covered(resolution: Resolution) -> list[tuple[Cgroup, Policy]]:
    """The cgroups that have a policy, with it, each before what is below, and by name."""
    present, resolved = resolution.present, resolution.plan.cgroups
    below: dict[int, list[Cgroup]] = {}
    for cgroup in present.values():
        below.setdefault(cgroup.parent_id if cgroup.parent_id in present else 0, []).append(cgroup)
    found = []
    waiting = below.get(0, [])
    while waiting:
        cgroup = waiting.pop()
        if policy := resolved[cgroup.id].policy:
            found.append((cgroup, policy))
        waiting += sorted(below.get(cgroup.id, ()), key=lambda each: each.name, reverse=True)
    return found


def changes_json(resolution: Resolution) -> dict[str, int]:
    """What apply wrote, or would write, in numbers."""
    changes = resolution.changes
    written = changes.cgroups.keys() | changes.updates.keys()
    return {
        "policies": len(changes.records),
        "cgroups": len(written) + len(changes.stale_cgroups),
        "rules": len(changes.births),
        "updates": len(changes.updates),
    }


def changes_text(resolution: Resolution) -> str:
    """What apply would write, as a person would say it."""
    changes = changes_json(resolution)
    counts = (
        (changes["policies"], "policy", "policies"),
        (changes["cgroups"], "cgroup", "cgroups"),
        (changes["rules"], "rule for new cgroups", "rules for new cgroups"),
    )
    return ", ".join(count(*each) for each in counts if each[0]) or "nothing"
