"""Changes of policy files become active by themselves."""

import os

import pytest
from harness import UNTOUCHED, wait_until
from machine import COVERED, KEEPALIVE

SECONDS = 20


def _policy(idle):
    return KEEPALIVE.replace("61", str(idle))


@pytest.fixture
def client(service, inside):
    """app.service, and the address of a server."""
    _, address = inside().listener()
    return service("app.service"), address


@pytest.fixture
def idle(client):
    """The idle time that app.service's connection has now."""
    app, address = client
    number = app.connection(address)
    return lambda: app.options(number)["idle"]


def test_drop_in_comes_into_force_by_itself(machine, client):
    """A drop-in that is written or removed in any of the directories needs no reload."""
    app, address = client

    def wait_for(options):
        wait_until(lambda: app.options(app.connection(address)) == options, f"{options}", SECONDS)

    for directory in ("/etc", "/run", "/usr/lib", "/usr/local/lib"):
        path = f"{directory}/kabpf/policy.d/app.service.yaml"
        machine.write(path, KEEPALIVE)
        wait_for(COVERED)
        machine.run("rm", path)
        wait_for(UNTOUCHED)


def test_main_file_comes_into_force_by_itself(machine, idle):
    """So does /etc/kabpf/policy.yaml."""
    machine.write(
        "/etc/kabpf/policy.yaml",
        f"policies:\n  app:\n    select: [{{unit: app.service}}]\n    {KEEPALIVE}",
    )
    wait_until(lambda: idle() == COVERED["idle"], "the policy", SECONDS)


def test_swapped_link_of_a_config_map_comes_into_force(machine, idle):
    """Kubernetes replaces a ConfigMap's files by renaming one symbolic link over another."""
    drop_ins = "/etc/kabpf/policy.d"
    machine.write(f"{drop_ins}/..1/app.service.yaml", _policy(61))
    machine.run("ln", "-s", "..1", f"{drop_ins}/..data")
    machine.run("ln", "-s", "..data/app.service.yaml", f"{drop_ins}/app.service.yaml")
    wait_until(lambda: idle() == 61, "the first policy", SECONDS)
    machine.write(f"{drop_ins}/..2/app.service.yaml", _policy(62))
    machine.run("ln", "-s", "..2", f"{drop_ins}/..data_tmp")
    machine.run("mv", "-T", f"{drop_ins}/..data_tmp", f"{drop_ins}/..data")
    machine.run("rm", "-r", f"{drop_ins}/..1")
    wait_until(lambda: idle() == 62, "the second policy", SECONDS)


def test_last_of_many_writes_comes_into_force(machine, idle):
    """A hundred changes at once end with the last one active, kabpf running, no unit failed."""
    machine.drop_in("app.service.yaml", _policy(60))
    drop_in = machine.root / "etc/kabpf/policy.d/app.service.yaml"
    for number in range(1, 101):
        drop_in.with_name(".new").write_text(_policy(60 + number))
        os.rename(drop_in.with_name(".new"), drop_in)
    wait_until(lambda: idle() == 160, "the last policy", SECONDS)
    active = ("systemctl", "is-active", "kabpf.service")  # and not reloading
    wait_until(lambda: machine.attempt(*active).returncode == 0, "kabpf at rest", SECONDS)
    assert "kabpf" not in machine.run("systemctl", "list-units", "--failed", "--plain")


def test_bad_file_is_said_and_its_correction_comes_into_force(machine, idle):
    """A wrong file is named by the status line, and changes nothing until it is corrected."""
    machine.drop_in("app.service.yaml", _policy(61))
    machine.write("/etc/kabpf/policy.d/app.service.yaml", _policy("never"))
    named = "app.service.yaml:1: keepalive.idle: never"
    wait_until(lambda: named in machine.show("kabpf.service", "StatusText"), named, SECONDS)
    assert idle() == 61
    machine.write("/etc/kabpf/policy.d/app.service.yaml", _policy(62))
    wait_until(lambda: idle() == 62, "the corrected policy", SECONDS)


def test_link_that_the_service_can_not_follow_is_wrong_for_everybody(machine):
    """`check`, `apply`, `status`, `doctor` and the service say the same of it."""
    link = "/etc/kabpf/policy.d/app.service.yaml"
    for tree, directory in (
        ("/root", "/root/dotfiles"),
        ("/home", "/home/me"),
        ("/tmp", "/tmp/x"),
        ("/var/tmp", "/var/tmp/x"),
    ):
        machine.write(f"{directory}/app.service.yaml", KEEPALIVE)
        machine.run("ln", "-sf", f"{directory}/app.service.yaml", link)
        said = f"{link}: leads to {tree}, which kabpf.service can't see"
        for command in (("check",), ("check", link), ("apply",)):
            done = machine.attempt("kabpfctl", *command)
            assert done.returncode == 1
            assert said in done.stderr
        for command in ("status", "doctor"):
            assert said in machine.attempt("kabpfctl", command).stdout.replace("\n", " ")
        wait_until(
            lambda said=said: said in machine.show("kabpf.service", "StatusText"), said, SECONDS
        )
        machine.run("kabpfctl", "check", f"{directory}/app.service.yaml")  # before it is installed
