"""What debian/ repeats of the rest of the tree."""

import re
from pathlib import Path

import kabpf

SOURCE = Path(__file__).parents[2]
DEBIAN = SOURCE / "debian"


def test_package_has_the_version_of_the_program() -> None:
    """The newest entry of the package's changelog is for this version."""
    heading = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert re.match(r"kabpf \((.*)\) ", heading)[1] == kabpf.__version__


def test_package_installs_every_unit() -> None:
    """debhelper takes units from debian/, where a link leads to each of systemd/; slices, which it
    does not know, are installed as files."""
    linked = {path.resolve() for path in DEBIAN.iterdir() if path.is_symlink()}
    installed = re.findall(r"^(systemd/\S+) ", (DEBIAN / "kabpf.install").read_text(), re.M)
    slices = {(SOURCE / path).resolve() for path in installed}
    assert all(path.suffix == ".slice" for path in slices)
    assert linked | slices == set((SOURCE / "systemd").resolve().iterdir())


def test_package_removes_what_is_for_pip() -> None:
    """What debian/rules removes of the Python package is what setup.py puts there for pip alone."""
    removed = re.findall(r"rm -r .*/dist-packages/kabpf/(\S+)", (DEBIAN / "rules").read_text())
    assert removed
    for directory in removed:
        assert f'"{directory}": ' in (SOURCE / "setup.py").read_text()


def test_units_start_what_a_minimal_debian_has() -> None:
    """Beside the package's own programs, those of essential packages, and of systemd with the mount
    that it depends on; not procps' kill."""
    units = [path.read_text() for path in (SOURCE / "systemd").iterdir()]
    lines = [line for text in units for line in re.findall(r"^Exec\w+=-?(.*)$", text, re.MULTILINE)]
    started = {line.split()[0] for line in lines}
    assert started == {
        "/bin/mkdir",
        "/bin/mount",
        "/bin/sh",
        "/bin/systemctl",
        "/usr/bin/kabpfctl",
        "/usr/bin/kabpfd",
    }


def test_socket_that_a_flood_has_stopped_comes_back() -> None:
    """systemd ends one with too many connections, before version 255 at once, and for good."""
    limited = [
        path
        for path in (SOURCE / "systemd").glob("*.socket")
        if "TriggerLimitBurst=" in path.read_text()
    ]
    assert {path.name for path in limited} == {"kabpf-request.socket", "kabpf-metrics.socket"}
    for path in limited:
        (name,) = re.findall(r"^OnFailure=(\S+)$", path.read_text(), re.MULTILINE)
        timer = (SOURCE / "systemd" / name).read_text()
        for line in (f"PartOf={path.name}", f"Unit={path.name}", "RemainAfterElapse=no"):
            assert f"{line}\n" in timer
