"""Bar charts as SVG, readable on light and dark pages and without colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, ROW, TOP, BOTTOM = 860, 24, 48, 46  # pixels
NAMES, LABELS = 440, 130  # to the left and to the right of the bars
BARS = WIDTH - NAMES - LABELS
COLOURS = {"kabpf": "#0969da", "other": "#8b949e", "missed": "#cf222e"}


class Bar(NamedTuple):
    """A figure with its name; `label` says it in words, `kind` is a key of COLOURS."""

    name: str
    value: float
    label: str
    kind: str = "kabpf"


def bars(title: str, axis: str, rows: Sequence[Bar], limit: float = 0, most: float = 0) -> str:
    """A chart. `axis` names what the bars count, with its unit; `limit` is drawn as a dashed
    line. Bars end at `most`, where it is given."""
    ticks = _ticks(most or max(limit, *(row.value for row in rows)))
    height = TOP + ROW * len(rows) + BOTTOM

    def x(value: float) -> float:
        return round(NAMES + BARS * min(value / ticks[-1], 1), 1)

    foot = TOP + ROW * len(rows)
    drawn = []
    for tick in ticks:
        drawn += [
            f'<path d="M{x(tick)} {TOP - 4}V{foot}" stroke="#d0d7de"/>',
            f'<text x="{x(tick)}" y="{foot + 16}" text-anchor="middle">{tick:,g}</text>',
        ]
    for place, row in enumerate(rows):
        y = TOP + ROW * place
        drawn += [
            f'<text x="{NAMES - 8}" y="{y + 15}" text-anchor="end">{escape(row.name)}</text>',
            f'<rect x="{NAMES}" y="{y + 4}" width="{round(x(row.value) - NAMES, 1)}"'
            f' height="{ROW - 8}" fill="{COLOURS[row.kind]}"/>',
        ]
    if limit:
        drawn.append(
            f'<path d="M{x(limit)} {TOP - 6}V{foot}" stroke="#1f2328" stroke-width="1.5"'
            ' stroke-dasharray="5 4"/>'
        )
    for place, row in enumerate(rows):
        drawn.append(
            f'<text x="{x(row.value) + 6}" y="{TOP + ROW * place + 15}" stroke="#ffffff"'
            f' stroke-width="4" paint-order="stroke">{escape(row.label)}</text>'
        )
    described = "; ".join(f"{row.name}: {row.label}" for row in rows)
    return f"""\
<!-- bench/publish writes this picture -->
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" \
height="{height}" role="img"
     font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif" font-size="12" fill="#1f2328">
<title>{escape(title)}</title>
<desc>{escape(axis)}. {escape(described)}</desc>
<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10" fill="#ffffff" \
stroke="#8b949e"/>
<text x="16" y="26" font-size="14" font-weight="bold">{escape(title)}</text>
{chr(10).join(drawn)}
<text x="{NAMES + BARS / 2}" y="{foot + 34}" text-anchor="middle">{escape(axis)}</text>
</svg>
"""


def _ticks(most: float) -> list[float]:
    """From 0 to `most` or more, in four to seven steps of 1, 2 or 5."""
    magnitude = 10 ** math.floor(math.log10(most / 4))
    step = next(each * magnitude for each in (1, 2, 5, 10) if most / (each * magnitude) <= 6)
    return [round(step * place, 9) for place in range(math.ceil(round(most / step, 6)) + 1)]
