"""What CRI-O has on disk of a container: all of it is annotations of the bundle
(internal/factory/container/container.go, SpecAddAnnotations(); internal/annotations)."""

from __future__ import annotations

from pathlib import Path

from kabpf.containers.facts import Container
from kabpf.engines import files, kubernetes, storage
from kabpf.engines.files import Budget

_PREFIX = "io.kubernetes.cri-o."
_STATE = ("var/lib/crio", "run/crio")  # its version file and its sockets


def lacks(root: Path) -> str | None:
    """What can't be told of CRI-O's containers here, and why; None where there is no CRI-O."""
    if not any((root / name).is_dir() for name in _STATE):
        return None
    return files.lacks(storage.graph_root(root), ".")


def facts(root: Path, path: str, id: str, _: Budget) -> Container | None:
    """A container by its cgroup's path and its id. Raises OSError where CRI-O has none."""
    bundle = storage.bundle(root, id)
    if bundle.annotations.get("io.container.manager") != "cri-o" or bundle.cgroup != path:
        return None
    own = bundle.annotations
    labels = _map(own, "Labels")
    sandbox = own.get(f"{_PREFIX}SandboxID", "")
    try:
        above = storage.bundle(root, sandbox).annotations if sandbox != id else own
    except OSError:
        above = {}
    return Container(
        id=id,
        engine="crio",
        name=labels.get(kubernetes.CONTAINER, "") or own.get(f"{_PREFIX}Name", ""),
        image=own.get(f"{_PREFIX}Image", "") or own.get(f"{_PREFIX}ImageName", ""),
        labels=labels,
        # Those that people write are the pod's.
        annotations=_map(above, "Annotations") | own,
        pod=kubernetes.pod(labels, _map(above, "Labels")),
    )


def _map(annotations: dict[str, str], name: str) -> dict[str, str]:
    """An annotation that is an object of strings in JSON."""
    try:
        return files.texts(files.decoded(annotations.get(f"{_PREFIX}{name}", "").encode()))
    except (OSError, UnicodeEncodeError):
        return {}
