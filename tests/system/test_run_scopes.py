"""kabpfctl run where systemd runs: in transient scopes."""

import re

import pytest
from harness import UNTOUCHED, wait_until
from machine import COVERED

RUN = ("kabpfctl", "run", "--idle", "61", "--interval", "7", "--probes", "5")
LOOK = "env | sort | grep -v '^_='; pwd; umask; cut -d ' ' -f 5-8 /proc/$$/stat"


def _runs(machine):
    """The scopes and the drop-ins that there are."""
    units = machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "kabpf-run-*")
    files = machine.root / "run/kabpf/transient.d"
    return units.splitlines() + (list(files.iterdir()) if files.exists() else [])


leaves_nothing = pytest.mark.leaves_nothing


@pytest.fixture(params=[pytest.param("daemon", marks=leaves_nothing), "no daemon"])
def with_or_without_daemon(request, machine):
    """kabpf.service runs, or does not."""
    if request.param == "no daemon":
        machine.run("systemctl", "stop", "kabpf.service")


def test_command_runs_in_a_scope_and_leaves_nothing(machine, inside, with_or_without_daemon):
    """Both sides of its connections are covered; scope, file and policy go with its end."""
    app = inside(*RUN, "--")
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2
    unit, file = _runs(machine)
    assert re.match(r"kabpf-run-\d+-[0-9a-f]{8}\.scope +loaded active running kabpfctl run", unit)
    shown = machine.run("kabpfctl", "status", "--wide")
    assert file.name in shown
    app.end()
    wait_until(lambda: not _runs(machine), "the end of scope and drop-in")
    wait_until(lambda: ".scope" not in machine.run("kabpfctl", "status"), "the end of the policy")


@leaves_nothing
def test_command_finds_what_it_would_find_without_run(machine):
    """systemd changes neither the environment of the command nor anything else of it."""
    direct = machine.run("sh", "-c", LOOK)
    assert machine.run(*RUN, "sh", "-c", LOOK) == direct


@leaves_nothing
def test_exit_status_is_the_commands(machine):
    """Also of one that can't be started."""
    statuses = {("sh", "-c", "exit 7"): 7, ("none",): 127, ("/etc/passwd",): 126}
    assert {each: machine.attempt(*RUN, "--", *each).returncode for each in statuses} == statuses
    wait_until(lambda: not _runs(machine), "the end of every scope")


def test_killed_at_any_step_leaves_nothing(machine, with_or_without_daemon):
    """Killed between any two steps, run leaves nothing that does not go by itself."""
    machine.run("kabpfctl", "apply")
    traced = machine.attempt("env", "KABPF_FAULT=trace", *RUN, "true").stderr
    steps = re.findall(r"^fault point: (.*)", traced, re.MULTILINE)
    assert len(steps) > 3
    for step in steps:
        assert machine.attempt("env", f"KABPF_FAULT={step}", *RUN, "true").returncode == -9, step
        wait_until(lambda: not _runs(machine), f"the end of what was there at: {step}")
        wait_until(lambda: "kabpf-run" not in machine.run("kabpfctl", "status"), "its end")


@leaves_nothing
def test_environment_for_python_is_the_commands(machine):
    """It does not reach kabpfctl, which is a program of Python's."""
    given = ("PYTHONHOME=/none", "PYTHONPATH=/none", "PYTHONWARNINGS=none")
    shown = machine.run("env", *given, *RUN, "env").splitlines()
    assert {*given} <= {*shown}


@leaves_nothing
def test_scope_is_in_the_slice_of_the_caller(machine, inside):
    """The limits of the caller's slice hold for the command as well."""
    machine.run("systemctl", "start", "caller.slice")
    enter = "echo $$ >/sys/fs/cgroup/caller.slice/cgroup.procs"
    app = inside("sh", "-c", f'{enter} && exec {" ".join(RUN)} -- "$@"', "sh")
    app.pair()
    (unit, _) = _runs(machine)
    assert machine.show(unit.split()[0], "Slice") == "caller.slice"
    app.end()
    wait_until(lambda: not _runs(machine), "the end of scope and drop-in")


def test_many_commands_at_once(machine, with_or_without_daemon):
    """A dozen that start together all end well, and leave nothing."""
    script = f'for i in $(seq 12); do {" ".join(RUN)} true & jobs="$jobs $!"; done; '
    machine.run("sh", "-c", script + "for job in $jobs; do wait $job || exit 1; done")
    wait_until(lambda: not _runs(machine), "the end of every scope", 30)


@leaves_nothing
def test_inner_run_has_its_own_policy(machine, inside):
    """A run within a run is below the outer one; nothing is left of both."""
    app = inside("kabpfctl", "run", "--off", *RUN, "--")
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2
    (scope,) = machine.cgroups.glob("**/kabpf-run-*.scope")
    (inner,) = scope.glob("kabpf-run-*")
    assert (inner / "cgroup.procs").read_text()
    app.end()
    wait_until(lambda: not _runs(machine), "the end of both")


def test_off_is_stronger_than_a_unit(machine, inside):
    """With --off nothing is set, though a policy names every scope."""
    machine.drop_in("all.yaml", 'select: [{unit: "*.scope"}]\nkeepalive: {idle: 99}\n')
    app = inside("kabpfctl", "run", "--off", "--")
    assert [app.options(end) for end in app.pair()] == [UNTOUCHED] * 2


@pytest.fixture
def alice(machine):
    """The command that makes one of a user whose manager runs; users may ask kabpf-request."""
    machine.run("sh", "-c", "id alice || useradd --create-home alice")
    uid = machine.run("id", "--user", "alice")
    machine.run("systemctl", "start", f"user@{uid}.service", "kabpf-request.socket")
    return ("runuser", "--user=alice", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}")


@leaves_nothing
@pytest.mark.parametrize("where", ["in their manager", "in a session"])
def test_user_runs_a_command(machine, inside, alice, where):
    """A user's scope is covered as root's, be the user logged in or a service; and all of it
    goes."""
    service = ("systemd-run", "--user", "--quiet", "--pipe", "--", "env")
    app = inside(*alice, *(service if where == "in their manager" else ()), *RUN, "--")
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2
    app.end()
    drop_ins = machine.root / "run/kabpf/policy.d"
    wait_until(lambda: not list(drop_ins.glob("user-*")), "the end of the drop-in")


def test_user_without_the_service_is_told(machine, alice):
    """Where users may ask nothing, run says what to do, and the command does not begin."""
    machine.run("systemctl", "stop", "kabpf-request.socket")
    done = machine.attempt(*alice, "systemd-run", "--user", "--quiet", "--pipe", *RUN, "echo")
    assert (done.returncode, done.stdout) == (1, "")
    assert "ask an administrator to run: systemctl enable kabpf-request.socket;" in done.stderr


@leaves_nothing
def test_user_without_a_manager_is_told(machine):
    """As of `su - bob` or cron: what starts one is named, and the command does not begin."""
    machine.run("useradd", "--create-home", "bob")
    uid = machine.run("id", "--user", "bob")
    done = machine.attempt("runuser", "--user=bob", "--", "kabpfctl", "run", "echo")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"ask an administrator to run: loginctl enable-linger {uid}\n" in done.stderr


@leaves_nothing
def test_root_of_a_user_namespace_is_told(machine, alice):
    """Who is root there alone is nobody here."""
    done = machine.attempt(*alice, "unshare", "--map-root-user", "kabpfctl", "run", "echo")
    assert (done.returncode, done.stdout) == (1, "")
    refused = "kabpfctl: open /run/kabpf/kabpfd.lock: Permission denied; it needs root\n"
    assert done.stderr == refused
