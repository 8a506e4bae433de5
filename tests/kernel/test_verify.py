"""kabpfctl verify: the exit status for scripts and monitoring."""

from __future__ import annotations

import json
import subprocess

import pytest
from harness import PINS, path_of

from kabpf.kernel import dataplane
from kabpf.kernel.abi import CTotals


@pytest.fixture
def covered(policy):
    """A policy file that is active."""
    return policy("{idle: 61}", "mode: enforce")


def test_what_is_active_is_verified(covered, kabpfctl):
    """Status 0, and a line for people."""
    assert kabpfctl("verify").stdout.startswith("1 policy active, covering 1 of ")
    done = json.loads(kabpfctl("verify", "--json").stdout)
    assert done == {"version": 1, "verified": True, "reasons": []}


def test_nothing_to_do_is_verified(kabpfctl):
    """Without policies nothing is missing, kabpf loaded or not."""
    kabpfctl("detach", "--all")
    assert kabpfctl("verify").stdout == "there are no policies; kabpf is not loaded\n"
    kabpfctl("apply")
    assert kabpfctl("verify").stdout.startswith("0 policies active, covering 0 of ")


def test_cgroups_that_were_not_recorded_are_a_reason_until_an_apply(kabpfctl):
    """A full look records what there is room for; the count of the past stays in status."""
    kabpfctl("apply")
    with dataplane.open_map(PINS, "kabpf_totals") as totals:
        found = CTotals.from_buffer_copy(totals.look_up(bytes(4)))
        found.unrecorded = 4
        totals.update(bytes(4), bytes(found))
    assert kabpfctl("verify", status=1).stdout.startswith("4 new cgroups not recorded")
    kabpfctl("apply")
    kabpfctl("verify")
    assert json.loads(kabpfctl("status", "--json").stdout)["totals"]["unrecorded"] == 4


def test_changed_files_are_not_verified(covered, kabpfctl):
    """What waits for an apply is said, and what is wrong with file and line."""
    covered.write_text(covered.read_text().replace("61", "62"))
    reason = "the policy files changed since the last apply; try: kabpfctl apply"
    assert kabpfctl("verify", status=1).stdout == f"{reason}\n"
    covered.write_text("select: [{cgroup: /a}]\nkeepalive: maybe\n")
    (found,) = json.loads(kabpfctl("verify", "--json", status=1).stdout)["reasons"]
    assert found.startswith(f"{covered}:2: keepalive: maybe")


def test_kabpf_that_is_not_loaded_is_not_verified(covered, kabpfctl):
    """Policies without the data plane are not active."""
    kabpfctl("detach", "--all")
    assert kabpfctl("verify", status=1).stdout == "kabpf is not loaded; try: kabpfctl apply\n"


@pytest.mark.parametrize("pin", ["kabpf_sockops", "kabpf_setsockopt"])
def test_severed_link_is_not_verified(covered, kabpfctl, pin):
    """Whoever detaches a program of ours is seen, and apply mends it."""
    subprocess.run(["bpftool", "link", "detach", "pinned", PINS / pin], check=True)
    assert pin in kabpfctl("verify", status=1).stdout
    kabpfctl("apply")
    kabpfctl("verify")


@pytest.mark.parametrize("gone", [None, "kabpf_removed"])
def test_another_version_is_not_verified(cgroup, write_policy, version, kabpfctl, gone):
    """Of another layout, which may lack a map of this one: a line says so, and what to do."""
    text = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: 61}}\n'
    write_policy("a.yaml", text)
    version("relaid").kabpfctl("apply")
    if gone:
        (PINS / gone).unlink()
    line = f"{PINS} comes from another version of kabpf; try: kabpfctl apply\n"
    assert kabpfctl("verify", status=1).stdout == line
    assert kabpfctl("status", status=1).stderr == f"kabpfctl: {line}"
    kabpfctl("apply")
    kabpfctl("verify")


def test_missing_map_is_not_verified(covered, kabpfctl):
    """A pin that is gone is a reason."""
    (PINS / "kabpf_networks").unlink()
    assert "kabpf_networks is missing" in kabpfctl("verify", status=1).stdout
