"""kabpfd --install-units, below a directory that stands for the machine's root."""

import os
import re
from pathlib import Path

import pytest

from kabpf.errors import RefusedError
from kabpf.systemd import install

SHIPPED = Path(__file__).parents[3] / "systemd"
OPT = Path("/opt/kabpf/bin")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with kabpf in /opt/kabpf, on which no systemd runs."""
    add_commands(tmp_path, OPT)
    return tmp_path


def add_commands(root: Path, commands: Path) -> None:
    directory = root / commands.relative_to("/")
    directory.mkdir(parents=True)
    for name in ("kabpfd", "kabpfctl"):
        (directory / name).touch(0o755)


def test_installed_package_carries_every_unit() -> None:
    """What pip installed has the units of systemd/ as they are."""
    carried = {path.name: path.read_text() for path in install.CARRIED.iterdir()}
    assert carried == {path.name: path.read_text() for path in SHIPPED.iterdir()}


def test_units_run_the_commands_of_this_installation(root: Path) -> None:
    """Each unit is as it is shipped, but for where its commands are."""
    install.units(root, OPT, SHIPPED)
    for shipped in SHIPPED.iterdir():
        name = shipped.name.replace("kabpf.tmpfiles", "../../tmpfiles.d/kabpf.conf")
        expected = install.MARK + shipped.read_text().replace(
            "/usr/bin/kabpf", "/opt/kabpf/bin/kabpf"
        )
        assert (root / "etc/systemd/system" / name).read_text() == expected


def test_units_name_our_commands_by_their_paths() -> None:
    """A command without one could be another installation's, or none's."""
    for shipped in SHIPPED.iterdir():
        for line in shipped.read_text().splitlines():
            if line.startswith("Exec"):
                assert not re.search(r"(?<!/usr/bin/)\bkabpf(d|ctl)\b", line), f"{shipped}: {line}"


def test_policy_directory_is_made(root: Path) -> None:
    """There is a place for drop-ins afterwards."""
    install.units(root, OPT, SHIPPED)
    assert (root / "etc/kabpf/policy.d").is_dir()


def test_files_are_for_everybody_to_read(root: Path) -> None:
    """systemd's own tools read units without root, whatever the umask was."""
    before = os.umask(0o077)
    try:
        written = install.units(root, OPT, SHIPPED)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}


def test_units_of_an_older_installation_are_replaced(root: Path) -> None:
    """After pip install of another version, or elsewhere, the same command brings the units up."""
    add_commands(root, Path("/srv/kabpf/bin"))
    install.units(root, OPT, SHIPPED)
    install.units(root, Path("/srv/kabpf/bin"), SHIPPED)
    service = (root / "etc/systemd/system/kabpf.service").read_text()
    assert "ExecStart=/srv/kabpf/bin/kabpfd\n" in service


@pytest.mark.parametrize("directory", ["usr/lib/systemd/system", "lib/systemd/system"])
def test_units_of_a_package_are_left_alone(root: Path, directory: str) -> None:
    """Units in /etc would hide those of a package, at its upgrades too."""
    packaged = root / directory / "kabpf.service"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    assert refusal(root) == f"a package has {packaged}; remove that package first"


@pytest.mark.parametrize("kind", ["file", "mask"])
def test_units_of_an_administrator_are_left_alone(root: Path, kind: str) -> None:
    """A unit that somebody wrote or masked is not replaced, and nothing else is written."""
    unit = root / "etc/systemd/system/kabpf.service"
    unit.parent.mkdir(parents=True)
    if kind == "mask":
        unit.symlink_to("/dev/null")
    else:
        unit.write_text("[Unit]\n")
    assert refusal(root) == f"{unit} exists and was not written by kabpfd; move it away"
    assert [path.name for path in unit.parent.iterdir()] == ["kabpf.service"]


@pytest.mark.parametrize("commands", ["/home/me/venv/bin", "/tmp/venv/bin", "/opt/my kabpf/bin"])
def test_commands_out_of_reach_of_services_are_refused(root: Path, commands: str) -> None:
    """Where the units' own protection hides the commands, they would fail at their start."""
    add_commands(root, Path(commands))
    assert refusal(root, Path(commands)) == (
        f"services can't run {commands}/kabpfd; install it in a place such as /opt/kabpf"
    )


def test_missing_commands_are_refused(root: Path) -> None:
    """Run from a source tree, there is nothing that a unit could start."""
    message = "no command /usr/bin/kabpfd; install kabpf with pip first"
    assert refusal(root, Path("/usr/bin")) == message


def test_missing_units_are_refused(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Debian's package and an editable installation carry none."""
    carried = tmp_path_factory.mktemp("none")
    with pytest.raises(RefusedError) as refused:
        install.units(root, OPT, carried)
    assert str(refused.value) == f"no units in {carried}; install kabpf with pip first"


def refusal(root: Path, commands: Path = OPT) -> str:
    with pytest.raises(RefusedError) as refused:
        install.units(root, commands, SHIPPED)
    return str(refused.value)
