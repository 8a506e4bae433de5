"""Inside a cgroup namespace, as in a container."""

import os
import subprocess

import pytest
from harness import BIN, UNTOUCHED, cgroup_root, entering

INSIDE = """
set -e
mount --make-rprivate /
umount {mount}
mount -t cgroup2 none {mount}
mount -t tmpfs tmpfs /run/kabpf
mount -t bpf bpf /sys/fs/bpf
"""


@pytest.fixture
def in_container(make_cgroup):
    """Runs a shell script as root of a cgroup namespace whose root is the cgroup `container`."""
    container = make_cgroup("container")

    def run(script):
        preamble = INSIDE.format(mount=cgroup_root())
        return subprocess.run(
            ["unshare", "--cgroup", "--mount", "sh", "-c", preamble + script],
            preexec_fn=entering(container),
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    return container, run


def test_root_is_the_namespaces(in_container, make_cgroup, peer):
    """Paths are relative to the namespace's root, new cgroups of it are covered, and nothing
    outside is, not even a unit of the same name."""
    container, run = in_container
    (container / "app").mkdir()
    outside = make_cgroup("outside.service")
    done = run(
        "mkdir -p /run/kabpf/policy.d\n"
        "echo 'keepalive: {idle: 62}' > /run/kabpf/policy.d/outside.service.yaml\n"
        f"kabpfctl attach --cgroup {cgroup_root()}/app --idle 61\n"
        # A process has to keep the namespace and its pins while the test looks.
        "sleep 60 > /dev/null 2>&1 &\n"
    )
    assert done.returncode == 0, done.stderr
    assert "/app: keepalive on, idle 61s" in done.stdout
    _, address = peer().listener()
    later = make_cgroup("container/app/later")
    inside_unit = make_cgroup("container/outside.service")
    found = []
    for name in (container / "app", later, inside_unit, outside, make_cgroup("outside2")):
        client = peer(name)
        found.append(client.options(client.connection(address))["idle"])
    assert found == [61, 61, 62, 7200, 7200]


def test_pins_go_with_the_namespace(in_container, peer):
    """When the container's BPF file system is gone, so is the policy."""
    container, run = in_container
    done = run(f"kabpfctl attach --cgroup {cgroup_root()} --idle 61")
    assert done.returncode == 0, done.stderr
    _, address = peer().listener()
    client = peer(container)
    assert client.options(client.connection(address)) == UNTOUCHED
