"""The system tier: the built package under a systemd of its own, in a container that boots.

Each test has a machine of its own, of either Debian; what it holds is looked at from outside. Those
with the mark `leaves_nothing` share their file's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine as machines
import pytest
import shared
import trees
from harness import alone, beside_others, wait_until
from machine import Inside, Machine

ROOT = Path(__file__).parents[2]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """A failure comes with the machine's journal."""
    report = (yield).get_result()
    machine = getattr(item, "funcargs", {}).get("machine")
    if report.failed and report.when == "call" and machine:
        report.sections.append(("the machine's journal", _journal(machine)))


def _journal(machine: Machine) -> str:
    return machine.attempt("journalctl", "--no-pager", "--unit=kabpf*").stdout


@pytest.fixture(scope="session", params=trees.SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """A release of Debian."""
    return str(request.param)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package under test: KABPF_DEB, or built from here, once for all workers."""
    if "KABPF_DEB" in os.environ:
        return Path(os.environ["KABPF_DEB"]).resolve()
    place = shared.of_this_run(tmp_path_factory)

    def build() -> str:
        with trees.told("building the package for the system tier"):
            done = subprocess.run([ROOT / "scripts/package"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"scripts/package: {trees.last_line(done.stderr)}\n{done.stderr}")
        # A copy, as another run may build here meanwhile.
        return shutil.copy(done.stdout.splitlines()[-1], place)

    return Path(shared.once(place / "package", build))


@pytest.fixture(scope="session")
def base(suite: str) -> list[Path]:
    """The layers of a machine without kabpf."""
    machines.remove_stale()
    return [trees.base(suite)]


@pytest.fixture(scope="session")
def installed(
    base: list[Path], package: Path, suite: str, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The layers of a machine where apt installed the package."""
    return _with_package(base, package, suite, "installed", tmp_path_factory)


@pytest.fixture(scope="session")
def engines(package: Path, suite: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The layers of a machine with the package and container engines, none of which runs."""
    machines.remove_stale()
    return _with_package([trees.engines(suite)], package, suite, "engines", tmp_path_factory)


@pytest.fixture(scope="session")
def monitoring(package: Path, suite: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The layers of a machine with the package and a Prometheus server, which does not run."""
    machines.remove_stale()
    return _with_package([trees.monitoring(suite)], package, suite, "monitoring", tmp_path_factory)


def _with_package(
    base: list[Path], package: Path, suite: str, name: str, factory: pytest.TempPathFactory
) -> list[Path]:
    """`base` with the package above, which is installed once for all workers."""
    place = shared.of_this_run(factory) / f"{suite}-{name}"
    # Or each boot would do what is done once after an upgrade (systemd-update-done.service(8)).
    install = (
        f"apt-get --yes install /mnt/{package.name} && touch -r /usr /etc/.updated /var/.updated"
    )

    def layer() -> str:
        directory = place.with_suffix(".layer")
        directory.mkdir()
        return str(machines.layer(base, directory, [package], "sh", "-c", install))

    with beside_others():
        return [Path(shared.once(place, layer)), *base]


@pytest.fixture
def layers(request: pytest.FixtureRequest, suite: str) -> list[Path]:
    """What the machine is made of; `parametrize("layers", ["base"], indirect=True)` leaves the
    package out."""
    chosen: list[Path] = request.getfixturevalue(getattr(request, "param", "installed"))
    return chosen


@pytest.fixture(scope="module")
def machine_of_the_file(
    installed: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine that every test of a file leaves as it was."""
    directory = tmp_path_factory.mktemp("machine") / "machine"
    with beside_others(), Machine(installed, directory) as machine:
        yield machine
        assert "Traceback" not in _journal(machine)


@pytest.fixture
def machine(
    request: pytest.FixtureRequest, layers: list[Path], tmp_path: Path
) -> Iterator[Machine]:
    """A machine with the package, where kabpf runs without any policy, and never breaks down."""
    if request.node.get_closest_marker("leaves_nothing"):
        yield request.getfixturevalue("machine_of_the_file")
        return
    turn = alone if request.node.get_closest_marker("alone") else beside_others
    options = getattr(request, "param", ())
    with turn(), Machine(layers, tmp_path / "machine", *options) as machine:
        yield machine
        assert "Traceback" not in _journal(machine)


@pytest.fixture
def inside(machine: Machine) -> Iterator[Callable[..., Inside]]:
    """Starts peers inside the machine."""
    peers: list[Inside] = []

    def start(*starter: str) -> Inside:
        peers.append(Inside(machine, *starter))
        return peers[-1]

    yield start
    for one in peers:
        one.end()


@pytest.fixture
def service(inside: Callable[..., Inside]) -> Callable[..., Inside]:
    """Starts a unit that is a peer, given its name and more options of systemd-run."""
    return lambda unit, *options: inside(
        "systemd-run", "--quiet", "--pipe", f"--unit={unit}", *options
    )


@pytest.fixture
def traffic(machine: Machine, service: Callable[..., Inside]) -> Callable[[], Any]:
    """While the block runs, app.service connects to db.service again and again; the list that it
    gives has then the options which were seen on either side at once."""

    @contextmanager
    def flow() -> Iterator[list[dict[str, int]]]:
        seen: list[dict[str, int]] = []
        machine.write("/run/flowing", "")
        server, client = service("db.service"), service("app.service")
        listener, address = server.listener()
        server.tell("accept_while", listener, "/run/flowing")
        client.tell("connect_while", address, "/run/flowing")
        _flow_on(machine)
        yield seen
        _flow_on(machine)
        (machine.root / "run/flowing").unlink()
        seen += [json.loads(options) for one in (client, server) for options in one.answer()]

    return flow


def _flow_on(machine: Machine) -> None:
    enough = machine.count_accepted() + 200
    wait_until(lambda: machine.count_accepted() >= enough, "200 connections more")
