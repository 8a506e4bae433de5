"""Tiers: what needs the kernel is skipped where it can't run, and fails where it is required."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIRED = os.environ.get("KABPF_REQUIRE", "").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(Path(__file__).parent).parts[0]
        if tier in TIERS:
            item.add_marker(tier)
            # One after the other, where others run beside them; each suite of the system tier.
            suite = item.callspec.params.get("suite") if hasattr(item, "callspec") else None
            item.add_marker(pytest.mark.xdist_group(suite or tier))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for tier, find_lacking in TIERS.items():
        if item.get_closest_marker(tier) and (lacking := find_lacking()):
            if tier in REQUIRED:
                pytest.fail(f"KABPF_REQUIRE={tier}, but {lacking}", pytrace=False)
            pytest.skip(f"{lacking}; KABPF_REQUIRE={tier} makes this a failure")


@functools.cache
def _lacking_for_kernel() -> str:
    if os.geteuid() != 0:
        return "it takes root"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "the kernel has no BTF"
    if subprocess.run(["bpftool", "prog", "list"], capture_output=True).returncode:
        return "the kernel refuses bpf(2), as in a container that filters system calls"
    return ""


@functools.cache
def _lacking_for_system() -> str:
    if lacking := _lacking_for_kernel():
        return lacking
    for program, package in (("mmdebstrap", "mmdebstrap"), ("systemd-nspawn", "systemd-container")):
        if not shutil.which(program):
            return f"there is no {program} (Debian's package {package})"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "the kernel refuses a mount namespace, as in a container without CAP_SYS_ADMIN"
    return _lacking_to_look_into_processes()


@functools.cache
def _lacking_for_ancestors() -> str:
    for library in ("libkeepalive", "libdontdie"):
        environment = {**os.environ, "LD_PRELOAD": f"{library}.so"}
        # The loader says what it does not find, and goes on without.
        if subprocess.run(["true"], env=environment, capture_output=True).stderr:
            return f"there is no {library}.so (Debian's package {library}0)"
    return _lacking_to_look_into_processes()


def _lacking_to_look_into_processes() -> str:
    own = os.pidfd_open(os.getpid())
    copy = ctypes.CDLL(None).syscall(438, own, own, 0)  # pidfd_getfd
    os.close(own)
    if copy < 0:
        return "the kernel refuses pidfd_getfd(2), as in a container that filters system calls"
    os.close(copy)
    return ""


def _lacking_for_matrix() -> str:
    return "" if os.uname().release.startswith("5.10.") else "it takes Linux 5.10: tests/matrix/run"


TIERS = {
    "kernel": _lacking_for_kernel,
    "system": _lacking_for_system,
    "ancestors": _lacking_for_ancestors,
    "matrix": _lacking_for_matrix,
}
