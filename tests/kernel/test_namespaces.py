"""Inside a cgroup namespace, as in a container."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import BIN, PROGRAMS, UNTOUCHED, cgroup_root, entering

PROGRAMS_MAX = 64  # BPF_CGROUP_MAX_PROGS in include/linux/bpf-cgroup-defs.h in the kernel

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


@pytest.mark.core
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


@pytest.mark.core
def test_kernel_agrees_with_the_golden_plans(in_container):
    """Connections of every cgroup of plans/ have the options of the policy that the case's plan
    names, whether the cgroup was there before the policies or is born after."""
    _, run = in_container
    cases = Path(__file__).parents[1] / "plans"
    done = run(f"{sys.executable} -P {PROGRAMS / 'golden.py'} {cgroup_root()} {cases}\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for case in sorted(cases.iterdir()):
        before, alone, after = found.pop(case.name)
        names = yaml.safe_load((case / "plan.yaml").read_text())
        assert (case.name, before) == (case.name, {path: names.get(path) for path in before})
        assert (case.name, alone) == (case.name, {path: before[path] for path in alone})
        assert (case.name, after) == (case.name, before)
    assert found == {}


def _neighbours(run):
    """What kabpfctl doctor says of others' programs in the container, and the errors of apply and,
    where that fails, of the daemon."""
    done = run("kabpfctl doctor --json || true\nkabpfctl apply || kabpfd\n")
    found = json.loads(done.stdout[: done.stdout.rindex("}") + 1])["findings"]
    return [
        (each["status"], each["found"])
        for each in found
        if each["check"] == "neighbours" and "neighbour (id" in each["found"]
    ], done.stderr


@pytest.mark.core
def test_program_that_keeps_ours_out_is_told(in_container, neighbour):
    """A program that somebody attached to the root without BPF_F_ALLOW_MULTI is an error."""
    container, run = in_container
    neighbour(container, ())
    ((grade, text),), refused = _neighbours(run)
    assert grade == "error"
    assert text.endswith(
        f" at {cgroup_root()} is attached without BPF_F_ALLOW_MULTI, so that the kernel refuses"
        " kabpf's (EPERM)"
    )
    for program in ("kabpfctl", "kabpfd"):
        said = refused.partition(f"{program}: attach kabpf_sockops: Operation not permitted\n")[2]
        assert said.startswith(
            f"  {text}\n    fix: have it attached with that flag; whose it is: bpftool "
        )


def test_too_many_programs_of_others_are_told(in_container, others_program):
    """The kernel has room for 64 at one hook of a cgroup: apply names the step, and doctor's reason
    and remedy below it."""
    container, run = in_container
    for _ in range(PROGRAMS_MAX):
        others_program("neighbour.bpf.c", container, "sock_ops")
    refused = run("kabpfctl apply").stderr
    assert "attach" in refused and "Argument list too long" in refused
    text = f"  sock_ops: 64 programs are attached to {cgroup_root()}, so that the kernel refuses"
    assert f"{text} kabpf's (E2BIG)\n    fix: have their owners attach fewer" in refused


@pytest.mark.parametrize("flags", [(), ("multi",)], ids=["alone", "multi"])
def test_program_of_a_cgroup_above_is_told(in_container, make_cgroup, neighbour, flags):
    """One above the namespace can't be seen but for what runs here; it may keep ours out."""
    _, run = in_container
    neighbour(make_cgroup(), flags)
    ((grade, text),), refused = _neighbours(run)
    assert grade == "warning"
    assert " of a cgroup above may keep the kernel from attaching kabpf's" in text
    assert ("Operation not permitted" in refused) == (not flags)


def test_program_above_runs_after_ours(in_container, make_cgroup, neighbour):
    """With ours active, one above the namespace has the last word, which is a warning."""
    _, run = in_container
    neighbour(make_cgroup())
    done = run("kabpfctl apply > /dev/null\nkabpfctl doctor --json")
    texts = [each["found"] for each in json.loads(done.stdout)["findings"]]
    assert any(
        text.endswith(" at a cgroup above runs after kabpf's, and may replace what kabpf's set")
        for text in texts
    )
    assert "a cgroup namespace, as in a container: only its own cgroups can have a policy" in texts
