"""A tree is walked whatever its paths are, and what could not be reached is said."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabpf.kernel import walk
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.walk import Unread
from kabpf.plan.state import Cgroup

LONG = ["x" * 250] * 40  # 10,040 bytes
DEEP = ["d"] * 200  # more than are open at once


@pytest.fixture
def make(tmp_path: Path) -> Iterator[object]:
    """Makes directories step by step, as mkdir(2) takes no long path."""

    def make_names(names: list[str]) -> int:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        for name in names:
            os.makedirs(f"/proc/self/fd/{descriptor}/{name}", exist_ok=True)
            below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        inode = os.fstat(descriptor).st_ino
        os.close(descriptor)
        return inode

    yield make_names
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("names", [LONG, DEEP], ids=["long", "deep"])
def test_each_directory_is_found(make, tmp_path, names):
    """However long a path is, and however deep, with few descriptors, and with what is beside."""
    inode = make(names)
    beside = [make([*names[:depth], "beside"]) for depth in range(0, len(names), 7)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    tree, unread = CgroupTree(tmp_path), Unread()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
    try:
        found = {cgroup.id: cgroup for cgroup in tree.cgroups(unread)}
        opened = {cgroup.id for cgroup, _ in tree.opened(unread)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert unread == {}
    assert found.keys() == {tmp_path.stat().st_ino, *opened}
    assert {inode, *beside} < opened
    assert found[inode].path == "/" + "/".join(names)
    assert tree.has(found[inode])
    parents = {cgroup.parent_id for cgroup in found.values()}
    assert parents <= {0, *found}


def test_what_is_not_reached_is_said(make, tmp_path, monkeypatch):
    """A directory that can't be opened is there all the same, with its errno; the rest is found."""
    shut, inside, other = make(["shut"]), make(["shut", "a"]), make(["other", "b"])
    real = os.open

    def refuse(path: str, *arguments: int, **more: int) -> int:
        if path == "shut":
            raise OSError(errno.EMFILE, "")
        return real(path, *arguments, **more)

    monkeypatch.setattr(walk.os, "open", refuse)
    unread = Unread()
    tree = CgroupTree(tmp_path)
    found = {cgroup.id for cgroup in tree.cgroups(unread)}
    assert unread == {"/shut": errno.EMFILE}
    assert {shut, other} < found
    assert inside not in found
    assert not tree.has(Cgroup(1, shut, "/elsewhere"))


def test_removed_directory_is_no_unread_one(make, tmp_path):
    """What is gone is left out without a word."""
    make(["a", "b"])
    unread = Unread()
    for cgroup in (each for each, _ in CgroupTree(tmp_path).opened(unread)):
        if cgroup.name == "a":
            shutil.rmtree(tmp_path / "a")
    assert unread == {}
    assert CgroupTree(tmp_path).below(Cgroup(1, 0, "/a"), unread) == []
    assert unread == {}
