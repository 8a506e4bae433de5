"""What Docker has on disk of a container.

moby writes config.v2.json when the container is made (daemon/container/container.go, toDisk()), and
containerd the bundle before the first process starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kabpf.containers.facts import Container
from kabpf.engines import bundles, files, kubernetes
from kabpf.engines.files import Budget

ROOT = "var/lib/docker"
SETTINGS = "etc/docker/daemon.json"  # "data-root"
# The state directory of containerd, the machine's own or Docker's (libcontainerd/supervisor), with
# the namespace in it ("moby", daemon/config/config.go).
BUNDLES = tuple(
    f"{state}/io.containerd.runtime.v2.task/moby"
    for state in ("run/containerd", "run/docker/containerd/daemon")
)


def lacks(root: Path) -> str | None:
    """What can't be told of Docker's containers here, and why; None where there is no Docker."""
    return files.lacks(_directory(root), ".")


def facts(root: Path, path: str, id: str, _: Budget) -> Container | None:
    """A container by its cgroup's path and its id. Raises OSError where Docker has none."""
    config = files.read_object(_directory(root), f"{id}/config.v2.json")
    bundle = next(_bundles(root, id), None)
    if bundle is None or bundle.cgroup != path:
        return None
    labels = files.texts(files.inside(config, "Config", "Labels"))
    # An image may have such labels too, but has no word in which cgroup the container is.
    above = _sandbox(root, labels) if "kubepods" in path else {}
    annotations = {
        key.removeprefix(_ANNOTATION): value
        for key, value in above.items()
        if key.startswith(_ANNOTATION)
    }
    return Container(
        id=id,
        engine="docker",
        name=(above and labels.get(kubernetes.CONTAINER))
        or files.text(config.get("Name")).removeprefix("/"),
        image=files.text(files.inside(config, "Config").get("Image")),
        labels=labels,
        annotations=annotations | bundle.annotations,
        pod=kubernetes.pod(labels, above) if above else None,
    )


def _directory(root: Path) -> Path:
    try:
        moved = files.text(files.read_object(root, SETTINGS).get("data-root"))
    except OSError:
        moved = ""
    return root / (moved.lstrip("/") or ROOT) / "containers"


def _bundles(root: Path, id: str) -> Iterator[bundles.Bundle]:
    for directory in BUNDLES:
        try:
            yield bundles.read(root / directory, id)
        except OSError:
            continue


# Kubernetes through cri-dockerd: core/docker_service.go; core/helpers.go has annotations in labels.
_SANDBOX = "io.kubernetes.sandbox.id"
_ANNOTATION = "annotation."


def _sandbox(root: Path, labels: dict[str, str]) -> dict[str, str]:
    """The labels of a container's sandbox, which are its pod's; its own where it is a sandbox."""
    if _SANDBOX not in labels:
        return labels
    try:
        sandbox = files.read_object(_directory(root), f"{labels[_SANDBOX]}/config.v2.json")
    except OSError:
        return {}
    return files.texts(files.inside(sandbox, "Config", "Labels"))
