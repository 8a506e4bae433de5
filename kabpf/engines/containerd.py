"""What containerd has on disk of a container: the bundle of its task, and labels in its database
(core/metadata/buckets.go has the layout)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kabpf.containers.facts import Container, Pod
from kabpf.engines import bolt, bundles, files
from kabpf.engines.bundles import Bundle
from kabpf.engines.files import Budget

# The state and root directories, containerd's own and those that k3s and RKE2 give it
# (k3s: pkg/agent/config/config.go, get()).
DIRECTORIES = (
    ("run/containerd", "var/lib/containerd"),
    ("run/k3s/containerd", "var/lib/rancher/k3s/agent/containerd"),
    ("run/k3s/containerd", "var/lib/rancher/rke2/agent/containerd"),
)
TASKS = "io.containerd.runtime.v2.task"
DATABASE = "io.containerd.metadata.v1.bolt/meta.db"
_CRI = "io.kubernetes.cri."  # internal/cri/annotations/annotations.go
_DOCKERS = "moby"  # a namespace that docker.py knows more of


def lacks(root: Path) -> str | None:
    """What can't be told of containerd's containers here, and why; None where it has none but
    Docker's."""
    for state, kept in DIRECTORIES:
        if any(_namespaces(root / state)):
            return files.lacks(root / kept, DATABASE)
    return None


def facts(root: Path, path: str, id: str, budget: Budget) -> Container | None:
    """A container by its cgroup's path and its id. Raises OSError where containerd has none, and
    TimeoutError where the budget is used up before."""
    for state, kept in DIRECTORIES:
        for namespace in _namespaces(root / state):
            try:
                bundle = bundles.read(root / state / TASKS, f"{namespace}/{id}")
            except OSError:
                continue
            if bundle.cgroup == path and (root / kept / DATABASE).exists():
                with budget.spent():
                    return _container(root / kept, namespace, id, bundle)
    return None


def _container(kept: Path, namespace: str, id: str, bundle: Bundle) -> Container:
    cri = {
        key.removeprefix(_CRI): value
        for key, value in bundle.annotations.items()
        if key.startswith(_CRI)
    }
    sandbox = cri.get("sandbox-id", "")
    image, labels, pod_labels, pod_annotations = _stored(kept, namespace, id, sandbox)
    pod = (cri.get(f"sandbox-{part}", "") for part in ("namespace", "name", "uid"))
    return Container(
        id=id,
        engine="containerd",
        name=cri.get("container-name") or labels.get("nerdctl/name", ""),
        image=cri.get("image-name") or image,
        labels=labels,
        annotations=pod_annotations | bundle.annotations,
        pod=Pod(next(pod), next(pod), next(pod), pod_labels) if sandbox else None,
    )


_Stored = tuple[str, dict[str, str], dict[str, str], dict[str, str]]


def _stored(kept: Path, namespace: str, id: str, sandbox: str) -> _Stored:
    """A container's image and labels, and the labels and annotations of its sandbox."""
    descriptor = files.opened(kept, DATABASE)

    def look(view: bolt.View) -> _Stored:
        below = (b"v1", os.fsencode(namespace))
        own, other = ((*below, b"containers", os.fsencode(name)) for name in (id, sandbox))
        image = view.value(*own, b"image") or b""
        labels = _decoded(view.items(*own, b"labels"))
        if not sandbox:
            return os.fsdecode(image), labels, {}, {}
        above = _decoded(view.items(*other, b"labels"))
        metadata = view.value(*other, b"extensions", _SANDBOX_METADATA) or b""
        return os.fsdecode(image), labels, above, _pod_annotations(metadata)

    try:
        return bolt.look(descriptor, look)
    finally:
        os.close(descriptor)


_SANDBOX_METADATA = b"io.cri-containerd.sandbox.metadata"


def _pod_annotations(extension: bytes) -> dict[str, str]:
    """The annotations in a sandbox's metadata: JSON in a google.protobuf.Any, whose first field,
    the type's address, has no brace (internal/cri/store/sandbox/metadata.go)."""
    try:
        metadata = files.decoded(extension[extension.find(b"{") :])
    except OSError:
        return {}
    return files.texts(files.inside(metadata, "Metadata", "Config", "annotations"))


def _decoded(items: dict[bytes, bytes]) -> dict[str, str]:
    return {os.fsdecode(key): os.fsdecode(value) for key, value in items.items()}


def _namespaces(state: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(state / TASKS):
            if name != _DOCKERS:
                yield name
