"""The Debian package: installed, upgraded, removed, purged by apt."""

import os
import re
import shutil
import subprocess

import former
import pytest
from harness import wait_until
from machine import COVERED, KEEPALIVE, postgresql
from outside import connections

PACKAGE = "/root/kabpf.deb"
MODULES = "/usr/lib/python3/dist-packages/kabpf"
UNITS = ("/usr/lib/systemd/system", "-name", "*kabpf*")
EXAMPLES = "/usr/share/doc/kabpf/examples"
NEW_ONLY = f"select: [{{unit: app.service}}, {{unit: db.service}}]\n{KEEPALIVE}existing: false\n"

# What apt and systemd keep of every package and unit.
OTHERS = ("/var/lib/dpkg/*", "/var/lib/apt/*", "/var/lib/systemd/*", "/var/cache/*", "/var/log/*")


without_kabpf = pytest.mark.parametrize("layers", ["base"], indirect=True)


@pytest.fixture
def copied(machine, package):
    """The package is in the machine."""
    shutil.copy(package, machine.root / PACKAGE[1:])


def _files(machine):
    places = ("/etc", "/usr", "/var", "/opt", "/root", "/run/kabpf", "/run/systemd/system")
    without = [word for path in OTHERS for word in ("!", "-path", path)]
    found = machine.attempt("find", *places, "-xdev", *without).stdout.splitlines()
    return set(found) - {PACKAGE}


def test_upgrade_uncovers_no_connection(machine, copied, traffic):
    """While the package is replaced by itself, each new connection has its options at once, and
    what is in the kernel stays the same."""
    machine.drop_in("apps.yaml", NEW_ONLY)
    before, pid = machine.objects(), machine.show("kabpf.service", "MainPID")
    with traffic() as seen:
        machine.run("apt-get", "install", "--yes", "--reinstall", PACKAGE)
    assert machine.show("kabpf.service", "MainPID") not in ("0", pid)
    assert seen == [COVERED, COVERED]
    assert machine.objects() == before


@without_kabpf
def test_upgrade_from_another_version_uncovers_no_connection(machine, copied, traffic, tmp_path):
    """While a former package is replaced, each new connection has its options at once. Of the
    former one nothing stays: no program, no pin, and no module."""
    deb = os.environ.get("KABPF_FORMER_DEB") or former.package(tmp_path)
    shutil.copy(deb, machine.root / "root/former.deb")
    machine.run("apt-get", "install", "--yes", "/root/former.deb")
    machine.drop_in("apps.yaml", NEW_ONLY)
    before = machine.objects()
    with traffic() as seen:
        machine.run("apt-get", "install", "--yes", "--reinstall", "--allow-downgrades", PACKAGE)
    assert seen == [COVERED, COVERED]
    wait_until(lambda: not _of_both(before, machine.objects()), "the end of the former programs")
    assert {os.path.dirname(pin) for pin in machine.pins()} <= {"/sys/fs/bpf", "/sys/fs/bpf/kabpf"}
    modules = set(machine.run("find", MODULES, "-name", "*.py*").split())
    listed = set(machine.run("dpkg", "--listfiles", "kabpf").split())
    sources = {
        path.replace("__pycache__/", "").split(".cpython")[0].removesuffix(".py") + ".py"
        for path in modules
    }
    assert sources <= listed


@without_kabpf
def test_upgrade_from_units_below_lib_keeps_every_unit(machine, package, copied, tmp_path):
    """A package that was built by Debian 12's debhelper had them in /lib/systemd/system, the same
    directory by another name; dpkg removes no file of the new one with the old list."""
    former = tmp_path / "former"
    subprocess.run(["dpkg-deb", "--raw-extract", package, former], check=True)
    (former / "lib/systemd").mkdir(parents=True)
    (former / "usr/lib/systemd/system").rename(former / "lib/systemd/system")
    control = former / "DEBIAN/control"
    control.write_text(re.sub("^Version:.*", "Version: 0.0.1", control.read_text(), flags=re.M))
    deb = machine.root / "root/former.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", former, deb], check=True)
    machine.run("apt-get", "install", "--yes", "/root/former.deb")
    units = machine.run("find", *UNITS)
    machine.run("apt-get", "install", "--yes", PACKAGE)
    assert machine.run("find", *UNITS) == units
    listed = machine.run("dpkg", "--listfiles", "kabpf").splitlines()
    assert {one for one in listed if "/systemd/system/" in one} == set(units.splitlines())
    assert machine.run("systemctl", "is-active", "kabpf.service") == "active"


def _of_both(before, after):
    """Programs and maps that were there and are there still; a link is handed on."""
    return [id for kind in ("prog", "map") for id in before[kind].keys() & after[kind].keys()]


def test_upgrade_keeps_what_was_stopped_stopped(machine, copied):
    """An administrator's `systemctl stop` and `disable` are not undone."""
    machine.run("systemctl", "disable", "--now", "kabpf.service")
    machine.run("apt-get", "install", "--yes", "--reinstall", PACKAGE)
    assert machine.show("kabpf.service", "UnitFileState") == "disabled"
    assert machine.pins() == []


def test_remove_unloads_every_policy_and_keeps_the_files(machine):
    """Nothing is left in the kernel, no unit runs; what the administrator wrote stays."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("apt-get", "remove", "--yes", "kabpf")
    assert machine.pins() == []
    wait_until(lambda: not any(machine.objects().values()), "the end of kabpf's objects")
    listed = ("systemctl", "list-units", "--state=active,failed", "--plain", "--no-legend")
    assert machine.run(*listed, "kabpf*") == ""
    assert machine.run("cat", "/etc/kabpf/policy.d/app.service.yaml") == KEEPALIVE.strip()


@without_kabpf
def test_purge_leaves_nothing(machine, copied):
    """Installed, used and purged, the package leaves no file, no pin and nothing in the kernel,
    and dpkg warns of nothing."""
    before = _files(machine)
    machine.run("apt-get", "install", "--yes", PACKAGE)
    attach = ("kabpfctl", "attach", "--cgroup", "/sys/fs/cgroup/system.slice", "--idle", "61")
    machine.run(*attach, "--persist")
    machine.run("systemctl", "restart", "kabpf.service")
    assert machine.pins()
    purged = machine.attempt("apt-get", "purge", "--yes", "kabpf")
    assert purged.returncode == 0
    assert "warning" not in purged.stdout + purged.stderr
    assert machine.pins() == []
    wait_until(lambda: not any(machine.objects().values()), "the end of kabpf's objects")
    assert _files(machine) - before == set()


def test_purge_keeps_policy_files_of_the_administrator(machine):
    """A purge removes what the package and kabpfctl made, and no file that a person wrote."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("apt-get", "purge", "--yes", "kabpf")
    assert machine.run("find", "/etc/kabpf", "-type", "f") == "/etc/kabpf/policy.d/app.service.yaml"


@without_kabpf
def test_newcomer_covers_postgresql_and_undoes_it(machine, copied, inside):
    """README's commands cover the connections of a running PostgreSQL, open ones and new, verify it
    in the words that it says, list them, and undo it: the listener keeps what it has, and passes it
    on, until the service restarts."""
    unit, port = postgresql(machine)
    machine.run("systemctl", "start", unit)
    client = inside()
    client.connection(("127.0.0.1", port))
    cgroup = machine.cgroup(unit)

    def accepted():
        return [one.options for one in connections(cgroup) if one.local[1] == port]

    wait_until(lambda: len(accepted()) == 1, "the first connection")
    machine.run("apt-get", "install", "--yes", PACKAGE)
    machine.run("cp", f"{EXAMPLES}/postgresql@.service.yaml", "/etc/kabpf/policy.d/")
    machine.run("kabpfctl", "apply")
    client.connection(("127.0.0.1", port))
    wait_until(lambda: len(accepted()) == 2, "the second connection")
    given = {"keepalive": 1, "idle": 60, "interval": 10, "probes": 6, "user_timeout": 0}
    assert accepted() == [given, given]
    verified = machine.run("kabpfctl", "verify")
    assert re.fullmatch(r"1 policy active, covering 1 of \d+ cgroups", verified)
    listed = machine.run("kabpfctl", "sockets", "--unit", "postgresql@*.service").splitlines()
    connected = [row for row in map(str.split, listed[1:]) if row[2] != "*"]
    assert [(row[3], row[5]) for row in connected] == [("60s/10s/6", "postgresql@.service")] * 2
    machine.run("rm", "/etc/kabpf/policy.d/postgresql@.service.yaml")
    machine.run("kabpfctl", "apply")
    client.connection(("127.0.0.1", port))
    wait_until(lambda: len(accepted()) == 3, "the third connection")
    assert accepted() == [given] * 3
    machine.run("systemctl", "restart", unit)
    client.connection(("127.0.0.1", port))
    wait_until(lambda: [one["idle"] for one in accepted()] == [7200], "a connection as of old")
