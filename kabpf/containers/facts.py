"""What an engine knows of a container, as values; strangers wrote the texts in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ENGINES = ("podman", "docker", "containerd", "crio")


@dataclass(frozen=True)
class Pod:
    """A pod of Kubernetes, or of podman, which has no namespaces."""

    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Container:
    """A container. What its engine does not tell is empty. Bytes that are not UTF-8 are as
    os.fsdecode() makes them, as in cgroup paths."""

    id: str
    engine: str  # one of ENGINES
    name: str  # in a pod of Kubernetes the container's name there
    image: str  # as it was asked for, mostly with its tag
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    pod: Pod | None = None
