"""The labels that kubelet gives to each container (pkg/kubelet/types/labels.go of kubernetes)."""

from __future__ import annotations

from collections.abc import Mapping

from kabpf.containers.facts import Pod

CONTAINER = "io.kubernetes.container.name"
_NAMESPACE = "io.kubernetes.pod.namespace"
_NAME = "io.kubernetes.pod.name"
_UID = "io.kubernetes.pod.uid"


def pod(labels: Mapping[str, str], above: Mapping[str, str]) -> Pod | None:
    """The pod of a container by its labels and those of its sandbox; None where it is in none."""
    if _NAME not in labels:
        return None
    return Pod(labels.get(_NAMESPACE, ""), labels[_NAME], labels.get(_UID, ""), above)
