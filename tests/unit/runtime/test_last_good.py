"""The last good policies: kept whole or not at all, and used only where root alone wrote them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kabpf.errors import PolicyError, RefusedError
from kabpf.policy import files
from kabpf.policy.files import Directories
from kabpf.policy.of_commands import RUNTIME, TRANSIENT
from kabpf.runtime import last_good

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="policy files belong to root")

UNIT = "select: [{{unit: a.service}}]\nkeepalive: {{idle: {}}}  # über\n"


@pytest.fixture
def where(tmp_path: Path) -> Directories:
    """A main file and two drop-in directories with a policy in each; one hides another."""
    for name in ("etc/policy.d", "usr/policy.d"):
        (tmp_path / name).mkdir(parents=True, mode=0o755)
    found = Directories(
        tmp_path / "etc/policy.yaml", (tmp_path / "etc/policy.d", tmp_path / "usr/policy.d")
    )
    found.main.write_text("defaults: {probes: 4}\n")
    put(found, 0, "b.yaml", UNIT.format(5))
    put(found, 1, "a.yaml", UNIT.format(6))
    put(found, 1, "c.yaml", UNIT.format(7))
    put(found, 0, "c.yaml", "")
    return found


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Where it is kept, which is not there yet."""
    return tmp_path / "state"


def put(where: Directories, strength: int, name: str, text: str) -> None:
    path = where.drop_ins[strength] / name
    fresh = path.with_name(f".{name}")  # another inode: the clock of file times may stand still
    fresh.write_text(text)
    fresh.rename(path)


def keep(where: Directories, state: Path) -> None:
    last_good.keep(files.snapshot(where), where, state)


def kept(state: Path) -> last_good.Kept:
    found = last_good.read(state)
    assert found
    return found


def test_kept_files_make_the_same_policies(where: Directories, state: Path) -> None:
    """Policies, their order, and the file and line of each value are those of the files."""
    keep(where, state)
    before = files.load(where)
    for directory in where.drop_ins:
        for path in directory.iterdir():
            path.unlink()
    after = kept(state).snapshot()
    assert after.policies == before
    assert [each.name for each in after.policies] == ["a", "b"]
    assert [each.origins for each in after.policies] == [each.origins for each in before]
    assert after.stamp not in (files.stamp(where), files.snapshot(where).stamp)


def test_nothing_is_kept_at_first(state: Path) -> None:
    """Without the directory, and without a file in it, there is nothing."""
    assert last_good.read(state) is None
    state.mkdir()
    assert last_good.read(state) is None


def test_only_root_can_read_it(where: Directories, state: Path) -> None:
    """Whatever the umask says."""
    before = os.umask(0)
    try:
        keep(where, state)
    finally:
        os.umask(before)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / last_good.NAME).stat().st_mode) == 0o600
    assert os.listdir(state) == [last_good.NAME]


def test_it_is_written_only_where_it_differs(where: Directories, state: Path) -> None:
    """The same files are kept once; a change is kept, and a file that is gone is kept no more."""
    keep(where, state)
    first = (state / last_good.NAME).stat().st_ino, kept(state)
    keep(where, state)
    assert ((state / last_good.NAME).stat().st_ino, kept(state)) == first
    put(where, 0, "b.yaml", UNIT.format(66))
    keep(where, state)
    assert [each.rules.options.idle_s for each in kept(state).snapshot().policies][1] == (66, 66)
    (where.drop_ins[0] / "b.yaml").unlink()
    keep(where, state)
    assert [each.name for each in kept(state).snapshot().policies] == ["a"]


def test_files_that_changed_meanwhile_are_not_kept(where: Directories, state: Path) -> None:
    """What is active was made of other texts than those that would be read now."""
    snapshot = files.snapshot(where)
    put(where, 0, "b.yaml", "keepalive: wrong\n")
    last_good.keep(snapshot, where, state)
    assert last_good.read(state) is None


def test_kept_policies_are_not_kept_again(where: Directories, state: Path) -> None:
    """Beside wrong files the last good ones are active, and stay what is kept."""
    keep(where, state)
    before = (state / last_good.NAME).read_bytes()
    put(where, 0, "b.yaml", "keepalive: wrong\n")
    last_good.keep(kept(state).snapshot(), where, state)
    assert (state / last_good.NAME).read_bytes() == before


def test_files_that_commands_write_do_not_last(tmp_path: Path) -> None:
    """Drop-ins in /run are left out by the names and directories that commands give them; what a
    person writes there lasts as long as it is there."""
    where = Directories(tmp_path / "policy.yaml", (RUNTIME, tmp_path, TRANSIENT))
    put(where, 1, "a.yaml", UNIT.format(5))
    commands = [RUNTIME / "zz-attach-x.yaml", RUNTIME / "user-1-2.yaml", TRANSIENT / "y.yaml"]
    listed = {
        RUNTIME: ["zz-attach-x.yaml", "user-1-2.yaml", "hand.yaml"],
        TRANSIENT: ["y.yaml"],
        tmp_path: ["a.yaml"],
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "_names", lambda directory: listed[directory])
        marks = files.marks(where)
        assert marks.keys() > {*commands, tmp_path / "a.yaml"}
        assert [*files.lasting(where, marks)] == [tmp_path / "a.yaml", RUNTIME / "hand.yaml"]
    text = UNIT.format(5)
    kept = last_good.Kept(
        0, "", ((str(tmp_path / "a.yaml"), text), (str(RUNTIME / "no.yaml"), text))
    )
    assert [each.name for each in kept.snapshot().policies] == ["a"]


def damaged(text: bytes) -> dict[str, bytes]:
    head, _, body = text.partition(b"\n")
    other = json.dumps(json.loads(head) | {"version": last_good.VERSION + 1}).encode()
    bare = json.dumps({"version": last_good.VERSION}).encode()
    return {
        "empty": b"",
        "cut": text[:-1],
        "another letter": text.replace(b"idle", b"idel"),
        "no body": head,
        "no digest": bare + b"\n" + body,
        "a list": b"[]\n[]",
        "deep": b"[" * 100_000,
        "not UTF-8": b"\xff\n\xff",
        "another version's": other + b"\n" + body,
    }


@pytest.mark.parametrize("what", damaged(b'{}\n[["a", "idle"]]'))
def test_damaged_file_is_refused_and_replaced(where: Directories, state: Path, what: str) -> None:
    """It says so by its name, makes no policy, and is written anew by the next apply."""
    keep(where, state)
    file = state / last_good.NAME
    file.write_bytes(damaged(file.read_bytes())[what])
    problem = "of another version of kabpf" if "version" in what else "damaged"
    with pytest.raises(RefusedError) as raised:
        last_good.read(state)
    assert str(raised.value) == f"{file}: {problem}; try: kabpfctl apply"
    keep(where, state)
    assert [each.name for each in kept(state).snapshot().policies] == ["a", "b"]


def test_policies_that_are_refused_by_now_are_no_policies(where: Directories, state: Path) -> None:
    """What another version took and this one does not raises as a policy file does."""
    keep(where, state)
    odd = kept(state)._replace(texts=(("/etc/a.service.yaml", "keepalive: {idel: 5}\n"),))
    with pytest.raises(PolicyError, match=r"/etc/a\.service\.yaml:1: keepalive\.idel: unknown key"):
        odd.snapshot()


@pytest.mark.parametrize("target", ["file", "directory"])
@pytest.mark.parametrize("how", ["owner", "group", "others", "link"])
def test_what_others_may_write_is_refused(
    where: Directories, state: Path, target: str, how: str
) -> None:
    """Whoever can write the file could have any policy become active at a boot."""
    keep(where, state)
    path = state / last_good.NAME if target == "file" else state
    if how == "owner":
        os.chown(path, 65534, 0)
    elif how == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    else:
        path.chmod(path.stat().st_mode | (stat.S_IWGRP if how == "group" else stat.S_IWOTH))
    with pytest.raises(RefusedError, match="root alone must" if how != "link" else "read"):
        last_good.read(state)


def test_foreign_directory_is_not_written_to(where: Directories, state: Path) -> None:
    """There the file could be replaced by its owner; applying policies does not fail of it."""
    state.mkdir()
    os.chown(state, 65534, 0)
    keep(where, state)
    assert os.listdir(state) == []


def test_removed_files_are_forgotten(where: Directories, state: Path) -> None:
    """What a command has removed does not come back; the rest stays, and other files change
    nothing."""
    last_good.forget([Path("/none")], state)
    keep(where, state)
    before = (state / last_good.NAME).stat().st_ino
    last_good.forget([Path("/none")], state)
    assert (state / last_good.NAME).stat().st_ino == before
    last_good.forget([where.drop_ins[0] / "b.yaml"], state)
    assert [each.name for each in kept(state).snapshot().policies] == ["a"]
    keep(where, state)  # the file is there still, and applied again
    assert [each.name for each in kept(state).snapshot().policies] == ["a", "b"]


@pytest.mark.parametrize("step", ["write the last good policies", "rename the last good policies"])
def test_killed_writer_leaves_what_was_kept(where: Directories, state: Path, step: str) -> None:
    """A process that dies before either step leaves the former file whole, and the next one
    writes."""
    keep(where, state)
    before = kept(state)
    put(where, 0, "b.yaml", UNIT.format(8))
    script = (
        "from pathlib import Path; from kabpf.policy import files; from kabpf.runtime import"
        " last_good; from kabpf.policy.files import Directories;"
        f" where = Directories(Path({str(where.main)!r}), ("
        + "".join(f"Path({str(each)!r})," for each in where.drop_ins)
        + f")); last_good.keep(files.snapshot(where), where, Path({str(state)!r}))"
    )
    environment = {**os.environ, "KABPF_FAULT": f"{step}, 1"}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment)
    assert done.returncode == -9
    assert kept(state) == before
    keep(where, state)
    assert kept(state).texts != before.texts
    assert os.listdir(state) == [last_good.NAME]
