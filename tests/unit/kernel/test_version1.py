"""Cgroups of version 1 are told apart from what is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, version1
from kabpf.kernel.mountinfo import Mount


@pytest.fixture
def mounts(tmp_path: Path) -> list[Mount]:
    """A hierarchy of version 1 with one cgroup, which has this process, and an empty one."""
    for name, content in (("docker/abc", f"{os.getpid()}\n4194304\n"), ("docker/empty", "")):
        directory = tmp_path / "memory" / name
        directory.mkdir(parents=True)
        (directory / "cgroup.procs").write_text(content)
    return [
        Mount(0, "/", str(tmp_path / "unified"), "cgroup2"),
        Mount(0, "/", str(tmp_path / "memory"), "cgroup"),
    ]


@pytest.mark.parametrize("begin", ["", "{mount}"], ids=["path", "directory"])
def test_cgroup_of_version_1_is_said_with_its_processes(
    mounts: list[Mount], tmp_path: Path, begin: str
) -> None:
    """By its path in the hierarchy and by its directory; the processes' cgroups are named."""
    directory = tmp_path / "memory/docker/abc"
    path = begin.format(mount=tmp_path / "memory") + "/docker/abc"
    try:
        where = cgroups.path_of_process("self")
    except RefusedError:
        pytest.skip("this process is outside of its cgroup namespace")
    assert version1.described(path, mounts) == (
        f"{path} is a cgroup of version 1 ({directory}); its processes are in {where} of version 2"
    )


def test_empty_cgroup_of_version_1(mounts: list[Mount]) -> None:
    """One without a process says so."""
    assert version1.described("/docker/empty", mounts).endswith("; it has no process")


@pytest.mark.parametrize("path", ["/docker/none", "/", "/..", "/docker/abc/cgroup.procs"])
def test_what_is_none_is_not_described(mounts: list[Mount], path: str) -> None:
    """A path that is not there, a file, and what leads out of the mount."""
    assert version1.described(path, mounts) == ""
