"""Debian's kernel headers, for bcc where the running kernel has none: downloaded once and kept."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

APT = Path(__file__).parents[2] / "scripts/apt"


class MissingError(Exception):
    """They can't be had; the message says why."""


def debians() -> dict[str, Path]:
    """What /lib/modules/RELEASE has of them, "build" and "source", for the newest that Debian has.

    apt verifies them by the archive's keys; nothing is installed. Raises MissingError, the second
    time without another try."""
    found = _find()
    if isinstance(found, MissingError):
        raise found
    return found


@functools.cache
def _find() -> dict[str, Path] | MissingError:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "/var/cache"), "kabpf-tests")
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "headers"
    if not target.exists():  # first, because the cache of an emulated machine can't be written to
        with open(cache / "headers.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                try:
                    _download(target)
                except MissingError as error:
                    return error
    (common,) = target.glob("usr/src/linux-headers-*-common")
    (build,) = (path for path in target.glob("usr/src/linux-headers-*") if path != common)
    return {"build": build, "source": common}


def lack(what: str, tier: str) -> NoReturn:
    """Skip a test of a tier, or fail it where KABPF_REQUIRE names the tier."""
    if tier in os.environ.get("KABPF_REQUIRE", "").split(","):
        pytest.fail(f"KABPF_REQUIRE={tier}, but {what}", pytrace=False)
    pytest.skip(what)


def _download(target: Path) -> None:
    architecture = _output("dpkg", "--print-architecture")
    meta = f"linux-headers-{architecture}"
    if not _depends(meta):
        _output(str(APT), "update")
    packages = [name for name in _depends(meta) if name.startswith("linux-headers-")]
    packages += [name for each in packages for name in _depends(each) if name.endswith("-common")]
    if len(packages) != 2:
        raise MissingError(f"there are no kernel headers: apt knows no {meta}")
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        _output(str(APT), "-o", "APT::Sandbox::User=root", "download", *packages, cwd=work)
        unpacked = Path(work, "unpacked")
        for package in Path(work).glob("*.deb"):
            _output("dpkg-deb", "--extract", str(package), str(unpacked))
        shutil.move(unpacked, target)


def _depends(package: str) -> list[str]:
    done = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True)
    return re.findall(r"^ *Depends: (\S+)", done.stdout, re.MULTILINE)


def _output(*command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise MissingError(f"there are no kernel headers: {error}") from None
    if done.returncode:
        raise MissingError(f"there are no kernel headers: {command[0]}: {done.stderr.strip()}")
    return done.stdout.strip()
