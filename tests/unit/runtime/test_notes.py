"""What commands leave for one another in /run/kabpf, and what becomes of it when it is damaged."""

import json
import os

import pytest

from kabpf.kernel import abi
from kabpf.plan.desired import Actual
from kabpf.plan.state import FORMER_MAX, CgroupEntry, Changes, PolicyRecord
from kabpf.policy.model import Options, Range
from kabpf.runtime import notes
from kabpf.runtime.notes import APPLIED, FORMER, REQUEST, Applied, Begun


def _record(name, idle):
    return PolicyRecord(name, Options(idle_s=Range(idle, idle)))


RECORDS = {id: _record(f"p{id}", 60 + id) for id in range(1, 7)}
EVERYTHING = range(1, 1000)
FORGOTTEN = Changes(cgroups={id: CgroupEntry(0, 0, forgot=True) for id in EVERYTHING})


def test_former_policies_are_read_back(tmp_path):
    """Each cgroup has its policy and the former ones of it, the latest first."""
    actual = Actual(
        records=RECORDS, cgroups={7: CgroupEntry(3, 2, False, (1,)), 8: CgroupEntry(3, 0)}
    )
    notes.keep_former(actual, tmp_path)
    kept = notes.former(EVERYTHING, tmp_path)
    assert kept.records == {1: RECORDS[1], 2: RECORDS[2]}
    assert kept.cgroups == {7: CgroupEntry(0, 0, False, (2, 1))}


def test_former_policies_of_cgroups_that_are_gone_are_left_out(tmp_path):
    """Only cgroups that are there have entries."""
    notes.keep_former(
        Actual(records=RECORDS, cgroups={7: CgroupEntry(3, 2), 8: CgroupEntry(3, 2)}), tmp_path
    )
    assert notes.former({8}, tmp_path).cgroups == {8: CgroupEntry(0, 0, False, (2,))}


def test_no_more_former_policies_are_kept_than_the_kernel_has_room_for(tmp_path):
    """A cgroup's policy and as many former ones are more by one: the oldest goes."""
    was = tuple(range(1, FORMER_MAX + 1))
    notes.keep_former(Actual(records=RECORDS, cgroups={7: CgroupEntry(3, 6, False, was)}), tmp_path)
    (entry,) = notes.former(EVERYTHING, tmp_path).cgroups.values()
    assert (entry.was, entry.forgot) == ((6, *was[:-1]), True)
    assert abi.read_entry(abi.entry(entry)) == entry


def test_what_was_forgotten_is_not_read_back(tmp_path):
    """Once the kernel has it again the file is gone, and it may be gone before."""
    notes.keep_former(Actual(records=RECORDS, cgroups={7: CgroupEntry(3, 2)}), tmp_path)
    notes.forget_former(tmp_path)
    notes.forget_former(tmp_path)
    assert notes.former(EVERYTHING, tmp_path) == Changes()


def _kept(**changed):
    raw = abi.policy(RECORDS[1]).hex()
    cgroups = {"7": {"was": [1], "forgot": False}}
    kept = {"layout": abi.LAYOUT, "policies": {"1": raw}, "cgroups": cgroups}
    return json.dumps(kept | changed).encode()


def _altered(offset, byte):
    raw = bytearray(abi.policy(RECORDS[1]))
    raw[offset] = byte
    return {"1": raw.hex()}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        _kept()[:-3],
        _kept(layout=abi.LAYOUT + 1),
        _kept(layout=None),
        _kept(policies=None),
        _kept(policies=[1]),
        _kept(policies={"1": "xyz"}),
        _kept(policies={"1": "00"}),
        _kept(policies={"1": 7}),
        _kept(policies={"0": abi.policy(RECORDS[1]).hex()}),
        _kept(policies={"-1": abi.policy(RECORDS[1]).hex()}),
        _kept(policies={"4096": abi.policy(RECORDS[1]).hex()}),
        _kept(policies={"one": abi.policy(RECORDS[1]).hex()}),
        _kept(policies=_altered(abi.CPolicy.mode.offset, 77)),
        _kept(policies=_altered(abi.CPolicy.flags.offset, 0)),
        _kept(policies=_altered(abi.CPolicy.name.offset, 0)),
        _kept(policies=_altered(abi.CPolicy.name.offset, 0xFF)),
        _kept(cgroups=None),
        _kept(cgroups=[7]),
        _kept(cgroups={"seven": {"was": [1], "forgot": False}}),
        _kept(cgroups={"7": 1}),
        _kept(cgroups={"7": [1]}),
        _kept(cgroups={"7": {"was": 1, "forgot": False}}),
        _kept(cgroups={"7": {"was": [[1]], "forgot": False}}),
    ],
)
def test_damaged_former_policies_are_forgotten(tmp_path, content):
    """Whatever the file holds, reading it raises nothing; there were policies, and nobody knows
    which."""
    (tmp_path / FORMER).write_bytes(content)
    assert notes.former(EVERYTHING, tmp_path) == FORGOTTEN


@pytest.mark.parametrize(
    ("applied", "was_loaded", "kept"),
    [(False, False, Changes()), (True, False, FORGOTTEN), (False, True, FORGOTTEN)],
)
def test_former_policies_that_were_not_kept(tmp_path, applied, was_loaded, kept):
    """At the first load there were none; after another one they are forgotten."""
    if applied:
        notes.keep_applied(Applied("stamp", False, {}), tmp_path)
    assert notes.former(EVERYTHING, tmp_path, was_loaded=was_loaded) == kept


@pytest.mark.parametrize("digest", [0, 7])
@pytest.mark.parametrize("forgot", [False, True])
def test_what_is_not_known_of_a_cgroup_is_kept(tmp_path, digest, forgot):
    """That its former policies are forgotten; destinations are, as they are not kept."""
    records = {1: RECORDS[1]._replace(digest=digest)}
    entry = CgroupEntry(3, 1, forgot=forgot)
    notes.keep_former(Actual(records=records, cgroups={7: entry}), tmp_path)
    assert notes.former(EVERYTHING, tmp_path).cgroups == {
        7: CgroupEntry(0, 0, was=(1,), forgot=forgot or digest != 0)
    }


@pytest.mark.parametrize(
    "cgroups",
    [
        {"7": {"was": [1, 1, 1, 1, 1, 1], "forgot": "yes"}},
        {"7": {"was": [True, 1.0], "forgot": 7}},
        {"7": {"was": [9, "1", None], "forgot": None}},
        {"-7": {"was": [1], "forgot": False}},
    ],
    ids=["too many", "other types", "unknown ids", "no cgroup"],
)
def test_strange_former_policies_can_be_written_to_the_kernel(tmp_path, cgroups):
    """What is read has room in the maps."""
    (tmp_path / FORMER).write_bytes(_kept(cgroups=cgroups))
    for id, entry in notes.former(EVERYTHING, tmp_path).cgroups.items():
        assert id in EVERYTHING
        assert set(abi.read_entry(abi.entry(entry)).was) <= {1}


def test_what_was_applied_is_read_back(tmp_path):
    """It is the same."""
    applied = Applied(
        "stamp", True, {"web": "/etc/kabpf/policy.yaml:3"}, "refused", 3, 1.5, "lasting", 0.25
    )
    notes.keep_applied(applied, tmp_path)
    assert notes.read_applied(tmp_path) == applied


GOOD = (
    b'{"stamp": "s", "asks": true, "sources": {"web": "f:1"}, "refused": "", "unrecorded": 3, '
    b'"looked_at": 0.5, "lasting": "l", "took_s": 0.25}'
)


def test_good_note_is_one(tmp_path):
    """What the damaged ones are made of."""
    (tmp_path / APPLIED).write_bytes(GOOD)
    assert notes.read_applied(tmp_path) == Applied("s", True, {"web": "f:1"}, "", 3, 0.5, "l", 0.25)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        GOOD.replace(b'{"web": "f:1"}', b"null"),
        GOOD.replace(b'"f:1"', b"7"),
        GOOD.replace(b'"s"', b"7"),
        GOOD.replace(b"true", b"7"),
        GOOD.replace(b'"refused"', b'"more": 7, "refused"'),
        GOOD.replace(b"0.5", b'"0.5"'),
        GOOD.replace(b"0.5", b"NaN"),
        GOOD.replace(b"0.5", b"-1"),
        GOOD.replace(b'"unrecorded": 3, ', b""),
    ],
)
def test_damaged_notes_of_what_was_applied_count_as_none(tmp_path, content):
    """Whatever the file holds, reading it raises nothing, and the next one replaces it."""
    (tmp_path / APPLIED).write_bytes(content)
    assert notes.read_applied(tmp_path) is None
    notes.keep_applied(Applied("stamp", False, {}), tmp_path)
    assert notes.read_applied(tmp_path) == Applied("stamp", False, {})


@pytest.mark.parametrize(
    ("noted", "totals", "expected"), [(3, 3, (0, 9.5)), (3, 5, (2, 9.5)), (7, 5, (5, 0))]
)
def test_what_was_not_recorded_counts_from_the_last_look(tmp_path, noted, totals, expected):
    """A full look has mended what was before; a smaller sum is another data plane's."""
    notes.keep_applied(Applied("stamp", False, {}, "", noted, 9.5), tmp_path)
    assert notes.not_recorded(totals, tmp_path) == expected
    assert notes.not_recorded(totals, tmp_path / "none") == (totals, 0)


@pytest.mark.parametrize("name", [FORMER, APPLIED])
def test_directory_in_the_place_of_a_note_is_none(tmp_path, name):
    """What can't be read or replaced is left alone."""
    (tmp_path / name).mkdir()
    notes.keep_former(Actual(records=RECORDS, cgroups={7: CgroupEntry(3, 2)}), tmp_path)
    notes.keep_applied(Applied("stamp", False, {}), tmp_path)
    notes.forget_former(tmp_path)
    assert notes.former(EVERYTHING, tmp_path) == FORGOTTEN
    if name == APPLIED:
        assert notes.read_applied(tmp_path) is None


def test_notes_are_roots_alone_whatever_the_umask(tmp_path):
    """Others can't write them, and a note that others may have written is not read."""
    applied = notes.Applied("stamp", asks=False, sources={})
    before = os.umask(0)
    try:
        notes.keep_former(Actual(records=RECORDS, cgroups={7: CgroupEntry(3, 2)}), tmp_path)
        notes.keep_applied(applied, tmp_path)
    finally:
        os.umask(before)
    files = [tmp_path / name for name in (notes.FORMER, notes.APPLIED)]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 2
    assert notes.read_applied(tmp_path) == applied
    for file in files:
        file.chmod(0o666)
    assert notes.read_applied(tmp_path) is None
    assert notes.former(EVERYTHING, tmp_path) == FORGOTTEN


def test_what_a_request_has_begun_is_read_back(tmp_path):
    """Until it is forgotten; what is damaged is not read."""
    begun = Begun(7, {"7": "/a"})
    assert notes.read_begun(tmp_path) is None
    notes.keep_begun(begun, tmp_path)
    assert notes.read_begun(tmp_path) == begun
    for key, wrong in (("cgroup_id", "7"), ("cgroup_id", 8), ("paths", {"/a": "7"}), ("paths", [])):
        (tmp_path / REQUEST).write_text(json.dumps(begun._asdict() | {key: wrong}))
        assert notes.read_begun(tmp_path) is None
    notes.forget_begun(tmp_path)
    notes.forget_begun(tmp_path)
