"""Containers as podman and crun start them, in cgroups and network namespaces of their own."""

import pytest
from harness import wait_until
from machine import COVERED, KEEPALIVE, PROGRAMS_INSIDE

# The machine's own files serve as the image. Podman's store can't be on an overlay; crun needs no
# right that the machine may lack, if it neither counts processes nor keeps devices away.
PODMAN = (
    *("podman", "run", "--interactive", "--rm", "--name=app", "--network=none"),
    *("--privileged", "--pids-limit=0", f"--volume={PROGRAMS_INSIDE}:{PROGRAMS_INSIDE}:ro"),
    *("--rootfs", "/:O"),
)


@pytest.fixture
def container(machine, inside):
    """Starts a peer in a container."""
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/var/lib/containers")
    return lambda: inside(*PODMAN)


@pytest.fixture
def scope(machine, inside):
    """Starts a peer where Kubernetes' CRI-O would, with a cgroup of its own below the scope's."""
    join = 'd=/sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup | tail -n1)/container; mkdir "$d"; '
    enter = f'{join} echo 0 > "$d/cgroup.procs"; exec unshare --net --cgroup "$@"'
    return lambda: inside(
        *("systemd-run", "--quiet", "--scope", "--slice=kubepods-besteffort-pod1.slice"),
        *("--property=Delegate=yes", "--unit=crio-0123", "sh", "-c", enter, "sh"),
        *("sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
    )


def test_container_is_covered_from_its_first_connection(machine, container):
    """A policy for everything below machine.slice needs nobody to look."""
    machine.drop_in("box.yaml", f"select: [{{cgroup: /machine.slice/**}}]\n{KEEPALIVE}")
    app = container()
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2


def test_container_named_by_a_glob_is_covered(machine, container):
    """kabpfd covers a new container whose scope a glob names, and what it had opened before."""
    glob = '"/machine.slice/libpod-*.scope"'
    machine.drop_in("box.yaml", f"select: [{{cgroup: {glob}}}]\n{KEEPALIVE}")
    app = container()
    for end in app.pair():
        wait_until(lambda end=end: app.options(end) == COVERED, "the options")


def test_running_container_is_covered(machine, container):
    """A policy reaches the connections that a container has open already."""
    app = container()
    ends = app.pair()
    machine.drop_in("box.yaml", f"select: [{{cgroup: /machine.slice/**}}]\n{KEEPALIVE}")
    assert [app.options(end) for end in ends] == [COVERED] * 2


def test_pod_is_covered_from_its_first_connection(machine, scope):
    """So is a pod's container in Kubernetes' tree of slices, which does not exist before."""
    machine.drop_in("pods.yaml", f"select: [{{cgroup: /kubepods.slice/**}}]\n{KEEPALIVE}")
    app = scope()
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2


def test_policy_holds_in_a_cgroup_that_its_user_has_closed(machine, inside):
    """A user who takes everybody's rights from a cgroup hides nothing below it from kabpfd."""
    machine.run("mkdir", "-p", "/sys/fs/cgroup/closed/inner")
    machine.run("chown", "-R", "nobody", "/sys/fs/cgroup/closed")
    machine.run("chmod", "700", "/sys/fs/cgroup/closed")
    enter = 'echo 0 > /sys/fs/cgroup/closed/inner/cgroup.procs; exec "$@"'
    app = inside("sh", "-c", enter, "sh")
    ends = app.pair()
    machine.drop_in("closed.yaml", f"select: [{{cgroup: /closed/inner}}]\n{KEEPALIVE}")
    assert [app.options(end) for end in ends] == [COVERED] * 2
    machine.run("systemctl", "reload", "kabpf.service")
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2
