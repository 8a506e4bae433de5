"""What the daemon knows of the policy files: the last good ones, and whether they have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabpf.daemon.policy_files import PolicyFiles
from kabpf.errors import PolicyError
from kabpf.policy import files
from kabpf.policy.files import Directories, Snapshot

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="policy files belong to root")

UNIT = "select: [{unit: a.service}]\nkeepalive: {idle: 5}\n"
WRONG = "select: []\n"


@pytest.fixture
def where(tmp_path: Path) -> Directories:
    """A main file's directory and one of drop-ins, empty."""
    for name in ("main", "policy.d"):
        (tmp_path / name).mkdir(mode=0o755)
    return Directories(tmp_path / "main/policy.yaml", (tmp_path / "policy.d",))


@pytest.fixture
def known(where: Directories) -> PolicyFiles:
    """Policy files of which nothing was read yet."""
    return PolicyFiles(where)


def put(where: Directories, name: str, text: str) -> Path:
    path = where.drop_ins[0] / name
    fresh = path.with_name(f".{name}")  # another inode: the clock of file times may stand still
    fresh.write_text(text)
    fresh.chmod(0o644)
    return fresh.rename(path)


def names(snapshot: Snapshot | None) -> list[str]:
    assert snapshot
    return [policy.name for policy in snapshot.policies]


@needs_root
def test_read_remembers_what_is_good(where: Directories, known: PolicyFiles) -> None:
    """What was read is the last good, with the stamp of its files; before, there is none."""
    put(where, "a.yaml", UNIT)
    assert known.good is None
    assert known.read() == known.good == files.snapshot(where)
    assert names(known.good) == ["a"]


@needs_root
def test_wrong_files_keep_the_last_good_ones(where: Directories, known: PolicyFiles) -> None:
    """Policies and stamp are the last good ones' together, until the files are good again."""
    put(where, "a.yaml", UNIT)
    good = known.read()
    put(where, "b.yaml", WRONG)
    with pytest.raises(PolicyError):
        known.read()
    assert known.good == good
    assert good.stamp != files.stamp(where)
    put(where, "b.yaml", UNIT)
    assert names(known.read()) == ["a", "b"]


@needs_root
def test_wrong_files_wait_for_a_change(where: Directories, known: PolicyFiles) -> None:
    """Files have changed when they differ from those read last, were these good or wrong."""
    assert known.have_changed()
    known.read()
    assert not known.have_changed()
    put(where, "a.yaml", WRONG)
    assert known.have_changed()
    with pytest.raises(PolicyError):
        known.read()
    assert not known.have_changed()
    put(where, "a.yaml", UNIT)
    assert known.have_changed()


@needs_root
def test_forgotten_policy_leaves_the_rest(where: Directories, known: PolicyFiles) -> None:
    """Policies that are over leave the last good ones; files that wait for a reload wait on."""
    for name in ("a.yaml", "b.yaml"):
        put(where, name, UNIT)
    good = known.read()
    put(where, "c.yaml", UNIT)
    left = known.forget(["a", "nobody"])
    assert names(left) == ["b"]
    assert left == known.good
    assert left.stamp == good.stamp
    assert known.have_changed()
