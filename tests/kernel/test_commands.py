"""kabpfctl as an administrator uses it, with no daemon running."""

import json
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from harness import BIN, PINS, UNTOUCHED, WITHOUT_SYS_ADMIN, changed, options_of_new, path_of

from kabpf.kernel import dataplane
from kabpf.kernel.abi import CTotals
from kabpf.runtime.last_good import time_text

RUNTIME, PERSISTENT = Path("/run/kabpf/policy.d"), Path("/etc/kabpf/policy.d")
IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}


def _files(directory):
    return sorted(os.listdir(directory)) if directory.exists() else []


@pytest.mark.core
def test_attach_writes_a_runtime_drop_in(cgroup, kabpfctl):
    """attach leaves a policy file in /run that says what was asked for, and nothing in /etc."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", "1m", "--user-timeout", "off")
    (name,) = _files(RUNTIME)
    assert (RUNTIME / name).read_text() == (
        "# Written by kabpfctl attach; kabpfctl detach removes it.\n"
        f"select: [{{cgroup: {path_of(cgroup)}}}]\n"
        "keepalive: {idle: 1m, user_timeout: off}\n"
    )
    assert _files(PERSISTENT) == []


def test_attaching_again_changes_no_socket(cgroup, kabpfctl, peer):
    """attach says how many open sockets it changed itself, not what an earlier one did."""
    _, address = peer().listener()
    peer(cgroup).connection(address)
    first = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61).stdout
    again = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61).stdout
    assert first.endswith("; 1 open socket updated\n")
    assert again.endswith("; 0 open sockets updated\n")


@pytest.mark.loaders
def test_attach_without_options_turns_keepalive_on(cgroup, kabpfctl, peer):
    """Without options the times are the system's."""
    kabpfctl("attach", "--cgroup", cgroup)
    assert options_of_new(peer, cgroup) == UNTOUCHED | {"keepalive": 1}


@pytest.mark.loaders
def test_attach_uses_the_defaults_of_the_policy_files(cgroup, kabpfctl, peer):
    """What attach leaves out comes from `defaults`."""
    Path("/etc/kabpf/policy.yaml").write_text("defaults: {interval: 11, probes: 5}\n")
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--user-timeout", "auto")
    assert options_of_new(peer, cgroup) == {
        "keepalive": 1, "idle": 61, "interval": 11, "probes": 5, "user_timeout": 116_000,
    }  # fmt: skip


def test_attach_accepts_a_cgroup_path(cgroup, kabpfctl, peer):
    """A path below the cgroup2 root does as well as the directory."""
    kabpfctl("attach", "--cgroup", path_of(cgroup), "--idle", 61)
    assert options_of_new(peer, cgroup) == IDLE_61


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_attach_minds_no_umask(cgroup, kabpfctl, umask):
    """What attach writes is root's alone to change, and everybody's to check."""
    attach = [BIN / "kabpfctl", "attach", "--persist", "--cgroup", cgroup, "--idle", "61"]
    subprocess.run(attach, check=True, umask=umask, capture_output=True)
    written = [PERSISTENT.parent, PERSISTENT, *PERSISTENT.iterdir()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [0o755, 0o755, 0o644]


@pytest.mark.loaders
def test_attach_works_for_any_name_that_can_be_printed(make_cgroup, kabpfctl, peer):
    """Quotes, backslashes and characters beyond 16 bits reach the drop-in as they are."""
    odd = make_cgroup('a "b\\x2d\N{SNOWMAN}\N{GRINNING FACE}')
    kabpfctl("attach", "--cgroup", odd, "--idle", 61)
    assert options_of_new(peer, odd) == IDLE_61


@pytest.mark.loaders
def test_attach_with_persist_writes_below_etc(cgroup, kabpfctl, peer):
    """With --persist the drop-in is in /etc, and is changed and detached like the other."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--persist")
    (name,) = _files(PERSISTENT)
    assert _files(RUNTIME) == []
    assert options_of_new(peer, cgroup) == IDLE_61
    done = kabpfctl("attach", "--cgroup", cgroup, "--idle", 63, status=1)
    assert done.stderr == (
        f"kabpfctl: {path_of(cgroup)} is already attached by {PERSISTENT / name};"
        " change it with --persist\n"
    )
    kabpfctl("detach", "--cgroup", cgroup)
    assert _files(PERSISTENT) == _files(RUNTIME) == []
    assert options_of_new(peer, cgroup) == UNTOUCHED


@pytest.mark.loaders
def test_attach_under_a_policy_that_is_read_later_is_refused(cgroup, kabpfctl, peer, write_policy):
    """attach does not pretend to be active where another file wins, and takes its own back."""
    text = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: 61}}\n'
    file = write_policy("zzz.yaml", text)
    kabpfctl("apply")
    done = kabpfctl("attach", "--cgroup", cgroup, "--idle", 62, status=1)
    assert done.stderr == (
        f"kabpfctl: {path_of(cgroup)} has its policy from {file}:1, which is stronger;"
        " change that one instead\n"
    )
    assert _files(RUNTIME) == []
    assert options_of_new(peer, cgroup) == IDLE_61


@pytest.mark.core
@pytest.mark.loaders
def test_detach_leaves_the_other_cgroups_covered(cgroup, other_cgroup, kabpfctl, peer):
    """detach takes one cgroup's policy; sockets keep what they have."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 61)
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    kabpfctl("detach", "--cgroup", cgroup)
    assert client.options(number) == IDLE_61
    assert options_of_new(peer, cgroup) == UNTOUCHED
    assert options_of_new(peer, other_cgroup) == IDLE_61


@pytest.mark.loaders
def test_detach_of_a_cgroup_that_is_gone_works(make_cgroup, kabpfctl):
    """The drop-in of a cgroup that no longer exists can be detached."""
    gone = make_cgroup("gone")
    kabpfctl("attach", "--cgroup", gone, "--idle", 61)
    gone.rmdir()
    kabpfctl("detach", "--cgroup", gone)
    assert _files(RUNTIME) == []


@pytest.mark.loaders
def test_detach_of_a_cgroup_that_is_not_attached_is_refused(cgroup, kabpfctl):
    """detach says so where there is nothing to detach."""
    done = kabpfctl("detach", "--cgroup", cgroup, status=1)
    assert done.stderr == (f"kabpfctl: {path_of(cgroup)} is not attached\n")


@pytest.mark.core
@pytest.mark.loaders
def test_detach_all_leaves_nothing_in_the_kernel(cgroup, kabpfctl, peer):
    """detach --all removes every attached drop-in and every pin, and keeps policy files."""
    policy = Path("/etc/kabpf/policy.yaml")
    policy.write_text(
        f'policies: {{p: {{select: [{{cgroup: "{path_of(cgroup)}"}}], keepalive: {{idle: 62}}}}}}\n'
    )
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    kabpfctl("detach", "--all")
    assert not PINS.exists()
    assert _files(RUNTIME) == []
    assert policy.exists()
    assert options_of_new(peer, cgroup) == UNTOUCHED
    kabpfctl("apply")
    assert options_of_new(peer, cgroup)["idle"] == 62


@pytest.mark.core
@pytest.mark.loaders
def test_apply_says_what_it_changed(cgroup, kabpfctl, write_policy):
    """apply counts policies and covered cgroups, and as JSON what it wrote; a second one writes
    nothing."""
    write_policy("a.yaml", f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: on\n')
    assert changed(kabpfctl)["policies"] == 1
    assert kabpfctl("apply").stdout.startswith("1 policy active, covering 1 of ")
    assert changed(kabpfctl) == {}


@pytest.mark.core
def test_plan_shows_and_changes_nothing(cgroup, kabpfctl, write_policy, peer):
    """plan tells each covered cgroup's policy, options and source, and what apply would write."""
    file = write_policy(
        "a.yaml", f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: 61}}\n'
    )
    shown = json.loads(kabpfctl("plan", "--json").stdout)
    assert shown["cgroups"] == [
        {
            "cgroup": path_of(cgroup),
            "container": None,
            "policy": "a",
            "source": f"{file}:1",
            "mode": "fill", "direction": "both", "loopback": True, "existing": True,
            "destinations": False, "log": "off",
            "options": {
                "keepalive": True, "idle_s": 61, "interval_s": None, "probes": None,
                "user_timeout_ms": None, "jitter_percent": 0, "syn_retries": None,
                "connect_timeout_ms": None,
            },
        }
    ]  # fmt: skip
    assert shown["changes"]["policies"] == 1
    heads, row, changes = kabpfctl("plan").stdout.splitlines()
    assert heads.split() == ["UNIT", "POLICY", "OPTIONS"]
    assert row.split() == [path_of(cgroup), "a", "61s/-/-"]
    heads, row, _ = kabpfctl("plan", "--wide").stdout.splitlines()
    assert heads.replace("USER TIMEOUT", "USER-TIMEOUT").split() == [
        "CGROUP", "POLICY", "MODE", "IDLE", "INTERVAL", "PROBES", "USER-TIMEOUT", "OTHER", "SOURCE",
    ]  # fmt: skip
    assert row.split() == [
        path_of(cgroup), "a", "fill", "61s", "-", "-", "-", "-", f"{file}:1",
    ]  # fmt: skip
    assert changes.startswith("apply would change: 1 policy, ")
    assert not PINS.exists()
    assert options_of_new(peer, cgroup) == UNTOUCHED


@pytest.mark.core
def test_status_counts_what_happened(cgroup, kabpfctl, peer):
    """status counts new and updated sockets, and once each of those that keep their own."""
    server, client = peer(), peer(cgroup)
    _, address = server.listener()
    before = client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--probes", 4)
    client.connection(address)
    chosen = client.open_socket(2)
    for name in ("idle", "probes"):
        client.set_option(chosen, name, 15)
    client.connect(chosen, address)
    client.listener()
    status = json.loads(kabpfctl("status", "--json").stdout)
    assert client.options(before) == IDLE_61 | {"probes": 4}
    (policy,) = status["policies"]
    assert policy["cgroups"] == 1
    assert policy["counters"] == {
        "established": 2, "listening": 1, "updated": 1, "kept": 1, "ignored": 0,
        "clamped": 0, "turned_off": 0, "timed_out": 0, "timed_out_by_keepalive": 0, "failed": {},
    }  # fmt: skip
    assert status["policy_files"] == {
        "policies": 1, "errors": [], "wrong_since": None, "applied": True,
    }  # fmt: skip


def test_status_counts_what_was_lost(kabpfctl):
    """The totals have the names in JSON that kabpfctl(1) gives them."""
    kabpfctl("apply")
    with dataplane.open_map(PINS, "kabpf_totals") as totals:
        found = CTotals.from_buffer_copy(totals.look_up(bytes(4)))
        found.events_dropped, found.unrecorded = 3, 4
        totals.update(bytes(4), bytes(found))
    status = json.loads(kabpfctl("status", "--json").stdout)
    assert status["totals"] == {"events_dropped": 3, "unrecorded": 4}
    assert status["not_recorded"]["cgroups"] == 4
    assert "  4 new cgroups not recorded since 20" in kabpfctl("status").stdout
    kabpfctl("apply")
    status = json.loads(kabpfctl("status", "--json").stdout)
    assert status["not_recorded"]["cgroups"] == 0
    assert "not recorded" not in kabpfctl("status").stdout


@pytest.mark.core
def test_status_names_wrong_and_unapplied_files(cgroup, kabpfctl, write_policy):
    """status says whether the files as they are now are active, and what is wrong with them."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    file = write_policy("a.service.yaml", "keepalive: on\n")
    assert "policy files: changed since the last apply" in kabpfctl("status").stdout
    file.write_text("keepalive: maybe\n")
    shown = kabpfctl("status").stdout
    assert f"{file}:1: keepalive: maybe, expected off, on, or options" in shown
    assert f"wrong since {time_text(file.stat().st_ctime)}; the last good ones stay" in shown
    kabpfctl("detach", "--all")
    shown = kabpfctl("status").stdout
    assert f"wrong since {time_text(file.stat().st_ctime)}; no policy is active" in shown
    file.write_text("keepalive: on\n")
    assert "policy files: changed since the last apply" in kabpfctl("status").stdout


@pytest.mark.loaders
def test_commands_at_the_same_time_end_in_what_the_files_say(make_cgroup, kabpfctl, peer):
    """Attaching many cgroups at once, each in a process of its own, covers each of them."""
    names = [make_cgroup(f"c{number}") for number in range(12)]
    statuses = []

    def attach(name):
        command = [BIN / "kabpfctl", "attach", "--cgroup", name, "--idle", "61"]
        statuses.append(subprocess.run(command, capture_output=True).returncode)

    threads = [threading.Thread(target=attach, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 12
    assert changed(kabpfctl) == {}
    assert [options_of_new(peer, name) for name in names] == [IDLE_61] * 12


@pytest.mark.core
def test_explain_takes_a_path_a_unit_or_a_process(make_cgroup, kabpfctl, write_policy, peer):
    """Whichever way a cgroup is meant, explain says which file decides, and whether it is
    active."""
    service = make_cgroup("kabpf-explained.service")
    process = peer(service).process.pid
    file = write_policy("kabpf-explained.service.yaml", "keepalive: {idle: 61}\n")
    for what in (service, path_of(service), "kabpf-explained.service", process):
        shown = kabpfctl("explain", what).stdout.splitlines()
        assert shown[:4] == [
            path_of(service),
            f"  policy kabpf-explained.service, {file}:1",
            f"  because unit kabpf-explained.service ({file}:1) names it",
            "  changed since the last apply; try: kabpfctl apply",
        ]
        assert shown[-1].split() == ["idle", "61s", f"{file}:1"]
    kabpfctl("apply")
    assert "changed since" not in kabpfctl("explain", service).stdout
    file.write_text("keepalive: {idle: 62}\n")
    assert "changed since the last apply" in kabpfctl("explain", service).stdout


def test_explain_of_what_does_not_exist_is_refused(kabpfctl, cgroup):
    """A process, path or unit that is not there is said to be missing."""
    for what, message in (
        ("4194304", "process 4194304: No such file or directory, expected a running process"),
        ("9" * 5000, "File name too long, expected a running process"),
        ("/no/such", "cgroup /no/such: No such file or directory, expected a directory below"),
        (
            "no.such*",
            "no cgroup is named no.such*, expected a running unit or container, a cgroup path or a"
            " PID",
        ),
        ("no.such", "no.such: no such unit, running or installed; try: systemctl list-units --all"),
    ):
        assert message in kabpfctl("explain", what, status=1).stderr


def test_explain_tells_of_a_unit_in_a_container(make_cgroup, kabpfctl, write_policy, peer):
    """A systemd in a container has a scope of its own above its units; both selectors that are
    named reach such a unit."""
    payload = make_cgroup("box.scope/payload")
    make_cgroup("box.scope/payload/init.scope")
    app = make_cgroup("box.scope/payload/system.slice/kabpf-app.service")
    shown = kabpfctl("explain", "kabpf-app").stdout.splitlines()
    selectors = {"unit": "kabpf-app.service", "cgroup": path_of(app)}
    assert [line.strip() for line in shown[1:5]] == [
        f"cgroup {path_of(app)}",
        f"of the systemd in container {path_of(payload)}",
        f"unit: {selectors['unit']} selects it, and others of that name",
        f"cgroup: {selectors['cgroup']} selects it alone",
    ]
    (found,) = json.loads(kabpfctl("explain", "--json", app).stdout)["cgroups"]
    assert found["container"] == path_of(payload)
    for kind, text in selectors.items():
        file = write_policy("a.yaml", f'select: [{{{kind}: "{text}"}}]\nkeepalive: {{idle: 61}}\n')
        kabpfctl("apply")
        assert options_of_new(peer, app)["idle"] == 61
        file.unlink()
        kabpfctl("apply")
    assert options_of_new(peer, app) == UNTOUCHED


def test_status_says_what_is_watched(cgroup, kabpfctl, write_policy):
    """status tells that setsockopt(2) is seen, and connections before the SYN, while a policy needs
    it."""
    select = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\n'
    file = write_policy("a.yaml", f"{select}keepalive: {{idle: 1..9, syn_retries: 3}}\n")
    kabpfctl("apply")
    shown = kabpfctl("status").stdout
    assert "  setsockopt(2) is watched" in shown
    assert "  connect(2) is watched" in shown
    watched = {"setsockopt": True, "syn_retries": True}
    assert json.loads(kabpfctl("status", "--json").stdout)["watched"] == watched
    file.write_text(f"{select}keepalive: {{idle: 9}}\n")
    kabpfctl("apply")
    watched = dict.fromkeys(watched, False)
    assert json.loads(kabpfctl("status", "--json").stdout)["watched"] == watched


def test_status_says_what_the_kernel_refused(cgroup, kabpfctl, peer):
    """What the last apply could not do is said until an apply does it."""
    peer(cgroup).listener()
    kabpfctl("apply")
    attach = [BIN / "kabpfctl", "attach", "--cgroup", cgroup, "--idle", "61"]
    refused = subprocess.run([*WITHOUT_SYS_ADMIN, *attach], capture_output=True, text=True)
    assert (refused.returncode, "CAP_SYS_ADMIN is missing" in refused.stderr) == (1, True)
    shown = kabpfctl("status").stdout
    assert "policy files: active, except for what the kernel refused\n" in shown
    assert refused.stderr.partition(": ")[2] in shown
    kabpfctl("apply")
    assert "policy files: 1 policy active, covering 1 of " in kabpfctl("status").stdout


def test_status_and_plan_say_what_a_policy_says_beyond_the_options(cgroup, kabpfctl, write_policy):
    """Conditions, jitter and SYN retries stand in a column of their own."""
    write_policy(
        "a.yaml",
        f'select: [{{cgroup: "{path_of(cgroup)}"}}]\n'
        "keepalive: {idle: 9, jitter: 10%, syn_retries: 3}\ndirection: out\nloopback: false\n"
        "existing: false\ndestinations: [{to: 10.0.0.0/8, keepalive: off}]\n",
    )
    kabpfctl("apply")
    more = "jitter 10%, SYN retries 3, only out, no loopback, no open sockets, by destination"
    assert f"  {more}  " in kabpfctl("plan", "--wide").stdout
    assert f"  {more}  " in kabpfctl("status", "--wide").stdout
    assert f"OTHER         {more}\n" in kabpfctl("status", "a").stdout


@pytest.mark.parametrize(
    ("where", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
def test_output_that_is_lost_is_said_once(cgroup, policy, where, reason):
    """Standard output on a full disk, or closed: status 1 and one line, and what was done is."""
    policy("{idle: 61}")
    commands = [
        *("apply", "status", "status --json", "plan", "explain /", "sockets", "doctor"),
        *(f"attach --cgroup {cgroup} --idle 62", f"detach --cgroup {cgroup}", "detach --all"),
    ]
    for command in commands:
        script = f"exec {BIN}/kabpfctl {command} {where}"
        done = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, text=True)
        said = f"kabpfctl: write to standard output: {reason}\n"
        assert (command, done.returncode, done.stderr) == (command, 1, said)
    assert not PINS.exists()
