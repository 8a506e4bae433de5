"""The unit files as each release's own systemd judges them."""

import pytest

leaves_nothing = pytest.mark.leaves_nothing


def _shipped(machine):
    listed = machine.run("dpkg", "--listfiles", "kabpf").splitlines()
    return [path for path in listed if "/systemd/system/" in path]


@leaves_nothing
def test_units_are_valid(machine):
    """`systemd-analyze verify` finds nothing to say of any unit."""
    units = _shipped(machine)
    assert len(units) >= 5
    done = machine.attempt("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@leaves_nothing
def test_boot_has_no_ordering_cycle(machine):
    """systemd drops no job of a boot because of kabpf's units."""
    done = machine.attempt("systemd-analyze", "verify", "--man=no", "default.target")
    assert "cycle" not in done.stderr


@leaves_nothing
def test_daemon_is_hardened(machine):
    """`systemd-analyze security` gives kabpf.service an exposure of at most 1.5."""
    command = ("systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=15")
    done = machine.attempt(*command, "kabpf.service")
    assert done.returncode == 0, done.stdout + done.stderr


@leaves_nothing
def test_daemon_holds_four_capabilities(machine):
    """kabpfd runs with CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF alone, and can't
    gain more."""
    pid = machine.show("kabpf.service", "MainPID")
    status = machine.run("cat", f"/proc/{pid}/status")
    held = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
    only = f"{1 << 2 | 1 << 12 | 1 << 38 | 1 << 39:016x}"
    assert held["CapEff"] == held["CapPrm"] == held["CapBnd"] == only
    assert "NoNewPrivs:\t1" in status


# An inheritable one, as root has them inside of a container, comes back at exec.
WITHOUT_BPF = ("setpriv", "--bounding-set=-bpf", "--inh-caps=-bpf")


@pytest.mark.parametrize("machine", [("--drop-capability=CAP_BPF",)], indirect=True, ids=["no bpf"])
def test_units_do_not_start_without_the_right_to_load_programs(machine):
    """In a container without CAP_BPF nothing fails again and again: systemd says once why not, and
    `apply` names the capability and no mount."""
    assert machine.run("systemctl", "list-units", "--failed", "--no-legend", "kabpf*") == ""
    assert machine.show("kabpf.service", "ConditionResult") == "no"
    machine.run("systemctl", "start", "kabpf.service")
    assert machine.show("kabpf.service", "ActiveState") == "inactive"
    # What a test runs inside has all of its own capabilities.
    done = machine.attempt(*WITHOUT_BPF, "kabpfctl", "apply")
    assert done.returncode == 1
    assert done.stderr == "kabpfctl: CAP_BPF missing; run it as root with these capabilities\n"
