"""Containers by the paths of their cgroups."""

import pytest

from kabpf.containers import names
from kabpf.containers.names import Identity

ID = "0123456789abcdef" * 4
OTHER = "f" * 64
POD = "1f0e8a6c_6f7e_4b7f_9f3b_2f6a3c1d5e77"
PODS = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD}.slice"


@pytest.mark.parametrize(
    ("path", "engine"),
    [
        (f"/machine.slice/libpod-{ID}.scope", "podman"),
        (f"/machine.slice/machine-libpod_pod_{OTHER}.slice/libpod-{ID}.scope", "podman"),
        (f"/libpod_parent/libpod-{ID}", "podman"),
        (f"/system.slice/app.service/libpod-payload-{ID}", "podman"),
        (f"/user.slice/user-7.slice/user@7.service/user.slice/libpod-{ID}.scope", "podman"),
        (f"/system.slice/docker-{ID}.scope", "docker"),
        (f"/docker/{ID}", "docker"),
        (f"{PODS}/docker-{ID}.scope", "docker"),
        (f"{PODS}/cri-containerd-{ID}.scope", "containerd"),
        (f"/system.slice/nerdctl-{ID}.scope", "containerd"),
        (f"{PODS}/crio-{ID}.scope", "crio"),
        (f"/kubepods/burstable/pod{POD}/crio-{ID}", "crio"),
        (f"/kubepods/besteffort/pod{POD}/{ID}", None),
        (f"/default/{ID}", None),
        (f"/{ID}", None),
    ],
)
def test_cgroup_of_a_container_is_known(path, engine):
    """Each engine's names, by systemd's driver and by the cgroupfs driver."""
    assert names.identify(path) == Identity(engine, ID)
    assert names.enclosing(path) == (path, Identity(engine, ID))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/machine.slice",
        f"/machine.slice/libpod-conmon-{ID}.scope",
        f"/system.slice/crio-conmon-{ID}.scope",
        f"/machine.slice/machine-libpod_pod_{ID}.slice",
        f"/machine.slice/libpod-{ID}.scope/container",
        f"/machine.slice/libpod-{ID}.scope/",
        f"/machine.slice/libpod-{ID[1:]}.scope",
        f"/machine.slice/libpod-{ID}0.scope",
        f"/machine.slice/libpod-{ID.upper()}.scope",
        f"/machine.slice/libpod-{ID}.scope\n",
        f"/machine.slice/libpod-{ID[:-1]}é.scope",
        f"/machine.slice/xlibpod-{ID}.scope",
        f"/system.slice/docker-{ID}.slice",
        f"/docker/{ID}\udcff",
        f"{PODS}",
    ],
)
def test_any_other_cgroup_is_none(path):
    """Monitors of containers, slices of pods, what is inside a container, and names that are
    nearly an engine's."""
    assert names.identify(path) is None


def test_cgroup_inside_a_container_has_the_innermost_one():
    """A container in a container has an engine of its own; crun's `container` has none."""
    outer = f"/system.slice/docker-{OTHER}.scope"
    inner = f"{outer}/libpod_parent/libpod-{ID}"
    assert names.enclosing(f"{inner}/container/a") == (inner, Identity("podman", ID))
    assert names.enclosing(f"{outer}/init.scope") == (outer, Identity("docker", OTHER))
    assert names.enclosing("/system.slice/nginx.service") is None
    assert names.enclosing("/") is None


MANAGER = "/user.slice/user-7.slice/user@7.service"


@pytest.mark.parametrize(
    "own",
    [
        f"{MANAGER}/user.slice/libpod-{ID}.scope",
        f"{MANAGER}/app.slice/db.service/libpod-payload-{ID}",
        f"{MANAGER}/user.slice/docker-{ID}.scope",
    ],
)
def test_container_of_a_user_is_below_their_manager(own: str) -> None:
    """So is what is in it."""
    for path in (own, f"{own}/container"):
        found = names.of_user(path)
        assert found and (found.user, found.manager, found.path) == (7, MANAGER, own)
        assert found.identity.id == ID


@pytest.mark.parametrize(
    "path",
    [
        f"/machine.slice/libpod-{ID}.scope",
        f"/a{MANAGER}/user.slice/libpod-{ID}.scope",
        f"/machine.slice/libpod-{ID}.scope{MANAGER}/user.slice",
        f"{MANAGER}/app.slice/db.service",
        f"{MANAGER}/user.slice/libpod-conmon-{ID}.scope",
        f"/user.slice/user-x.slice/user@x.service/libpod-{ID}.scope",
        f"/user.slice/user-7.slice/session-3.scope/libpod-{ID}.scope",
    ],
)
def test_other_cgroup_is_no_container_of_a_user(path: str) -> None:
    """Nor is one in a container that has users of its own."""
    assert names.of_user(path) is None
