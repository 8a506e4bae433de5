"""What each command prints with --json, as schema/output/ says."""

import argparse

import output_schema
from harness import path_of

from kabpf import cli

POLICY = (
    "{{select: [{{cgroup: '{}'}}], mode: enforce, direction: out, log: sockets,"
    " keepalive: {{idle: 5s..61s, probes: 5}},"
    " destinations: [{{to: '::1', ports: [1], idle: 7}}, {{to: 10.0.0.0/8, keepalive: off}}]}}"
)
ELSEWHERE = {"monitor"}  # test_monitor.py holds each of its lines against the schema


def test_every_command_prints_what_its_schema_says(
    cgroup, other_cgroup, write_policy, run_kabpfctl, peer
):
    """Also where there are a range, destinations, a second policy, and sockets of each kind."""
    (commands,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    left = {name for name, each in commands.choices.items() if "--json" in each.format_help()}

    def printed(command, *arguments, status=0):
        left.discard(command)
        done = run_kabpfctl(command, *map(str, arguments), "--json")
        assert status in (None, done.returncode), done.stderr
        return output_schema.held(command, done.stdout)

    file = write_policy("a.yaml", POLICY.format(path_of(cgroup)))
    write_policy("b.yaml", f"{{select: [{{cgroup: '{path_of(cgroup)}*'}}], keepalive: off}}")
    assert printed("plan")["changes"]["policies"] == 2
    assert not printed("verify", status=1)["verified"]
    assert printed("apply")["covered"] >= 1
    assert printed("verify")["verified"]
    _, address = peer(cgroup).listener()
    peer(cgroup).connection(address)
    assert printed("status")["policies"]
    assert printed("sockets", "--cgroup", cgroup)["sockets"]
    assert printed("audit", "--with", file, status=None)["units"]
    assert printed("suggest", status=None)["policies"] is not None
    assert printed("explain", cgroup)["cgroups"][0]["weaker"]
    assert printed("check")["files"]
    assert printed("check", file)["files"][0]["policies"] == ["a"]
    assert printed("presets")["presets"]
    assert printed("attach", "--cgroup", other_cgroup, "--idle", 61)["updated"] == 0
    assert printed("detach", "--cgroup", other_cgroup)["removed"]
    assert printed("doctor", status=None)["findings"]
    assert printed("import", status=None)["searched"]
    assert left == ELSEWHERE
