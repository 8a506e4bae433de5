"""Wrong policy files and a boot: services are covered, systemd shows why, and nothing fails."""

import shutil
import time

import pytest
from harness import UNTOUCHED, wait_until
from machine import COVERED, KEEPALIVE

from kabpf.runtime import last_good
from kabpf.runtime.last_good import Kept, time_text

SECONDS = 20
BAD = "/usr/lib/kabpf/policy.d/vendor.yaml"
WRONG = "select: [{unit: vendor.service}]\nkeepalive: {idle: 60s, intervall: 10s}\n"
RIGHT = WRONG.replace("intervall", "interval")
NAMED = f"{BAD}:2: keepalive.intervall: unknown key, did you mean interval?"


def _status(machine):
    return machine.show("kabpf.service", "StatusText")


def _failed(machine):
    return machine.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "kabpf*")


def _journal(machine):
    return machine.run("journalctl", "--no-pager", "--output=cat", "--unit=kabpf.service")


def _options_of_new(service, inside, unit="app.service"):
    _, address = inside().listener()
    client = service(unit)
    return client.options(client.connection(address))


def _boot(machine):
    """What a boot is to kabpf: all of it stops, and /run and the kernel are empty."""
    machine.run("systemctl", "stop", "kabpf.service", "kabpf-request.socket")
    machine.run("rm", "-r", "/run/kabpf")
    assert machine.pins() == []
    machine.run("systemd-tmpfiles", "--create", "kabpf.conf")
    machine.run("systemctl", "start", "kabpf-request.socket", "kabpf.service")


def test_boot_with_a_bad_file_covers_services(machine, service, inside):
    """What was applied last is active, STATUS, journal, status and doctor name the file and since
    when it is wrong, and the mended file is taken by itself."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.write(BAD, WRONG)
    since = time_text((machine.root / BAD.lstrip("/")).stat().st_ctime)
    wait_until(lambda: NAMED in _status(machine), "the reload", SECONDS)
    _boot(machine)
    assert _options_of_new(service, inside) == COVERED
    assert _failed(machine) == ""
    status = _status(machine)
    assert status.startswith("1 policy active, covering ")
    assert f"; policy files wrong since {since}; errors: 1, and the last good policy" in status
    assert NAMED in status
    assert f"the last good policy stays active: {NAMED}" in _journal(machine)
    shown = machine.run("kabpfctl", "status")
    assert f"policy files: wrong since {since}; the last good ones stay active" in shown
    assert NAMED in shown
    done = machine.attempt("kabpfctl", "doctor")
    assert done.returncode == 1
    assert NAMED in done.stdout and since in done.stdout
    machine.write(BAD, RIGHT)
    wait_until(lambda: _status(machine).startswith("2 policies active"), "the mended file", SECONDS)
    assert "errors" not in _status(machine)
    assert _options_of_new(service, inside, "vendor.service")["idle"] == 60


@pytest.fixture
def beside_a_bad_file(installed, tmp_path):
    """The layers of a machine that was switched off after a package had brought a bad file."""
    app = "/etc/kabpf/policy.d/app.service.yaml"
    layer = tmp_path / "layer"
    for path, text in ((app, KEEPALIVE), (BAD, WRONG)):
        file = layer / path.lstrip("/")
        file.parent.mkdir(parents=True)
        file.write_text(text)
    state = layer / "var/lib/kabpf"
    state.parent.mkdir(parents=True)
    last_good._write(state, Kept(time.time(), "", ((app, KEEPALIVE),)))
    return [layer, *installed]


@pytest.mark.parametrize("layers", ["beside_a_bad_file"], indirect=True)
def test_machine_boots_beside_a_bad_file(machine, service, inside):
    """With kabpf among the first of its services, and all of them up."""
    assert machine.show("kabpf.service", "ActiveState") == "active"
    assert (_failed(machine), machine.show("kabpf.service", "NRestarts")) == ("", "0")
    assert NAMED in _status(machine)
    assert _options_of_new(service, inside) == COVERED


def test_boot_with_a_bad_file_and_nothing_kept_fails_nothing(machine, service, inside):
    """Without a last good policy kabpf runs, covers nothing and says so once, is not started again
    and again, and takes the files as soon as they are right."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    machine.run("systemctl", "stop", "kabpf.service")
    machine.run("rm", "-r", "/var/lib/kabpf")
    machine.write(BAD, WRONG)
    _boot(machine)
    pid = machine.show("kabpf.service", "MainPID")
    assert (machine.show("kabpf.service", "ActiveState"), _failed(machine)) == ("active", "")
    assert _status(machine).startswith("no policy is active; policy files wrong since ")
    assert NAMED in _status(machine)
    assert "policy files: wrong since " in machine.run("kabpfctl", "status")
    assert "; no policy is active\n" in machine.run("kabpfctl", "status")
    _, address = inside().listener()
    client = service("app.service")
    assert client.options(client.connection(address)) == UNTOUCHED
    machine.write(BAD, RIGHT)
    wait_until(lambda: _status(machine).startswith("2 policies active"), "the mended file", SECONDS)
    assert client.options(client.connection(address)) == COVERED
    assert machine.show("kabpf.service", "MainPID") == pid
    assert machine.show("kabpf.service", "NRestarts") == "0"
    assert _journal(machine).count("no policy is active until the policy files are right") == 1


@pytest.mark.parametrize("layers", ["base"], indirect=True)
def test_package_with_a_bad_file_fails_nothing(machine, package):
    """apt installs kabpf beside it, and it beside kabpf: no unit fails, and kabpf runs."""
    shutil.copy(package, machine.root / "root/kabpf.deb")
    machine.write(BAD, WRONG)
    machine.run("apt-get", "install", "--yes", "/root/kabpf.deb")
    assert machine.show("kabpf.service", "ActiveState") == "active"
    assert _failed(machine) == ""
    assert NAMED in _status(machine)


def test_state_is_roots_alone(machine):
    """Nobody else can read what is kept, whichever process made the directory."""
    machine.drop_in("app.service.yaml", KEEPALIVE)
    listed = machine.run(
        "stat", "--format=%U %a", "/var/lib/kabpf", "/var/lib/kabpf/last-good.json"
    )
    assert listed.splitlines() == ["root 700", "root 600"]
    machine.run("apt-get", "purge", "--yes", "kabpf")
    assert not (machine.root / "var/lib/kabpf").exists()
