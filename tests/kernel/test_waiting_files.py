"""Policy files that have changed wait for a reload, whatever other commands do meanwhile."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from harness import BIN, UNTOUCHED, changed, options_of_new, path_of

KEPT = Path("/var/lib/kabpf/last-good.json")
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


@pytest.fixture(params=["daemon", "no daemon"])
def beside(request, write_policy, kabpfctl, cgroup, kabpfd):
    """Policy files, active; with kabpfd, and without it."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd() if request.param == "daemon" else None
    if not daemon:
        kabpfctl("apply")
    return file, daemon


def _settle(daemon):
    """Have the daemon follow what commands have done, to the end."""
    if daemon:
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.wait_for("STATUS=")


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("persist", [False, True])
def test_attach_and_detach_leave_files_waiting(
    beside, cgroup, other_cgroup, write_policy, kabpfctl, peer, wrong, persist
):
    """They change the cgroup that they name; changed, added and removed files wait, wrong ones
    too, and become active with the next apply alone."""
    file, daemon = beside
    gone = write_policy("gone.yaml", _policy(cgroup.parent, 63))
    kabpfctl("apply")
    file.write_text(NEVER if wrong else _policy(cgroup, 62))
    gone.unlink()
    write_policy("new.yaml", _policy(other_cgroup.parent, 64))
    flags = ["--persist"] if persist else []
    for _ in range(2):
        kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 5, *flags)
        _settle(daemon)
        assert options_of_new(peer, other_cgroup)["idle"] == 5
        assert options_of_new(peer, cgroup)["idle"] == 61
        assert options_of_new(peer, cgroup.parent)["idle"] == 63
        files = json.loads(kabpfctl("status", "--json").stdout)["policy_files"]
        assert not files["applied"] and bool(files["errors"]) == wrong
    kabpfctl("detach", "--cgroup", other_cgroup)
    _settle(daemon)
    assert options_of_new(peer, other_cgroup)["idle"] == 63
    assert options_of_new(peer, cgroup)["idle"] == 61
    file.write_text(_policy(cgroup, 62))
    kabpfctl("apply")
    assert options_of_new(peer, cgroup)["idle"] == 62
    assert options_of_new(peer, other_cgroup)["idle"] == 64


def test_attach_for_good_beside_files_that_wait_is_kept(
    cgroup, other_cgroup, write_policy, kabpfd, kabpfctl, peer
):
    """A kabpfd that starts beside wrong files makes it active with what was applied before."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    kabpfctl("apply")
    file.write_text(NEVER)
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 5, "--persist")
    subprocess.run([BIN / "kabpfd", "--unload"], check=True)
    assert options_of_new(peer, other_cgroup) == UNTOUCHED
    kabpfd()
    assert options_of_new(peer, other_cgroup)["idle"] == 5
    assert options_of_new(peer, cgroup) == IDLE_61


def test_command_that_loads_kabpf_applies_the_files(
    cgroup, other_cgroup, write_policy, kabpfctl, peer
):
    """Where nothing is active no file waits: attach loads kabpf with the files as they are."""
    write_policy("a.yaml", _policy(cgroup, 61))
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 5)
    assert options_of_new(peer, cgroup) == IDLE_61
    assert changed(kabpfctl) == {}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("command", ["attach", "run"])
def test_command_that_loads_kabpf_beside_wrong_files_works(
    cgroup, other_cgroup, write_policy, kabpfctl, peer, kept, command
):
    """It says what is wrong; what was applied last is active, or nothing but its own policy."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    if kept:
        kabpfctl("apply")
        subprocess.run([BIN / "kabpfd", "--unload"], check=True)
    file.write_text(NEVER)
    words = [BIN / "kabpfctl", "attach", "--cgroup", other_cgroup, "--idle", "5"]
    if command == "run":
        words = [BIN / "kabpfctl", "run", "--idle", "5", "true"]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert options_of_new(peer, cgroup) == (IDLE_61 if kept else UNTOUCHED)
        if command == "attach":
            assert options_of_new(peer, other_cgroup)["idle"] == 5
    file.write_text(_policy(cgroup, 62))
    kabpfctl("apply")
    assert options_of_new(peer, cgroup)["idle"] == 62


def test_nobody_knows_what_was_applied(cgroup, other_cgroup, write_policy, kabpfctl, peer):
    """Where what is active can't be read any more, a changed file keeps attach from working, and
    an apply helps."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    kabpfctl("apply")
    KEPT.unlink()
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 5)
    file.write_text(_policy(cgroup, 62))
    KEPT.unlink()
    refused = kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 6, status=1).stderr
    assert "policy files have changed" in refused and "kabpfctl apply" in refused
    assert options_of_new(peer, other_cgroup)["idle"] == 5
    assert options_of_new(peer, cgroup) == IDLE_61
    kabpfctl("apply")
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 6)
    assert options_of_new(peer, other_cgroup)["idle"] == 6


def test_defaults_that_wait_wait(cgroup, write_policy, kabpfctl, peer):
    """What an attach leaves out comes from the defaults that are active."""
    file = write_policy("a.yaml", "defaults: {interval: 7}\n")
    kabpfctl("apply")
    file.write_text("defaults: {interval: 8}\n")
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 5)
    assert options_of_new(peer, cgroup)["interval"] == 7
    kabpfctl("apply")
    assert options_of_new(peer, cgroup)["interval"] == 8
