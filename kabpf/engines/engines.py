"""All engines of the machine, asked for a container by its cgroup and the id in that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kabpf.containers import names
from kabpf.containers.facts import ENGINES, Container
from kabpf.engines import containerd, crio, docker, podman
from kabpf.engines.files import Budget

LOOK_S = 1.0  # of a processor in databases, for all containers; one takes 0.3 ms
LOCK_S = 0.05  # for locks there, as podman has one while it writes

_FACTS: dict[str, Callable[[Path, str, str, Budget], Container | None]] = {
    "podman": podman.facts,
    "docker": docker.facts,
    "containerd": containerd.facts,
    "crio": crio.facts,
}
_LACKS: dict[str, Callable[[Path], str | None]] = {
    "podman": podman.lacks,
    "docker": docker.lacks,
    "containerd": containerd.lacks,
    "crio": crio.lacks,
}


@dataclass(frozen=True)
class Found:
    """An engine whose files are there, and what it can't tell and why; "" where it tells all."""

    engine: str  # one of facts.ENGINES
    lacks: str = ""


class Engines:
    """What the engines have on disk, for one look at containers, which spends so many `seconds` of
    a processor in their databases at most. `root` is where their absolute paths begin."""

    def __init__(self, root: Path = Path("/"), seconds: float = LOOK_S) -> None:
        self._root = root
        self._budget = Budget(seconds, LOCK_S)

    def facts(self, path: str, id: str) -> Container | None:
        """A container, by the path of its own cgroup and the id in that (`names.identify`).

        None where no engine knows such a container, or gave it another cgroup than this one: a
        name alone proves nothing. It never raises for what a file says or lacks, but TimeoutError
        where the time is used up."""
        identity = names.identify(path)
        if identity is None or identity.id != id:
            return None
        for engine in (identity.engine_hint,) if identity.engine_hint else ENGINES:
            try:
                container = _FACTS[engine](self._root, path, id, self._budget)
            except TimeoutError:
                raise
            except OSError:
                continue
            if container:
                return container
        return None

    def found(self) -> list[Found]:
        """The engines that are on this machine."""
        lacks = {engine: _LACKS[engine](self._root) for engine in ENGINES}
        return [Found(engine, lack) for engine, lack in lacks.items() if lack is not None]
