"""The system tier: the built package under a systemd of its own, in a container that boots.

Each test has a machine of its own, of either Debian; what it holds is looked at from outside."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machine as machines
import pytest
import trees
from machine import Machine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", params=trees.SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """A release of Debian."""
    return str(request.param)


@pytest.fixture(scope="session")
def package() -> Path:
    """The package under test: KABPF_DEB, or built from here."""
    if "KABPF_DEB" in os.environ:
        return Path(os.environ["KABPF_DEB"]).resolve()
    built = subprocess.check_output([ROOT / "scripts/package"], text=True)
    return Path(built.splitlines()[-1])


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
    install = ("apt-get", "--yes", "install", f"/mnt/{package.name}")
    with _alone():
        directory = tmp_path_factory.mktemp(f"{suite}-installed")
        return [machines.layer(base, directory, [package], *install), *base]


@pytest.fixture
def machine(installed: list[Path], tmp_path: Path) -> Iterator[Machine]:
    """A machine with the package, where kabpf runs without any policy."""
    with _alone(), Machine(installed, tmp_path / "machine") as machine:
        yield machine


@pytest.fixture
def bare_machine(base: list[Path], tmp_path: Path) -> Iterator[Machine]:
    """A machine without the package."""
    with _alone(), Machine(base, tmp_path / "machine") as machine:
        yield machine


@contextmanager
def _alone() -> Iterator[None]:
    """Takes turns with other test sessions: the kernel's objects have no owner."""
    with open(Path(tempfile.gettempdir(), "kabpf-tests.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
