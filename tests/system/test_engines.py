"""Real engines of each Debian: what is known of a container from what they have on disk."""

import container_engines
import pytest
from container_engines import IMAGE, Containerd, Docker, Podman

pytestmark = [
    pytest.mark.parametrize("layers", ["engines"], indirect=True),
    pytest.mark.parametrize("machine", [container_engines.OPTIONS], indirect=True),
]


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The file tree of an image."""
    return container_engines.compile_first(tmp_path_factory.mktemp("image"))


def known(machine):
    """The containers by name."""
    containers, _ = container_engines.facts(machine)
    return {each["name"]: each for each in containers.values() if each}


def test_podman_s_containers_are_known(machine, image):
    """Those of systemd's cgroups and of the cgroupfs driver, in a unit's cgroup as quadlet's are,
    below a parent that somebody chose, and in a pod."""
    podman = Podman(machine, image)
    odd = 'a "b"\\\té\U0001f600'
    podman.start("plain", f"--label=team={odd}", "--annotation=io.kabpf.policy=offered")
    podman.start("parent", "--cgroup-parent=/shop-web.slice")
    machine.run("podman", "pod", "create", "--infra=false", "--name=pod", "--label=app=web")
    podman.start("inside", "--pod=pod")
    podman.command = ("podman", "--cgroup-manager=cgroupfs")
    podman.start("cgroupfs")
    unit = ("systemd-run", "--unit=app", "--property=Delegate=yes", "--property=Type=notify")
    podman.command = (*unit, "--property=NotifyAccess=all", "podman")
    podman.start("split", "--cgroups=split", "--sdnotify=conmon")
    found = known(machine)
    assert set(found) == {"plain", "parent", "inside", "cgroupfs", "split"}
    assert {each["engine"] for each in found.values()} == {"podman"}
    assert {each["image"] for each in found.values()} == {IMAGE}
    assert found["plain"]["labels"] == {"team": odd}
    assert found["plain"]["annotations"]["io.kabpf.policy"] == "offered"
    pod = found["inside"]["pod"]
    assert (pod["namespace"], pod["name"], pod["labels"]) == ("", "pod", {"app": "web"})
    paths = {each["name"]: path for path, each in container_engines.facts(machine)[0].items()}
    assert paths["parent"].startswith("/shop.slice/shop-web.slice/libpod-")
    assert paths["split"].startswith("/system.slice/app.service/libpod-payload-")
    assert paths["cgroupfs"].startswith("/libpod_parent/libpod-")


def test_docker_s_containers_are_known(machine, image):
    """Their names, also after a change, images and labels."""
    docker = Docker(machine, image)
    docker.start("plain", "--label=team=payments")
    docker.start("former", "--label=com.docker.compose.service=web")
    machine.run("docker", "rename", "former", "renamed")
    found = known(machine)
    assert set(found) == {"plain", "renamed"}
    assert {each["engine"] for each in found.values()} == {"docker"}
    assert {each["image"] for each in found.values()} == {IMAGE}
    assert found["plain"]["labels"] == {"team": "payments"}
    assert found["renamed"]["labels"] == {"com.docker.compose.service": "web"}


def test_pods_of_containerd_are_known(machine, image):
    """A pod's name, namespace, labels and annotations, without kubelet's API."""
    Containerd(machine, image).start("web-0")
    found = known(machine)["main"]
    assert (found["engine"], found["image"]) == ("containerd", IMAGE)
    pod = found["pod"]
    assert (pod["namespace"], pod["name"], pod["labels"]["app"]) == ("shop", "web-0", "web")
    assert found["annotations"]["io.kabpf.policy"] == "offered"
    containers, engines = container_engines.facts(machine)
    assert all(pod["uid"].replace("-", "_") in path for path in containers)
    assert {"engine": "containerd", "lacks": ""} in engines
