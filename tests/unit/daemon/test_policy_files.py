"""What the daemon knows of the policy files: the last good ones, and whether they have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabpf.daemon.policy_files import PolicyFiles
from kabpf.errors import PolicyError
from kabpf.policy import files
from kabpf.policy.files import Directories, Snapshot
from kabpf.runtime.last_good import Kept

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
def test_files_that_wait_are_not_read_with_transient_ones(
    where: Directories, known: PolicyFiles
) -> None:
    """What commands write is read without the files that wait for a reload: these go on waiting,
    and do not count as applied."""
    put(where, "a.yaml", UNIT)
    good = known.read()
    assert not known.are_waiting()
    put(where, "b.yaml", UNIT)
    assert known.are_waiting()
    assert names(known.follow()) == ["a"]
    assert known.good and known.good.policies == good.policies
    assert known.good.stamp not in (good.stamp, files.stamp(where))
    assert known.are_waiting() and known.have_changed()
    known.read()
    assert not known.are_waiting()


@needs_root
def test_kept_policies_are_the_last_good_ones(where: Directories, known: PolicyFiles) -> None:
    """Until the files are right, which they have then been for the first time."""
    put(where, "a.yaml", WRONG)
    with pytest.raises(PolicyError):
        known.read()
    kept = Kept(0, "kept", (("/etc/kabpf/policy.d/kept.yaml", UNIT),))
    assert known.restore(kept) == known.good
    assert names(known.good) == ["kept"] and known.good.lasting == "kept"
    assert not known.have_been_good
    put(where, "a.yaml", UNIT)
    assert names(known.read()) == ["a"]
    assert known.have_been_good
