"""The life of kabpfd: start, reload, stop, and a sudden end."""

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from harness import (
    BIN,
    PATIENCE,
    PINS,
    UNTOUCHED,
    WATCHED,
    known_cgroups,
    options_of_new,
    path_of,
    pinned,
    wait_until,
)

PINNED = 26  # maps and links of kabpf.bpf.c

WAITING = "policy files have changed; try: systemctl reload kabpf"

IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}


def _policy(cgroup, idle):
    return f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: {idle}}}\n'


def _pinned_ids():
    """The ids of the pinned objects."""
    return {name: one["id"] for kind in ("map", "link") for name, one in pinned(kind).items()}


def _attached(root):
    """The programs of kabpf attached to the root cgroup, by id."""
    command = ["bpftool", "--json", "cgroup", "show", str(root)]
    programs = json.loads(subprocess.check_output(command) or b"[]")
    return [one["id"] for one in programs if one["name"] == "kabpf_sockops"]


@pytest.mark.core
def test_start_activates_the_policy_before_ready(cgroup, write_policy, kabpfd, peer):
    """When kabpfd says READY, new connections are covered and open ones have been."""
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    write_policy("a.yaml", _policy(cgroup, 61))
    kabpfd()
    assert client.options(number) == IDLE_61
    assert options_of_new(peer, cgroup) == IDLE_61


@pytest.mark.loaders
def test_stop_unloads_every_policy(cgroup, write_policy, kabpfd, peer):
    """After SIGTERM no pin is left, new connections are untouched, and sockets keep theirs."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    assert daemon.stop() == 0
    assert not PINS.exists()
    assert client.options(number) == IDLE_61
    assert options_of_new(peer, cgroup) == UNTOUCHED


@pytest.mark.loaders
def test_unload_takes_a_policy_out_of_the_kernel(cgroup, write_policy, kabpfctl, peer):
    """`kabpfd --unload` unloads what is active, also where nothing is, and keeps the policy
    files."""
    write_policy("a.yaml", _policy(cgroup, 61))
    kabpfctl("apply")
    for _ in range(2):
        subprocess.run([BIN / "kabpfd", "--unload"], check=True)
        assert not PINS.exists()
        assert options_of_new(peer, cgroup) == UNTOUCHED
    kabpfctl("apply")
    assert options_of_new(peer, cgroup) == IDLE_61


@pytest.mark.core
def test_killed_daemon_misses_no_connection_and_is_adopted(
    make_cgroup, cgroup, write_policy, kabpfd, peer, tmp_path
):
    """With kabpfd killed and started again in the middle of many connections each has its options,
    and the pinned objects are the same before and after."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    before = _pinned_ids()
    root = Path(str(cgroup).removesuffix(path_of(cgroup)))
    attached = _attached(root)
    running = tmp_path / "running"
    running.touch()
    server, client = peer(), peer(cgroup)
    listener, address = server.listener()
    client.tell("connect_while", address, str(running))
    server.tell("accept_many", listener, 50)
    assert server.answer() is None
    daemon.stop(signal.SIGKILL)
    server.tell("accept_many", listener, 50)
    assert server.answer() is None
    kabpfd()
    server.tell("accept_many", listener, 50)
    assert server.answer() is None
    running.unlink()
    (seen,) = client.answer()
    assert json.loads(seen) == IDLE_61
    assert _pinned_ids() == before
    assert len(before) == PINNED
    assert _attached(root) == attached


@pytest.mark.loaders
def test_daemon_that_restarts_leaves_everything_active(cgroup, write_policy, kabpfd, peer):
    """SIGUSR2 ends kabpfd and nothing else; the next one adopts what it finds."""
    write_policy("a.yaml", _policy(cgroup, 61))
    before = kabpfd(), _pinned_ids()
    assert before[0].stop(signal.SIGUSR2) == 0
    assert options_of_new(peer, cgroup) == IDLE_61
    kabpfd()
    assert _pinned_ids() == before[1]


@pytest.mark.core
def test_file_that_changes_just_after_a_reload_is_applied(cgroup, write_policy, kabpfd, peer):
    """A path unit is blind while the reload that it asked for runs: kabpfd looks once more."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    daemon.reload()
    file.write_text(_policy(cgroup, 62))
    daemon.wait_for("READY=1")
    assert options_of_new(peer, cgroup)["idle"] == 62


@pytest.mark.loaders
def test_watchdog_hears_of_a_daemon_whose_programs_are_alive(cgroup, write_policy, kabpfd):
    """Where systemd watches, kabpfd says within half the timeout that all is well, and what is
    active."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd(*WATCHED)
    for _ in range(3):
        message = daemon.wait_for("WATCHDOG=1")
        assert "STATUS=1 policy active, covering 1 of " in message


def test_files_that_wait_are_told_at_the_next_look(cgroup, write_policy, kabpfd, peer):
    """As those that a link leads to, of which no event tells; they are told once, and wait."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd(*WATCHED)
    file.write_text(_policy(cgroup, 62))
    for _ in range(2):
        assert "WATCHDOG=1" in daemon.wait_for(WAITING)
    assert options_of_new(peer, cgroup) == IDLE_61
    assert WAITING not in daemon.reload()
    assert WAITING not in daemon.wait_for("WATCHDOG=1")
    assert options_of_new(peer, cgroup)["idle"] == 62
    daemon.stop()
    assert daemon.process.stderr.read().count(WAITING) == 1


@pytest.mark.parametrize(
    "damage",
    [
        ["bpftool", "link", "detach", "pinned", str(PINS / "kabpf_sockops")],
        ["rm", str(PINS / "kabpf_cgroup_mkdir")],
        ["rm", "-r", str(PINS)],
    ],
    ids=["link detached", "pin removed", "all pins removed"],
)
def test_damage_is_repaired_before_the_next_word_to_the_watchdog(
    cgroup, write_policy, kabpfd, peer, damage
):
    """What was detached or unpinned by others is loaded anew by kabpfd under a watchdog."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd(*WATCHED)
    daemon.wait_for("WATCHDOG=1")
    subprocess.run(damage, check=True)
    daemon.wait_for("WATCHDOG=1")  # perhaps said before
    daemon.wait_for("WATCHDOG=1")
    assert options_of_new(peer, cgroup) == IDLE_61
    assert len(_pinned_ids()) == PINNED


def test_watchdog_hears_nothing_while_damage_stays(cgroup, write_policy, kabpfd):
    """Where the damage can't be repaired kabpfd says why, and leaves the rest to systemd."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd(*WATCHED)
    subprocess.run(["rm", "-r", PINS], check=True)
    mount = ["mount", "-o", "remount,bind,ro", "/sys/fs/bpf"]
    subprocess.run(mount, check=True)
    try:
        daemon.reload()
        for _ in range(3):
            message = daemon.wait_for("STATUS=")
            assert "WATCHDOG=1" not in message
            assert "no policy is active; errors: 1" in message
    finally:
        subprocess.run([*mount[:2], "remount,bind,rw", mount[3]], check=True)
    daemon.wait_for("WATCHDOG=1")
    assert len(_pinned_ids()) == PINNED


@pytest.mark.parametrize("reloaded", [True, False])
def test_damage_beside_a_bad_file_is_repaired_with_the_last_good_policy(
    cgroup, write_policy, kabpfd, peer, reloaded
):
    """What was active is active again; the file is still complained of, or waits for a reload."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd(*WATCHED)
    file.write_text("keepalive: {idle: never}\n")
    if reloaded:
        daemon.reload()
    subprocess.run(["rm", "-r", PINS], check=True)
    stays = f"errors: 1, and the last good policy stays active: {file}"
    complaint = stays if reloaded else WAITING
    wait_until(lambda: len(_pinned_ids()) == PINNED, "the repair")
    # Some were perhaps said before.
    assert any(complaint in daemon.wait_for("WATCHDOG=1") for _ in range(10))
    assert len(_pinned_ids()) == PINNED
    assert options_of_new(peer, cgroup) == IDLE_61


def test_reload_applies_changed_files(cgroup, write_policy, kabpfd, peer):
    """SIGHUP activates changed files, for open connections as well."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    file.write_text(_policy(cgroup, 62))
    daemon.reload()
    assert client.options(number)["idle"] == 62
    file.unlink()
    daemon.reload()
    assert options_of_new(peer, cgroup) == UNTOUCHED


@pytest.mark.loaders
def test_status_line_counts_the_policies_of_the_files(cgroup, write_policy, kabpfd):
    """Of a policy that is gone, what the kernel remembers for open sockets does not count."""
    file = write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    assert daemon.reload().startswith("1 policy active, covering 1 of ")
    file.unlink()
    assert daemon.reload().startswith("0 policies active, covering 0 of ")


@pytest.mark.loaders
def test_reload_with_a_bad_file_keeps_the_last_good_policy(cgroup, write_policy, kabpfd, peer):
    """A bad file changes nothing; the log names it, and a later good reload works."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    bad = write_policy("b.service.yaml", "keepalive: {idle: never}\n")
    status = daemon.reload()
    assert f"errors: 1, and the last good policy stays active: {bad}:1: keepalive" in status
    assert options_of_new(peer, cgroup) == IDLE_61
    bad.unlink()
    write_policy("a.yaml", _policy(cgroup, 62))
    daemon.reload()
    assert options_of_new(peer, cgroup)["idle"] == 62
    daemon.stop()
    log = daemon.process.stderr.read()
    assert f"{bad}:1: keepalive.idle: never, expected a time in seconds" in log


def test_many_bad_files_do_not_hide_that_the_daemon_is_ready(cgroup, write_policy, kabpfd):
    """systemd drops a message of more than 4096 bytes: the status line is cut."""
    daemon = kabpfd()
    for number in range(60):
        write_policy(f"{number:02}-a-name-that-is-not-short.service.yaml", "keepalive: maybe\n")
    status = daemon.reload()
    assert "errors: 60, and the last good policy stays active: " in status
    assert len(status.encode()) < 4000


def test_bad_file_is_still_named_after_another_reconcile(cgroup, write_policy, kabpfd, kabpfctl):
    """What the daemon does beside a bad file does not make status take the file for applied."""
    write_policy("a.yaml", 'select: [{unit: "kabpf-test-?.service"}]\nkeepalive: {idle: 61}\n')
    daemon = kabpfd()
    bad = write_policy("b.service.yaml", "keepalive: {idle: never}\n")
    daemon.reload()
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_for("errors: 1")

    def covered():
        (policy,) = json.loads(kabpfctl("status", "--json").stdout)["policies"]
        return policy["cgroups"] == 1

    (cgroup / "kabpf-test-é.service").mkdir()  # of which a daemon that failed reconciles all
    wait_until(covered, "the new cgroup")
    assert f"{bad}:1: keepalive.idle: never" in kabpfctl("status").stdout


def test_start_with_a_bad_file_keeps_what_a_killed_daemon_left(cgroup, write_policy, kabpfd, peer):
    """A bad file at the start takes nothing away from what is active."""
    write_policy("a.yaml", _policy(cgroup, 61))
    kabpfd().stop(signal.SIGKILL)
    write_policy("b.service.yaml", "keepalive: {idle: never}\n")
    kabpfd()
    assert options_of_new(peer, cgroup) == IDLE_61


def test_second_daemon_is_refused(kabpfd):
    """Only one kabpfd runs; the second says which process has it."""
    daemon = kabpfd()
    done = subprocess.run([BIN / "kabpfd"], capture_output=True, text=True, timeout=20 * PATIENCE)
    assert done.returncode == 1
    assert done.stderr == f"kabpfd: kabpfd is already running as process {daemon.process.pid}\n"


def test_directory_of_the_daemon_is_open_whatever_the_umask(kabpfd):
    """What tells others of active policies can be read, also where kabpfd itself made its
    directory under a closed umask."""
    script = f"mount -t tmpfs tmpfs /run; umask 077; exec {BIN}/kabpfd"
    daemon = kabpfd("unshare", "--mount", "sh", "-c", script)
    made = os.stat(f"/proc/{daemon.process.pid}/root/run/kabpf")
    assert stat.S_IMODE(made.st_mode) == 0o755


def test_lock_of_the_daemon_is_closed_to_others(kabpfd, kabpfctl):
    """Nobody but root can open the file whose lock says that kabpfd runs."""
    kabpfd()
    command = ["setpriv", "--reuid=65534", "--clear-groups", "cat", "/run/kabpf/kabpfd.lock"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Permission denied" in done.stderr


def test_births_that_wait_at_a_bad_reload_are_resolved(make_cgroup, write_policy, kabpfd, peer):
    """A reload that fails does not keep kabpfd from cgroups born before it."""
    top = make_cgroup()
    write_policy(
        "a.yaml", f'select: [{{cgroup: "{path_of(top)}/w-?*"}}]\nkeepalive: {{idle: 61}}\n'
    )
    daemon = kabpfd()
    daemon.process.send_signal(signal.SIGSTOP)
    client = peer(make_cgroup("w-é"))
    _, address = peer().listener()
    number = client.connection(address)
    write_policy("b.service.yaml", "keepalive: {idle: never}\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.process.send_signal(signal.SIGCONT)
    assert client.wait_for_keepalive(number) is not None


def test_files_that_were_not_reloaded_stay_out_of_force(make_cgroup, write_policy, kabpfd, peer):
    """However many cgroups are born, an edited file waits for the reload."""
    top = make_cgroup()
    text = f'select: [{{cgroup: "{path_of(top)}/w-?*"}}]\nkeepalive: {{idle: 61}}\n'
    file = write_policy("a.yaml", text)
    daemon = kabpfd()
    file.write_text(text.replace("61", "62"))
    daemon.process.send_signal(signal.SIGSTOP)
    for number in range(1200):
        (top / f"w-é{number}").mkdir()
    client = peer(top / "w-é0")
    _, address = peer().listener()
    number = client.connection(address)
    daemon.process.send_signal(signal.SIGCONT)
    assert client.wait_for_keepalive(number) is not None
    assert client.options(number) == IDLE_61


def test_daemon_survives_processes_that_come_and_go(make_cgroup, write_policy, kabpfd):
    """Short-lived cgroups whose processes enter network namespaces of their own and end neither
    stop kabpfd nor leave entries in its map."""
    top = make_cgroup()
    write_policy(
        "a.yaml", f'select: [{{cgroup: "{path_of(top)}/w-?*"}}]\nkeepalive: {{idle: 61}}\n'
    )
    daemon = kabpfd()
    script = f"""
        for i in $(seq 150); do
            mkdir {top}/w-é$$-$i
            sh -c 'echo 0 > {top}/w-é'$$-$i'/cgroup.procs; exec unshare --net true'
            rmdir {top}/w-é$$-$i
        done
    """
    loops = [subprocess.Popen(["sh", "-c", script]) for _ in range(3)]
    assert [loop.wait() for loop in loops] == [0, 0, 0]
    write_policy("b.yaml", f'select: [{{cgroup: "{path_of(top)}/last"}}]\nkeepalive: on\n')
    daemon.reload()  # by now it has seen every birth
    assert daemon.process.poll() is None
    root = Path(str(top).removesuffix(path_of(top)))
    ids = {os.stat(directory).st_ino for directory, _, _ in os.walk(root)}
    wait_until(lambda: not known_cgroups() - ids, "the kernel to release the cgroups")


def test_daemon_sleeps_at_rest(cgroup, write_policy, kabpfd):
    """With nothing to do, kabpfd is not woken once in two seconds."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    status = Path(f"/proc/{daemon.process.pid}/status")

    def switches():
        return [line for line in status.read_text().splitlines() if "ctxt_switches" in line]

    time.sleep(0.5)  # it goes to sleep after READY
    before = switches()
    time.sleep(2)
    assert switches() == before


def test_daemon_follows_what_kabpfctl_attaches(
    make_cgroup, cgroup, write_policy, kabpfd, kabpfctl, peer
):
    """What kabpfctl changes while kabpfd runs is active, globs included, until kabpfd stops."""
    daemon = kabpfd()
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    assert options_of_new(peer, cgroup) == IDLE_61
    top = path_of(make_cgroup())
    write_policy("g.yaml", f'select: [{{cgroup: "{top}/w-?*"}}]\nkeepalive: {{idle: 62}}\n')
    kabpfctl("apply")
    client = peer(make_cgroup("w-é"))
    _, address = peer().listener()
    assert client.wait_for_keepalive(client.connection(address)) is not None
    assert daemon.stop() == 0
    assert options_of_new(peer, cgroup) == UNTOUCHED


@pytest.mark.loaders
def test_daemon_lets_go_when_kabpfctl_detaches_all(cgroup, kabpfd, kabpfctl, peer):
    """After `detach --all` no policy is active, also with kabpfd running; a reload brings the
    policy files back."""
    daemon = kabpfd()
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--persist")
    kabpfctl("detach", "--all")
    assert not PINS.exists()
    assert options_of_new(peer, cgroup) == UNTOUCHED
    assert os.path.exists(f"/proc/{daemon.process.pid}")
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62)
    assert options_of_new(peer, cgroup)["idle"] == 62
    daemon.reload()
    assert options_of_new(peer, cgroup)["idle"] == 62


def test_reload_attaches_again_what_was_detached_by_force(cgroup, write_policy, kabpfd, peer):
    """Where somebody detached the link, a reload activates the policy again."""
    write_policy("a.yaml", _policy(cgroup, 61))
    daemon = kabpfd()
    command = ["bpftool", "link", "detach", "pinned", str(PINS / "kabpf_sockops")]
    subprocess.run(command, check=True)
    assert options_of_new(peer, cgroup) == UNTOUCHED
    daemon.reload()
    assert options_of_new(peer, cgroup) == IDLE_61


def test_removed_directory_of_the_daemon_is_made_anew(cgroup, write_policy, kabpfd, kabpfctl, peer):
    """Whoever removes /run/kabpf hides kabpfd until its next word to the watchdog; then status
    finds it, and it follows commands again."""
    daemon = kabpfd(*WATCHED)
    for path in Path("/run/kabpf").iterdir():  # a mount of the tests
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def found():
        return json.loads(kabpfctl("status", "--json").stdout)["daemon"]

    wait_until(lambda: found() == daemon.process.pid, "the lock")
    top = path_of(cgroup)
    write_policy("a.yaml", f'select: [{{cgroup: "{top}/w-?*"}}]\nkeepalive: {{idle: 61}}\n')
    kabpfctl("apply")
    daemon.wait_for("1 policy active")
    (cgroup / "w-é").mkdir()
    client = peer(cgroup / "w-é")
    _, address = peer().listener()
    assert client.wait_for_keepalive(client.connection(address)) is not None


def test_removed_socket_of_hooks_is_made_anew(write_policy, kabpfd):
    """With the directory, at the next word to the watchdog."""
    write_policy("a.yaml", "select: [{container: {name: web}}]\nkeepalive: on\n")
    kabpfd(*WATCHED)
    for path in Path("/run/kabpf").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_until(Path("/run/kabpf/containers.socket").is_socket, "the socket")
