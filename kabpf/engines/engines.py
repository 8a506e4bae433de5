"""All engines of the machine, asked for a container by its cgroup and the id in that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kabpf.containers.facts import Container


@dataclass(frozen=True)
class Found:
    """An engine whose files are there, and what it can't tell and why; "" where it tells all."""

    engine: str  # one of facts.ENGINES
    lacks: str = ""


class Engines:
    """What the engines have on disk. `root` is where their absolute paths begin."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def facts(self, path: str, id: str) -> Container | None:
        """A container, by the path of its own cgroup and the id in that (`names.identify`).

        None where no engine knows such a container, or gave it another cgroup than this one: a
        name alone proves nothing. It never raises for what a file says or lacks."""
        raise NotImplementedError

    def found(self) -> list[Found]:
        """The engines that are on this machine."""
        raise NotImplementedError
