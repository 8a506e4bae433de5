"""Each link and pin in turn is severed or removed by others: it is told, and mended."""

import subprocess

import pytest
from harness import BIN, PINS, cgroup_root, path_of, pinned

from kabpf.doctor.checks import PINNED
from kabpf.kernel.dataplane import SETSOCKOPT, SOCK_OPS
from kabpf.kernel.loading import Loader

EVERY = sorted(PINNED[Loader.LIBBPF] | {SETSOCKOPT})
DETACH = ("bpftool", "link", "detach", "pinned")
# Links to tracepoints and iterators can't be detached, only removed with their pins.
DAMAGES = {
    **{f"{pin} detached": (*DETACH, str(PINS / pin)) for pin in (SOCK_OPS, SETSOCKOPT)},
    **{f"{pin} removed": ("rm", str(PINS / pin)) for pin in EVERY},
}


@pytest.fixture
def enforced(cgroup, write_policy):
    """A policy that needs every program."""
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]"
    write_policy("a.yaml", f"{select}\nmode: enforce\nkeepalive: {{idle: 61}}\n")
    return cgroup


@pytest.fixture
def is_enforced(enforced, peer):
    """Whether a new connection has its options and keeps them, as it sees itself."""
    _, address = peer().listener()
    client = peer(enforced)

    def check():
        number = client.connection(address)
        before = client.options(number)["idle"]
        client.set_option(number, "idle", 15)
        return before == client.options(number)["idle"] == 61

    return check


def is_whole():
    """Whether all is pinned, and both links lead to the root, as bpftool sees it."""
    found = pinned("link")
    at_root = {
        name: found[name]["cgroup_id"] == cgroup_root().stat().st_ino
        for name in (SOCK_OPS, SETSOCKOPT)
        if name in found
    }
    return at_root == {SOCK_OPS: True, SETSOCKOPT: True} and {
        path.name for path in PINS.iterdir()
    } == set(EVERY)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_and_mended_by_apply(enforced, kabpfctl, is_enforced, damage):
    """status names the pin and what to do; the next apply has all active again."""
    kabpfctl("apply")
    assert is_whole()
    subprocess.run(DAMAGES[damage], check=True)
    told = kabpfctl("status", status=1).stderr
    assert damage.split()[0] in told
    assert "kabpfctl apply" in told
    kabpfctl("apply")
    assert is_whole()
    assert is_enforced()


def test_damage_is_mended_by_the_watchdog(enforced, kabpfd, is_enforced):
    """Whatever was severed or removed, kabpfd has it active again before it says that all is
    well."""
    daemon = kabpfd("env", "WATCHDOG_USEC=200000", str(BIN / "kabpfd"))
    left = []
    for name, damage in DAMAGES.items():
        subprocess.run(damage, check=True)
        daemon.forget_notifications()
        daemon.wait_for("WATCHDOG=1")  # perhaps said before
        daemon.wait_for("WATCHDOG=1")
        if not (is_whole() and is_enforced()):
            left.append(name)
    assert left == []


def test_link_that_nobody_needs_any_more_may_go(enforced, write_policy, kabpfctl):
    """A severed link of a policy that enforces no more is cleared away, and nothing is amiss."""
    kabpfctl("apply")
    select = f"select: [{{cgroup: {path_of(enforced)}}}]"
    write_policy("a.yaml", f"{select}\nkeepalive: {{idle: 61}}\n")
    subprocess.run(DAMAGES[f"{SETSOCKOPT} detached"], check=True)
    kabpfctl("apply")
    assert SETSOCKOPT not in pinned("link")
    kabpfctl("status")
