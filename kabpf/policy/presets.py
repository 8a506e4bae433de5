"""Middleboxes by name: how long they remember an idle connection, and options that fit."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

IDLE_MAX_S = 7200  # the kernel's own idle time (tcp_keepalive_time)
INTERVAL_MAX_S = 75  # the kernel's own interval (tcp_keepalive_intvl)


@dataclass(frozen=True)
class Preset:
    """A middlebox; idle + interval * probes is below its time-out."""

    name: str
    timeout_s: int
    after: str  # what becomes of the connection then
    source: str

    @property
    def idle_s(self) -> int:
        """Half of the time-out, at most the kernel's own."""
        return min(self.timeout_s // 2, IDLE_MAX_S)

    @property
    def interval_s(self) -> int:
        """A twelfth of the time-out, at most the kernel's own."""
        return min(self.timeout_s // 12, INTERVAL_MAX_S)

    @property
    def probes(self) -> int:
        """Unanswered probes before the connection is given up."""
        return 5

    def why(self, option: str) -> str:
        """The arithmetic of idle, interval or probes."""
        timeout = f"its time-out of {self.timeout_s} s"
        if option == "idle":
            at_most = f", at most {IDLE_MAX_S} s" if self.idle_s == IDLE_MAX_S else ""
            return f"preset {self.name}: half of {timeout}{at_most}"
        if option == "interval":
            at_most = f", at most {INTERVAL_MAX_S} s" if self.interval_s == INTERVAL_MAX_S else ""
            return f"preset {self.name}: a twelfth of {timeout}{at_most}"
        return f"preset {self.name}: idle + interval * {self.probes} stays below {timeout}"


@functools.cache
def presets() -> dict[str, Preset]:
    """Every preset by its name, in the data file's order."""
    import yaml  # late, as in yaml

    text = Path(__file__).with_name("presets.yaml").read_text()
    rows = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        name: Preset(name, row["timeout_s"], row["after"], row["source"])
        for name, row in rows.items()
    }
