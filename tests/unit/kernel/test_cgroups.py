"""The cgroup2 tree: found in mountinfo texts, and walked as the directories that it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel.cgroups import CgroupTree, find_tree
from kabpf.kernel.mountinfo import Mount, mounts
from kabpf.plan.state import Cgroup

UNIFIED = """\
22 28 0:21 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
26 22 0:22 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
27 22 0:23 / /sys/fs/bpf rw,nosuid,nodev,noexec,relatime shared:11 - bpf bpf rw,mode=700
"""
HYBRID = """\
25 22 0:22 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
26 25 0:23 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec shared:10 - cgroup2 cgroup2 rw
27 25 0:24 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
28 25 0:29 / /sys/fs/cgroup/memory rw,nosuid,nodev shared:15 - cgroup cgroup rw,memory
"""
VERSION_1 = """\
28 25 0:29 / /sys/fs/cgroup/memory rw,nosuid,nodev shared:15 - cgroup cgroup rw,memory
"""
# In a cgroup namespace: the first was mounted outside, the second shows the namespace's root.
NAMESPACE = """\
610 600 0:22 /.. /host/cgroup ro,nosuid - cgroup2 cgroup2 rw
611 600 0:22 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw
"""
OUTSIDE = """\
610 600 0:22 /../../machine.slice /sys/fs/cgroup ro,nosuid - cgroup2 cgroup2 rw
"""
SEVERAL = """\
26 22 0:22 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw
90 26 0:22 / /run/other/cgroup2 rw,relatime shared:9 - cgroup2 none rw
"""
ESCAPED = r"""
30 22 0:22 / /mnt/a\040b\011c\134d rw - cgroup2 none rw
"""
# A name may hold whatever the kernel does not escape, and the line has no, one or many tags.
UNUSUAL = (
    "40 22 0:40 / /home/a\x0cb rw - tmpfs none rw\n"
    "41 22 0:41 / /home/a\u2028b\x85c\xa0d rw - fuse.sshfs a:\x1c/ rw\n"
    "42 22 0:42 / /home/\udcff rw master:1 propagate_from:2 unbindable - tmpfs \udcff rw\n"
    "43 22 0:43 / /home/-\\040-\\040cgroup2 rw - tmpfs none rw\n"
) + UNIFIED


@pytest.mark.parametrize(
    ("mountinfo", "point"),
    [
        (UNIFIED, "/sys/fs/cgroup"),
        (HYBRID, "/sys/fs/cgroup/unified"),
        (NAMESPACE, "/sys/fs/cgroup"),
        (SEVERAL, "/sys/fs/cgroup"),
        (ESCAPED[1:], "/mnt/a b\tc\\d"),
        (UNUSUAL, "/sys/fs/cgroup"),
    ],
    ids=["unified", "hybrid", "namespace", "several", "escaped", "unusual"],
)
def test_tree_is_found_in_mountinfo(mountinfo: str, point: str) -> None:
    """The tree is the first cgroup2 mount that shows the root of the cgroup namespace."""
    assert find_tree(mounts(os.fsencode(mountinfo))).mount == Path(point)


@pytest.mark.parametrize(
    "mountinfo", ["", VERSION_1, OUTSIDE], ids=["none", "version 1", "outside"]
)
def test_machine_without_a_tree_is_refused(mountinfo: str) -> None:
    """Where no cgroup2 mount shows the namespace's root, the message says what is expected."""
    with pytest.raises(UnsupportedError) as raised:
        find_tree(mounts(os.fsencode(mountinfo)))
    assert str(raised.value) == (
        "no cgroup2 tree is mounted whose root is this cgroup namespace's;"
        " mount one at /sys/fs/cgroup, as systemd does"
    )


def test_mountinfo_is_read_line_by_line() -> None:
    """Each mount has its device, its root, where it is and its type, whatever is in the names."""
    device = os.makedev(0, 41)
    found = mounts(os.fsencode(UNUSUAL))
    assert found[1] == Mount(device, "/", "/home/a\u2028b\x85c\xa0d", "fuse.sshfs")
    assert [mount.point for mount in found[2:4]] == ["/home/\udcff", "/home/- - cgroup2"]
    assert len(found) == 7


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/sys/fs/cgroup/unified", "/"),
        ("/sys/fs/cgroup/unified/", "/"),
        ("/sys/fs/cgroup/unified/a.slice/b.service", "/a.slice/b.service"),
        ("/sys/fs/cgroup/unified//a/./b/../c/", "/a/c"),
        ("//sys/fs/cgroup/unified/a", "/a"),
        ("/sys/fs/cgroup/unified-not/a", "/sys/fs/cgroup/unified-not/a"),
        ("/a.slice/b.service", "/a.slice/b.service"),
        ("/a.slice/", "/a.slice"),
        ("//a.slice", "/a.slice"),
        ("/", "/"),
        ("//", "/"),
        ("/../a", "/a"),
    ],
)
def test_path_is_relative_to_the_mount(given: str, path: str) -> None:
    """A directory below the mount and a cgroup path name the same cgroup, however they are put."""
    assert CgroupTree(Path("/sys/fs/cgroup/unified")).path(given) == path


def test_relative_path_starts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the tree a relative path is what a shell takes it for; elsewhere it is refused."""
    tree = CgroupTree(tmp_path / "tree")
    (tmp_path / "tree/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tree/a")
    assert [tree.path(path) for path in (".", "b", "..", "../c")] == ["/a", "/a/b", "/", "/c"]
    monkeypatch.chdir(tmp_path)
    assert tree.path("tree/a") == "/a"
    with pytest.raises(RefusedError) as raised:
        tree.path("a")
    assert str(raised.value) == f"cgroup a, expected a directory below {tmp_path}/tree"


def test_every_cgroup_is_listed_after_its_parent(tmp_path: Path) -> None:
    """The cgroups are the directories of the tree, by inode number, the root first."""
    for name in ("a/b/c", "a/d", "é"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").touch()
    found = CgroupTree(tmp_path).cgroups()
    assert found[0] == Cgroup(tmp_path.stat().st_ino, 0, "/")
    assert sorted(cgroup.path for cgroup in found) == ["/", "/a", "/a/b", "/a/b/c", "/a/d", "/é"]
    seen = {0}
    for cgroup in found:
        directory = tmp_path / cgroup.path[1:]
        assert cgroup.id == directory.stat().st_ino
        assert cgroup.parent_id in seen
        assert cgroup.path == "/" or cgroup.parent_id == directory.parent.stat().st_ino
        seen.add(cgroup.id)


def test_cgroups_below_one_are_listed_without_it(tmp_path: Path) -> None:
    """Below a cgroup are its children and theirs; below one that is gone there are none."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    tree = CgroupTree(tmp_path)
    assert [cgroup.path for cgroup in tree.below(tree.find("/a"))] == ["/a/b", "/a/b/c"]
    assert tree.below(Cgroup(1, 2, "/gone")) == []


def test_cgroup_is_found_by_its_path_or_directory(tmp_path: Path) -> None:
    """find gives the same cgroup as the list, also for the root."""
    (tmp_path / "a/b").mkdir(parents=True)
    tree = CgroupTree(tmp_path)
    root, a, b = tree.cgroups()
    assert [tree.find(path) for path in ("/", "/a", "/a/b")] == [root, a, b]
    assert tree.find(f"{tmp_path}/a/b/") == b


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none", "No such file or directory"),
        ("/none/none", "No such file or directory"),
        ("/file", "Not a directory"),
        ("/link", "Not a directory"),
        ("/file/a", "Not a directory"),
        ("/" + "x" * 256, "File name too long"),
    ],
)
def test_path_without_a_cgroup_is_refused(tmp_path: Path, path: str, reason: str) -> None:
    """What is no directory of the tree is refused with the reason and where one is expected."""
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(RefusedError) as raised:
        CgroupTree(tmp_path).find(path)
    assert str(raised.value) == f"cgroup {path}: {reason}, expected a directory below {tmp_path}"


def test_processes_are_those_of_the_paths_alone(tmp_path: Path) -> None:
    """Process ids come from cgroup.procs of these cgroups; 0, a process of another pid namespace,
    and cgroups that are gone are left out."""
    for name, text in (("a", "1\n0\n22\n"), ("a/b", "333\n"), ("c", "22\n4\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text(text)
    assert CgroupTree(tmp_path).processes(["/a", "/c", "/gone"]) == {1, 22, 4}
