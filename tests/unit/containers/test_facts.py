"""Values of containers."""

import dataclasses

import pytest

from kabpf.containers.facts import Container, Pod


def test_container_can_not_be_changed():
    """One that several places were given is the same for all."""
    container = Container("0" * 64, "podman", "app", "image", pod=Pod("shop", "web", "uid"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        container.name = "other"
    assert container.labels == container.annotations == container.pod.labels == {}
