"""Nobody leaves a policy by how they make cgroups."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import PATIENCE, end_processes, enforced, known_cgroups, options_of_new, path_of

NAME, DEPTH = "x" * 250, 20  # 5,000 bytes, more than PATH_MAX


@pytest.fixture
def long_cgroup(make_cgroup):
    """The top of a chain of cgroups, and its lowest one by a path that the kernel takes."""
    top = make_cgroup()
    descriptors = [os.open(top, os.O_RDONLY)]
    for _ in range(DEPTH):
        os.mkdir(NAME, dir_fd=descriptors[-1])
        descriptors.append(os.open(NAME, os.O_RDONLY, dir_fd=descriptors[-1]))
    yield top, Path(f"/proc/{os.getpid()}/fd/{descriptors[-1]}")
    end_processes(top)
    while len(descriptors) > 1:
        os.close(descriptors.pop())
        os.rmdir(NAME, dir_fd=descriptors[-1])
    os.close(descriptors.pop())


def test_cgroup_with_a_long_path_stays_covered(
    long_cgroup, peer, kabpfctl, run_kabpfctl, write_policy
):
    """Also by the policies of later applies, and `enforce` holds; doctor looks there, too."""
    top, lowest = long_cgroup
    for idle in (61, 62):
        write_policy("a.yaml", enforced(idle, path_of(top)))
        kabpfctl("apply")
        assert options_of_new(peer, lowest)["idle"] == idle
    _, address = peer().listener()
    client = peer(lowest)
    number = client.connection(address)
    client.set_option(number, "idle", 7)
    assert client.options(number)["idle"] == 62
    doctor = run_kabpfctl("doctor").stdout
    assert "neighbours" in doctor
    assert "skipped" not in doctor


def test_cgroup_out_of_reach_stays_covered(make_cgroup, peer, kabpfctl, write_policy):
    """What can't be opened is not taken for gone, as where descriptors are at their limit."""
    cgroup = make_cgroup("a/b/c/d/e")
    write_policy("a.yaml", enforced(61, path_of(make_cgroup())))
    kabpfctl("apply")
    id = os.stat(cgroup).st_ino
    assert id in known_cgroups()
    main = "import sys; from kabpf.cli import main; sys.exit(main(['apply']))"
    for most in range(11, 20):
        bound = ["prlimit", f"--nofile={most}", sys.executable, "-P", "-c", main]
        subprocess.run(bound, check=False, capture_output=True)
        assert id in known_cgroups(), most
    assert options_of_new(peer, cgroup)["idle"] == 61


STORM = """
import os, sys
os.chdir(sys.argv[1])
number = 0
while True:
    number += 1
    os.mkdir(f"g{number}")
    os.mkdir(f"g{number}/below")
    os.rmdir(f"g{number}/below")
    os.rmdir(f"g{number}")
"""


@pytest.fixture
def storm(make_cgroup):
    """Begins processes that make and remove cgroups below one as fast as they can."""
    running = []

    def begin(cgroup, count):
        for number in range(count):
            own = make_cgroup(f"{cgroup.name}/{number}")
            command = [sys.executable, "-c", STORM, own]
            running.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

    yield begin
    for each in running:
        each.kill()
        each.wait()


@pytest.mark.parametrize("asks", [False, True], ids=["names", "globs"])
def test_cgroups_that_come_and_go_keep_no_apply(
    make_cgroup, storm, peer, kabpfctl, write_policy, asks
):
    """It ends with status 0, in a bounded time, and its policies are active; what is stale goes."""
    top = make_cgroup("top")
    quiet = [make_cgroup(f"top/quiet/{number}") for number in range(100)][-1]
    storm(top, 2)
    globs = [f"{path_of(top)}/*/g*"] if asks else []
    for idle in range(61, 67):
        write_policy("a.yaml", enforced(idle, path_of(top), *globs))
        begin = time.monotonic()
        kabpfctl("apply")
        assert time.monotonic() - begin < 10 * PATIENCE
        assert options_of_new(peer, quiet)["idle"] == idle
