"""Commands that may open too few files."""

import subprocess

from harness import BIN, options_of_new

COMMANDS = ("apply", "status", "run --idle 62 true")


def test_data_plane_is_not_taken_for_damaged(cgroup, policy, own_objects, peer):
    """Under each limit a command does its work, or says what limit it met; nothing is loaded anew,
    and all stays active."""
    policy("{idle: 61}")
    programs = own_objects()["prog"]
    refused = set()
    for command in COMMANDS:
        for limit in range(5, 15):
            script = f"ulimit -n {limit}; exec {BIN}/kabpfctl {command}"
            done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
            assert done.returncode in (0, 1), (command, limit, done.stderr)
            if done.returncode:
                assert "Too many open files" in done.stderr, (command, limit, done.stderr)
                refused.add((command, limit))
    assert own_objects()["prog"] == programs
    assert options_of_new(peer, cgroup)["idle"] == 61
    assert {command for command, _ in refused} == {*COMMANDS}
