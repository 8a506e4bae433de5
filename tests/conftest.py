"""Tiers: what needs the kernel is skipped where it can't run, and fails where it is required."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

KERNEL = Path(__file__).parent / "kernel"
REQUIRED = os.environ.get("KABPF_REQUIRE", "").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if KERNEL in item.path.parents:
            item.add_marker("kernel")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernel") and (lacking := _lacking()):
        if "kernel" in REQUIRED:
            pytest.fail(f"KABPF_REQUIRE=kernel, but {lacking}", pytrace=False)
        pytest.skip(f"{lacking}; KABPF_REQUIRE=kernel makes this a failure")


@functools.cache
def _lacking() -> str:
    if os.geteuid() != 0:
        return "it takes root"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "the kernel has no BTF"
    if subprocess.run(["bpftool", "prog", "list"], capture_output=True).returncode:
        return "the kernel refuses bpf(2), as in a container that filters system calls"
    return ""
