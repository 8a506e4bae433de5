"""Policy files that have changed wait for a reload, whatever other commands do meanwhile."""

import signal
import subprocess

from harness import BIN, UNTOUCHED, options_of_new, path_of

NEVER = "keepalive: {idle: never}\n"
IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}


def _policy(cgroup, idle):
    return f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: {idle}}}\n'


def test_file_that_waits_for_a_reload_waits_when_a_command_runs(
    cgroup, write_policy, kabpfd, kabpfctl, peer
):
    """`kabpfctl run` beside a daemon covers its command alone, and its end changes nothing else; a
    reload then makes the file active."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    file.write_text(_policy(cgroup, 62))
    for _ in range(2):
        subprocess.run([BIN / "kabpfctl", "run", "--idle", "5", "true"], check=True)
    daemon.wait_for("1 policy active")
    with subprocess.Popen(
        [BIN / "kabpfctl", "run", "--idle", "5", "cat"], stdin=subprocess.PIPE
    ) as command:
        daemon.wait_for("2 policies active")
        # Once more, with a policy to keep.
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.wait_for("2 policies active")
        assert options_of_new(peer, cgroup) == IDLE_61
        shown = kabpfctl("status").stdout
        assert "policy files: changed since the last apply" in shown
        command.stdin.close()
    daemon.wait_for("1 policy active")
    assert options_of_new(peer, cgroup) == IDLE_61
    assert daemon.reload().startswith("1 policy active,")
    assert options_of_new(peer, cgroup)["idle"] == 62


def test_command_runs_beside_a_bad_file(cgroup, write_policy, kabpfd, kabpfctl, peer):
    """Its policy begins and ends; the file stays named, and the last good policy active."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    bad = write_policy("b.service.yaml", NEVER)
    assert "errors: 1" in daemon.reload()
    with subprocess.Popen(
        [BIN / "kabpfctl", "run", "--idle", "5", "cat"], stdin=subprocess.PIPE
    ) as command:
        assert f"{bad}:1: " in daemon.wait_for("2 policies active")
        command.stdin.close()
    assert f"{bad}:1: " in daemon.wait_for("1 policy active")
    assert options_of_new(peer, cgroup) == IDLE_61


def test_applied_file_is_followed_also_where_another_waits(
    cgroup, other_cgroup, write_policy, kabpfd, kabpfctl, peer
):
    """What `kabpfctl apply` made active the daemon does not take back."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    daemon.process.send_signal(signal.SIGSTOP)
    file.write_text(_policy(cgroup, 62))
    kabpfctl("apply")
    write_policy("b.yaml", _policy(other_cgroup, 63))
    daemon.process.send_signal(signal.SIGCONT)
    daemon.wait_for("active, covering")
    assert options_of_new(peer, cgroup)["idle"] == 62
