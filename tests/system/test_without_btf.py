"""kabpf.service on a machine whose kernel has no BTF."""

import json
import subprocess

import headers
import pytest
from harness import UNTOUCHED
from machine import COVERED, KEEPALIVE


@pytest.fixture
def without_btf(machine):
    """The machine, where kabpf is stopped, BTF is hidden, and a policy waits for app.slice."""
    machine.run("systemctl", "stop", "kabpf.service")
    machine.run("mount", "-t", "tmpfs", "none", "/sys/kernel/btf")
    machine.write("/etc/kabpf/policy.d/app.yaml", f"select: [{{cgroup: /app.slice}}]\n{KEEPALIVE}")
    return machine


def _options_of_new(service, inside):
    _, address = inside().listener()
    client = service("app.service", "--slice=app.slice")
    return client.options(client.connection(address))


def test_service_compiles_its_programs(without_btf, service, inside):
    """kabpf-compile.service, confined as it is, leaves the daemon programs that cover a slice; a
    stop unloads them."""
    _lend_headers(without_btf)
    without_btf.run("systemctl", "start", "app.slice")
    without_btf.run("systemctl", "start", "kabpf.service")
    status = json.loads(without_btf.run("kabpfctl", "status", "--json"))
    assert (status["loader"], status["loaded"]) == ("bcc", True)
    assert without_btf.show("kabpf-compile.service", "Result") == "success"
    assert _options_of_new(service, inside) == COVERED
    without_btf.run("systemctl", "stop", "app.service", "kabpf.service")
    assert without_btf.pins() == []
    assert _options_of_new(service, inside) == UNTOUCHED


def _lend_headers(machine):
    """Where the package linux-headers of the running kernel would have them."""
    try:
        found = headers.debians()
    except headers.MissingError as error:
        headers.lack(str(error), "system")
    modules = f"/lib/modules/{machine.run('uname', '-r')}"
    machine.run("mkdir", "--parents", modules, "/usr/src")
    for name, path in found.items():
        subprocess.run(["cp", "-a", path, machine.root / "usr/src"], check=True)
        machine.run("ln", "-s", f"/usr/src/{path.name}", f"{modules}/{name}")


def test_missing_headers_are_in_the_journal(without_btf):
    """A start without the kernel's headers fails, and says which package has them."""
    assert without_btf.attempt("systemctl", "start", "kabpf.service").returncode
    said = without_btf.run("journalctl", "--no-pager", "--unit=kabpf.service")
    assert f"install the package linux-headers-{without_btf.run('uname', '-r')}" in said
