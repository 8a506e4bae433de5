"""kabpfctl run inside of units and sessions: it stays there, with all that holds there."""

import pytest
from container_engines import OPTIONS
from harness import cgroup_root, wait_until
from machine import COVERED, PROGRAMS_INSIDE, Inside

RUN = ("kabpfctl", "run", "--idle", "61", "--interval", "7", "--probes", "5", "--")
APP = "/sys/fs/cgroup/system.slice/app.service"
SERVICE = ("systemd-run", "--pipe", "--quiet", "--unit=app.service")
PEER = f"python3 {PROGRAMS_INSIDE}/peer.py"
AWAY = "in another cgroup, which this policy does not cover"


@pytest.fixture(params=["daemon", "no daemon"])
def with_or_without_daemon(request, machine):
    """kabpf.service runs, or does not."""
    if request.param == "no daemon":
        machine.run("systemctl", "stop", "kabpf.service")


def _drop_ins(machine):
    directories = (machine.root / "run/kabpf" / name for name in ("transient.d", "policy.d"))
    return [file for each in directories if each.exists() for file in each.iterdir()]


def _in_app(machine, *command):
    """A peer started in the cgroup of app.service, by no word of systemd's."""
    enter = f"echo $$ >{APP}/cgroup.procs && exec {' '.join(command)} {PEER}"
    return Inside(machine, "sh", "-c", f"{enter} #")


def test_service_keeps_its_process(machine, inside, with_or_without_daemon):
    """The command is below the service's cgroup; a stop ends its children, and nothing is left."""
    script = f"setsid sleep 1000 <&- >&- & exec {PEER} #"
    for delegate in ("no", "yes"):
        app = inside(*SERVICE, f"--property=Delegate={delegate}", *RUN, "sh", "-c", script)
        assert [app.options(end) for end in app.pair()] == [COVERED] * 2
        service = machine.cgroup("app.service")
        (run,) = service.glob("kabpf-run-*")
        assert len((run / "cgroup.procs").read_text().split()) == 2
        assert int(machine.show("app.service", "MainPID"))
        machine.run("systemctl", "stop", "app.service")
        wait_until(lambda service=service: not service.exists(), "the end of the cgroup")
        if delegate == "no":  # nobody is left to tell where neither service nor daemon is
            machine.run("kabpfctl", "apply")
        wait_until(lambda: not _drop_ins(machine), "the end of the drop-in")


def test_several_commands_in_one_service_have_each_its_policy(machine, inside):
    """Each is in a cgroup of its own; the next one removes those that have ended."""
    inside(*SERVICE, "--").listener()
    apps = [_in_app(machine, "kabpfctl", "run", "--idle", str(idle), "--") for idle in (61, 62)]
    try:
        assert [app.options(app.pair()[0])["idle"] for app in apps] == [61, 62]
    finally:
        for app in apps:
            app.end()
    wait_until(lambda: not _drop_ins(machine), "the end of the drop-ins")
    last = _in_app(machine, *RUN)
    last.pair()
    assert len(list(machine.cgroup("app.service").glob("kabpf-run-*"))) == 1
    last.end()


def test_limits_of_the_service_hold_on(machine):
    """As that of whom it may connect to, which the kernel knows by cgroup, as memory and tasks."""
    connect = "import socket; socket.create_connection(('127.0.0.2', 1), 1)"
    denied = (*SERVICE, "--wait", "--collect", "--property=IPAddressDeny=127.0.0.2")
    for starter, error in (
        ((*SERVICE, "--wait", "--collect"), "ConnectionRefused"),
        (denied, "Timeout"),
    ):
        done = machine.attempt(*starter, *RUN, "python3", "-c", connect)
        assert f"{error}Error" in done.stderr


def test_service_whose_cgroup_is_closed_is_refused(machine):
    """The unit is named, and the policy file to write; the command does not begin."""
    for why, closed in (
        ("User=nobody", "its cgroup"),
        ("ProtectControlGroups=yes", "its cgroup"),
        ("ProtectSystem=strict", "/run/kabpf"),
    ):
        service = (*SERVICE, "--wait", "--collect", f"--property={why}")
        done = machine.attempt(*service, *RUN, "echo", "begun")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.endswith(
            f"kabpfctl: run inside of app.service: {closed} can't be written to; write a policy for"
            " the unit: /etc/kabpf/policy.d/app.service.yaml\n"
        )


def test_users_service_keeps_its_process(machine, inside):
    """Also of a user's manager; nothing is left."""
    machine.run("useradd", "--create-home", "alice")
    uid = machine.run("id", "--user", "alice")
    machine.run("systemctl", "start", f"user@{uid}.service", "kabpf-request.socket")
    alice = ("runuser", "--user=alice", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}")
    app = inside(*alice, SERVICE[0], "--user", *SERVICE[1:], *RUN)
    assert [app.options(end) for end in app.pair()] == [COVERED] * 2
    manager = machine.cgroup(f"user@{uid}.service")
    (run,) = manager.glob("**/app.service/kabpf-run-*")
    assert run.relative_to(cgroup_root())
    app.end()
    wait_until(lambda: not _drop_ins(machine), "the end of the drop-in")


SESSION = ("systemd-run", "--pipe", "--quiet", "--wait", "-pPAMName=runuser-l", "-pUser=root")
ELSEWHERE = ("systemd-run", "--pipe", "--quiet", "--wait")
LOOK = "cat /proc/self/cgroup"
BOX = "--quiet --network=none --pids-limit=0 --privileged --cgroupns=host --rootfs /:O"


STAYS = (
    (f"setpriv --reuid alice {LOOK}", "everywhere"),
    (f"runuser -u alice -- {LOOK}", "everywhere"),
    (f"runuser alice -c '{LOOK}'", "everywhere"),
    (f"su alice -c '{LOOK}'", "in a session"),
    (f"su - alice -c '{LOOK}'", "in a session"),
    (f"runuser -l alice -c '{LOOK}'", "in a session"),
    (f"runuser - alice -c '{LOOK}'", "in a session"),
    (f"systemd-run --pipe --quiet --wait {LOOK}", "nowhere"),
    (f"systemd-run --scope --quiet {LOOK}", "nowhere"),
    (f"podman run {BOX} {LOOK}", "nowhere"),
    (f"podman run --cgroups=disabled {BOX} {LOOK}", "everywhere"),
    (f"run0 --pipe {LOOK}", "nowhere"),
)


@pytest.mark.parametrize("machine", [OPTIONS], indirect=True, ids=["keyrings"])
def test_command_stays_or_is_told_of(machine, suite):
    """The manual's table: what leaves the cgroup is told of, and nothing else."""
    machine.run("useradd", "--create-home", "alice")
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/var/lib/containers")
    # systemd 252 has no run0.
    for command, stays in STAYS[:-1] if suite == "bookworm" else STAYS:
        for where, starter in (("in a session", SESSION), ("in a service", ELSEWHERE)):
            done = machine.attempt(*starter, "sh", "-c", f"kabpfctl run --idle 61 {command}")
            assert done.returncode == 0, (command, where, done.stderr)
            is_in = stays in ("everywhere", where)
            assert ("kabpf-run-" in done.stdout) == is_in, (command, where, done.stdout)
            assert (AWAY in done.stderr) != is_in, (command, where, done.stderr)
