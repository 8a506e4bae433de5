"""The programs that run under kabpf and the preload libraries, and the table of what they got in
docs/migrating.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/migrating.md"

# What is asked for: idle and interval in seconds, and probes.
ASKED = (60, 10, 6)

# How it is asked of each; of kabpf by a policy.
SIDES = {
    "libkeepalive": (
        "LD_PRELOAD=libkeepalive.so",
        *("KEEPIDLE=60", "KEEPINTVL=10", "KEEPCNT=6"),
    ),
    "libdontdie": (
        "LD_PRELOAD=libdontdie.so",
        *("DD_TCP_KEEPALIVE_TIME=60", "DD_TCP_KEEPALIVE_INTVL=10", "DD_TCP_KEEPALIVE_PROBES=6"),
    ),
    "kabpf": (),
}
POLICY = "{idle: 60, interval: 10, probes: 6}"


@dataclass(frozen=True)
class Row:
    """A program as the table calls it, and how it is started."""

    text: str
    program: str = "client"
    words: tuple[str, ...] = ()  # for the program
    by: tuple[str, ...] = ()  # the command that starts it, which has the library's environment
    opener: str = ""  # what opener.py opens before, without that environment
    opened_elsewhere: bool = False  # in another cgroup
    is_running: bool = False  # before the library or kabpf does anything


ROWS = (
    Row("C"),
    Row("C, IPv6", words=("inet6",)),
    Row("C, `SOCK_NONBLOCK` and `SOCK_CLOEXEC`", words=("nonblocking",)),
    Row("C, accepted connection", words=("accept",)),
    Row("C, statically linked", program="static"),
    Row("C, set-user-ID, run by nobody", program="set-user-id"),
    Row("Python", program="python"),
    Row("Java", program="java"),
    Row("Go, with Go's own keepalive off", program="go"),
    Row("a child, by fork and exec", by=("sh", "-c", '"$@"; :', "sh")),
    Row("a child with an environment of its own", by=("env", "-i")),
    Row("connection that was open before", is_running=True),
    Row("inherited socket", words=("inherited",), opener="socket"),
    Row("inherited listener, as of systemd", words=("accept", "inherited"), opener="listener"),
    Row(
        "inherited socket of another service",
        words=("inherited",),
        opener="socket",
        opened_elsewhere=True,
    ),
    Row("sets 20 s itself, before it connects", words=("20-before",)),
    Row("sets 20 s itself, on the connection", words=("20-after",)),
    Row("turns keepalive off, before it connects", words=("off-before",)),
    Row("turns keepalive off, on the connection", words=("off-after",)),
    Row("UDP socket", words=("datagram",)),
    Row("raw socket", words=("raw",)),
)

_BEGIN = "<!-- tests/preload/run --record writes this table -->\n"
_HEADS = f"| program | {' | '.join(SIDES)} |\n|{' --- |' * (1 + len(SIDES))}\n"


def table() -> dict[str, tuple[str, ...]]:
    """What the page has for each program, by side."""
    _, rows, _ = _parts()
    cells = [re.split(r" *\| *", row.strip("| ")) for row in rows.splitlines()]
    return {program: tuple(got) for program, *got in cells}


def record(program: str, got: tuple[str, ...]) -> None:
    """Write a program's row into the page, and take out those that are of no program."""
    before, _, after = _parts()
    known = {**table(), program: got}
    texts = [row.text for row in ROWS if row.text in known]
    rows = "".join(f"| {text} | {' | '.join(known[text])} |\n" for text in texts)
    PAGE.write_text(before + rows + after)


def _parts() -> tuple[str, str, str]:
    before, heads, rest = PAGE.read_text().partition(_BEGIN + _HEADS)
    assert heads, "docs/migrating.md has no such table"
    rows = re.match(r"(\|.*\n)*", rest)
    assert rows
    return before + heads, rows[0], rest[rows.end() :]
