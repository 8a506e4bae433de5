"""The life of kabpf.service: start, stop, restart, crash, reload."""

import re
import subprocess
import time

import pytest
from harness import UNTOUCHED, wait_until
from machine import COVERED, KEEPALIVE, PROGRAMS_INSIDE, Inside

SECONDS = 20

# Open connections are left alone, so that one that was missed stays so.
NEW_ONLY = f"select: [{{unit: app.service}}, {{unit: db.service}}]\n{KEEPALIVE}existing: false\n"


def _options_of_new(service, inside, unit="app.service"):
    _, address = inside().listener()
    client = service(unit)
    return client.options(client.connection(address))


def _journal(machine):
    return machine.run("journalctl", "--no-pager", "--output=cat", "--unit=kabpf.service")


def _main_pid(machine):
    return machine.show("kabpf.service", "MainPID")


def _is_up(machine, *, other_than):
    shown = machine.run("systemctl", "show", "--property=ActiveState,MainPID", "kabpf.service")
    return "ActiveState=active" in shown and f"MainPID={other_than}\n" not in f"{shown}\n"


def test_starts_at_boot(machine):
    """kabpf is active after a boot, and says what is active."""
    assert machine.show("kabpf.service", "ActiveState") == "active"
    assert machine.show("kabpf.service", "StatusText").startswith("0 policies active")


def test_no_unit_fails(machine):
    """Neither at boot nor at a restart does any unit of kabpf fail."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("systemctl", "restart", "kabpf.service")
    assert "kabpf" not in machine.run("systemctl", "list-units", "--failed", "--plain")


def test_start_activates_policies(machine, service, inside):
    """`systemctl start kabpf` returns when the policy is active, for open connections as well,
    and the status line says so."""
    machine.run("systemctl", "stop", "kabpf.service")
    machine.write("/etc/kabpf/policy.d/app.service.yaml", KEEPALIVE)
    _, address = inside().listener()
    client = service("app.service")
    number = client.connection(address)
    assert client.options(number) == UNTOUCHED
    machine.run("systemctl", "start", "kabpf.service")
    assert client.options(number) == COVERED
    status = machine.show("kabpf.service", "StatusText")
    assert re.match(r"1 policy active, covering 1 of \d+", status)


def test_stop_leaves_nothing_in_the_kernel(machine, service, inside):
    """`systemctl stop kabpf` unloads every policy: no pin, program, map or link is left."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    assert machine.pins() and machine.objects()["link"]
    machine.run("systemctl", "stop", "kabpf.service")
    assert machine.pins() == []
    wait_until(lambda: not any(machine.objects().values()), "the end of kabpf's objects")
    assert _options_of_new(service, inside) == UNTOUCHED


def test_starts_again_after_a_stop(machine, service, inside):
    """Stop and start end where they began."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("systemctl", "stop", "kabpf.service")
    machine.run("systemctl", "start", "kabpf.service")
    assert _options_of_new(service, inside) == COVERED


def test_stop_of_a_failed_kabpf_unloads_every_policy(machine):
    """What a kabpfd that can't be started again had left active goes with `systemctl stop`."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.write("/run/systemd/system/kabpf.service.d/once.conf", "[Service]\nRestart=no\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "kill", "--signal=KILL", "kabpf.service")
    wait_until(lambda: machine.show("kabpf.service", "ActiveState") == "failed", "the failure")
    assert machine.pins()
    machine.run("systemctl", "stop", "kabpf.service")
    assert machine.pins() == []


def test_restart_uncovers_no_connection(machine, traffic):
    """While kabpf restarts, each new connection has its options at once, and what is in the
    kernel stays the same."""
    machine.drop_in("apps.yaml", NEW_ONLY)
    before, pid = machine.objects(), _main_pid(machine)
    with traffic() as seen:
        machine.run("systemctl", "restart", "kabpf.service")
    assert _main_pid(machine) != pid
    assert seen == [COVERED, COVERED]
    assert machine.objects() == before


def test_killed_kabpfd_is_started_again_and_adopts(machine, traffic):
    """A SIGKILL uncovers no connection; systemd starts kabpfd again, which takes over what is in
    the kernel as it is."""
    machine.drop_in("apps.yaml", NEW_ONLY)
    before, pid = machine.objects(), _main_pid(machine)
    with traffic() as seen:
        machine.run("systemctl", "kill", "--signal=KILL", "kabpf.service")
        wait_until(lambda: _is_up(machine, other_than=pid), "kabpfd's restart")
    assert seen == [COVERED, COVERED]
    assert machine.objects() == before


@pytest.mark.parametrize("verb", ["daemon-reload", "daemon-reexec"])
def test_systemd_reload_changes_nothing(machine, traffic, verb):
    """systemd's own reload and restart leave the policy active and kabpfd running."""
    machine.drop_in("apps.yaml", NEW_ONLY)
    before, pid = machine.objects(), _main_pid(machine)
    with traffic() as seen:
        machine.run("systemctl", verb)
    assert seen == [COVERED, COVERED]
    assert _main_pid(machine) == pid
    assert machine.objects() == before


def test_reload_with_a_bad_file_fails_and_keeps_the_last_good_policy(machine, service, inside):
    """`systemctl reload` fails, the status line names the file, and the policy stays active;
    with the file gone the next reload works."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.write("/etc/kabpf/policy.d/bad.service.yaml", "keepalive: {idle: never}\n")
    assert machine.attempt("systemctl", "reload", "kabpf.service").returncode != 0
    assert "bad.service.yaml:1: keepalive.idle: never" in machine.show(
        "kabpf.service", "StatusText"
    )
    assert machine.show("kabpf.service", "ActiveState") == "active"
    assert _options_of_new(service, inside) == COVERED
    machine.run("rm", "/etc/kabpf/policy.d/bad.service.yaml")
    machine.run("systemctl", "reload", "kabpf.service")
    assert machine.show("kabpf.service", "StatusText").startswith("1 policy active")


@pytest.fixture
def quick_watchdog(machine):
    """kabpf.service with a watchdog that waits two seconds instead of minutes."""
    conf = "[Service]\nWatchdogSec=2s\n"
    machine.write("/run/systemd/system/kabpf.service.d/watchdog.conf", conf)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "kabpf.service")


def test_watchdog_restarts_a_kabpfd_that_hangs(machine, quick_watchdog):
    """A kabpfd that does nothing any more is killed and started again; what is active stays."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    before, pid = machine.objects(), _main_pid(machine)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "kabpf.service")
    wait_until(lambda: _is_up(machine, other_than=pid), "kabpfd's restart", 20)
    assert machine.objects() == before


def test_watchdog_does_not_restart_a_kabpfd_that_works(machine, quick_watchdog):
    """kabpfd feeds its watchdog; three times its limit pass without a restart."""
    pid = _main_pid(machine)
    stamp = machine.show("kabpf.service", "WatchdogTimestampMonotonic")
    fed = set()

    def fed_often():
        fed.add(machine.show("kabpf.service", "WatchdogTimestampMonotonic"))
        return max(map(int, fed)) - int(stamp) > 6_000_000

    wait_until(fed_often, "the watchdog's food", 20)
    assert _main_pid(machine) == pid


def test_removed_pin_is_repaired(machine, quick_watchdog, service, inside):
    """kabpfd's look at itself finds that its link is gone, and activates the policy again."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("rm", "/sys/fs/bpf/kabpf/kabpf_sockops")
    wait_until(lambda: "/sys/fs/bpf/kabpf/kabpf_sockops" in machine.pins(), "the pin", 20)
    assert _options_of_new(service, inside) == COVERED


def test_mounts_bpffs_where_it_is_missing(machine, service, inside):
    """As in a container, where systemd does not mount it."""
    machine.run("systemctl", "stop", "kabpf.service")
    machine.run("umount", "/sys/fs/bpf")
    machine.write("/etc/kabpf/policy.d/app.service.yaml", KEEPALIVE)
    machine.run("systemctl", "start", "kabpf.service")
    assert machine.run("stat", "--file-system", "--format=%T", "/sys/fs/bpf") == "bpf_fs"
    assert _options_of_new(service, inside) == COVERED


def test_failure_that_no_restart_mends_is_not_repeated(machine):
    """Where a start takes 1.5 s and the machine lacks what kabpf needs, kabpf.service fails once,
    and shows the reason."""
    machine.write(
        "/run/systemd/system/kabpf.service.d/lack.conf",
        "[Service]\nInaccessiblePaths=/sys/fs/cgroup\nExecStartPre=/bin/sleep 1.5\n",
    )
    machine.run("systemctl", "daemon-reload")
    assert machine.attempt("systemctl", "restart", "kabpf.service").returncode != 0
    assert machine.show("kabpf.service", "ActiveState") == "failed"
    assert machine.show("kabpf.service", "ExecMainStatus") == "78"
    assert machine.show("kabpf.service", "StatusText").startswith("no cgroup2 tree")
    said = _journal(machine).count("kabpfd: no cgroup2 tree")
    time.sleep(4)  # in which it would have been started again
    assert machine.show("kabpf.service", "ActiveState") == "failed"
    assert (said, _journal(machine).count("kabpfd: no cgroup2 tree")) == (1, 1)


def test_failure_that_stays_is_given_up(machine):
    """Where a start takes long and fails of something else each time, systemd ends trying within
    its limit."""
    machine.write(
        "/run/systemd/system/kabpf.service.d/fail.conf",
        "[Service]\nExecStart=\nExecStart=/bin/sh -c 'sleep 1.5; exit 1'\n",
    )
    machine.run("systemctl", "daemon-reload")
    machine.attempt("systemctl", "restart", "kabpf.service")
    wait_until(
        lambda: (
            machine.show("kabpf.service", "Result") == "start-limit-hit"
            or machine.show("kabpf.service", "ActiveState") == "failed"
        ),
        "the end of restarts",
        60,
    )


def test_own_stop_is_not_taken_for_somebody_elses(machine):
    """`systemctl stop kabpf` takes everything out of the kernel, and kabpfd does not say that
    somebody else has; of `detach --all` it says so."""
    unloaded = "every policy was unloaded; a reload activates them again"
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("systemctl", "stop", "kabpf.service")
    assert machine.pins() == []
    assert unloaded not in _journal(machine)
    machine.run("systemctl", "start", "kabpf.service")
    machine.run("kabpfctl", "detach", "--all")
    wait_until(lambda: unloaded in _journal(machine), "its word", SECONDS)


@pytest.mark.parametrize("writable", [True, False])
def test_removed_runtime_directory_is_made_anew(machine, writable):
    """Whoever removes /run/kabpf hides kabpfd until its next word to the watchdog: then it makes
    the directory anew, or where it may not is started again, and policies stay active. doctor says
    which sockets have to be made anew."""
    conf = f"[Service]\nWatchdogSec=4s\n{'' if writable else 'ReadOnlyPaths=/run'}\n"
    machine.write("/run/systemd/system/kabpf.service.d/watchdog.conf", conf)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "kabpf.service")
    machine.drop_in("app.service.yaml", KEEPALIVE)
    pins = machine.pins()
    machine.run("rm", "-r", "/run/kabpf")

    def is_found():
        return "daemon: running as process " in machine.run("kabpfctl", "status")

    wait_until(is_found, "the daemon", 3 * SECONDS)
    assert machine.pins() == pins
    assert ("kabpfd.lock was removed, and is made again; try: " in _journal(machine)) == writable
    told = machine.attempt("kabpfctl", "doctor").stdout
    assert "systemctl restart kabpf-request.socket" in told
    assert ("systemctl restart kabpf-retrofit.socket" in told) == writable
    machine.run("systemctl", "restart", "kabpf-request.socket", "kabpf-retrofit.socket")
    assert "systemctl restart" not in machine.attempt("kabpfctl", "doctor").stdout


@pytest.mark.alone  # the kernel tier's kabpf would see the socket as well
def test_helper_updates_what_is_open_beside_a_held_socket(machine):
    """What the units allow is enough for it: a reload says which process holds a socket, and the
    open sockets of others have their options."""
    client = Inside(machine)
    numbers = [number for _ in range(8) for number in client.pair()]
    holder = machine.start(
        "python3", f"{PROGRAMS_INSIDE}/holder.py", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        said = holder.stdout.readline()
        if said.startswith("userfaultfd: "):
            pytest.skip(said)
        machine.drop_in("a.yaml", f"select: [{{cgroup: /init.scope}}]\n{KEEPALIVE}")
        assert [client.options(number) for number in numbers] == [COVERED] * len(numbers)
        assert "not updated yet: process " in machine.show("kabpf.service", "StatusText")
    finally:
        holder.kill()
        holder.communicate()
        client.end()
