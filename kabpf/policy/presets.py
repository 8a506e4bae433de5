"""Idle timeouts of middleboxes, and options that fit them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IDLE_MAX_S = 7200  # the kernel's own idle time (tcp_keepalive_time)
INTERVAL_MAX_S = 75  # the kernel's own interval (tcp_keepalive_intvl)


@dataclass(frozen=True)
class Timeout:
    """An idle timeout by which a policy names its middlebox; idle + interval * probes is below."""

    timeout_s: int

    @property
    def idle_s(self) -> int:
        """Half of the idle timeout, at most the kernel's own."""
        return min(self.timeout_s // 2, IDLE_MAX_S)

    @property
    def interval_s(self) -> int:
        """A twelfth of the idle timeout, at most the kernel's own."""
        return min(self.timeout_s // 12, INTERVAL_MAX_S)

    @property
    def probes(self) -> int:
        """Unanswered probes before the connection is given up."""
        return 5

    def why(self, option: str) -> str:
        """The arithmetic of idle, interval or probes."""
        if option == "idle":
            at_most = f", at most {IDLE_MAX_S} s" if self.idle_s == IDLE_MAX_S else ""
            return f"{self._source}: half of {self._its}{at_most}"
        if option == "interval":
            at_most = f", at most {INTERVAL_MAX_S} s" if self.interval_s == INTERVAL_MAX_S else ""
            return f"{self._source}: a twelfth of {self._its}{at_most}"
        return f"{self._source}: idle + interval * {self.probes} stays below {self._its}"

    @property
    def limit(self) -> str:
        """What idle has to stay below."""
        return f"the timeout ({self.timeout_s} s)"

    @property
    def _source(self) -> str:
        return "timeout"

    @property
    def _its(self) -> str:
        return f"{self.timeout_s} s"


@dataclass(frozen=True)
class Preset(Timeout):
    """The idle timeout of a middlebox that has a name."""

    name: str
    after: str  # what becomes of the connection then
    source: str

    @property
    def limit(self) -> str:
        return f"the idle timeout of preset {self.name} ({self.timeout_s} s)"

    @property
    def _source(self) -> str:
        return f"preset {self.name}"

    @property
    def _its(self) -> str:
        return f"its idle timeout of {self.timeout_s} s"


def presets() -> dict[str, Preset]:
    """Every preset by its name, in the data file's order."""
    return {
        name: Preset(row["timeout_s"], name, row["after"], row["source"])
        for name, row in _rows().items()
        if not row.get("counts_data_alone")
    }


def counting_data_alone() -> dict[str, str]:
    """By name, why there is no preset for a middlebox that TCP keepalive says nothing to."""
    return {
        name: f"{name} closes a connection after {row['timeout_s']} s without data, and keepalive"
        f" sends none ({row['source']}); let the application send some in time"
        for name, row in _rows().items()
        if row.get("counts_data_alone")
    }


@functools.cache
def _rows() -> dict[str, dict[str, Any]]:
    import yaml  # late, as in yaml

    text = Path(__file__).with_name("presets.yaml").read_text()
    rows: dict[str, dict[str, Any]] = yaml.load(
        text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return rows
