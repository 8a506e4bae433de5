"""What requests make active; tests/kernel/test_requests_in_kernel.py has it in the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kabpf.apply import dropins, owned, waiting
from kabpf.apply.owned import Attached
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import FORMER_MAX, Cgroup, PolicyRecord
from kabpf.policy.files import Snapshot
from kabpf.policy.model import Options, Policy, Rules, Selector, Until
from kabpf.policy.yaml import Source
from kabpf.requests import methods
from kabpf.requests.methods import POLICIES_MAX, RECORDS_MAX, _Active
from kabpf.requests.varlink import CallError
from kabpf.runtime import notes
from kabpf.runtime.notes import Applied, Begun

UID = 4_242_424
CGROUP = Cgroup(7, 0, "/user.slice/x")
SOURCE = Source("/run/kabpf/policy.d/user-4242424-7.yaml", 1)
POLICY = Policy(
    "user-4242424-7",
    (Selector("cgroup", CGROUP.path, SOURCE),),
    Rules(Options()),
    SOURCE,
    until=Until(CGROUP.path, CGROUP.id),
    owner=UID,
)


class Done:
    """What a request would have done."""

    def __init__(self) -> None:
        self.reconciled: list[str] = []
        self.attached: list[Attached | None] = []
        self.noted: list[str] = []


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """Keeps what is done, in place of doing it, where "all-before" was applied last."""
    one = Done()

    def activate(*given: Any, again: bool) -> dict[int, Any]:
        one.attached.append(given[4])
        return {}

    monkeypatch.setattr(owned, "activate", activate)
    monkeypatch.setattr(
        dropins, "activate", lambda snapshot, _: one.reconciled.append(snapshot.stamp)
    )
    monkeypatch.setattr(notes, "read_applied", lambda _: Applied("all-before", False, {}))
    monkeypatch.setattr(notes, "keep_applied", lambda applied, _: one.noted.append(applied.stamp))
    monkeypatch.setattr(notes, "forget_begun", lambda _: None)
    monkeypatch.setattr(methods, "tell_changed", lambda: None)
    return one


def active(tree: Any, policies: tuple[Policy, ...] = ()) -> _Active:
    standing: Any = type(
        "", (), {"active": lambda _: waiting.Active(Snapshot("all-a", policies), {})}
    )
    return _Active(tree, None, standing())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stamp", "reconciled"),
    [("all-after", []), ("more-after", ["more-after"]), (waiting.STAMP, [])],
)
def test_file_of_a_killed_command_is_not_taken_for_applied(
    done: Done, stamp: str, reconciled: list[str]
) -> None:
    """Where more than users' files has changed since, the request reconciles."""
    active(None).put(Snapshot(stamp, ()))
    assert done.reconciled == reconciled
    assert done.noted == ([] if reconciled else [stamp])


@pytest.mark.parametrize("is_theirs", [True, False])
def test_cgroup_that_is_somebody_elses_by_now_does_not_get_the_policy(
    done: Done, is_theirs: bool
) -> None:
    """The request that wrote it was killed, and the next one goes on."""

    class Tree(CgroupTree):
        def __init__(self) -> None: ...

        def belongs_to(self, cgroup: Cgroup, uid: int) -> bool:
            return is_theirs and (cgroup.id, uid) == (CGROUP.id, UID)

        def has(self, cgroup: Cgroup) -> bool:
            return True

    one = active(Tree(), (POLICY,))
    one.finish(Begun(CGROUP.id, {str(CGROUP.id): CGROUP.path}))
    (attached,) = done.attached
    assert (attached and attached.policy) == (POLICY if is_theirs else None)
    found = one.resolver(Snapshot("", (POLICY,))).automaton.owned
    assert found == ({CGROUP.id: POLICY} if is_theirs else {})


@pytest.mark.parametrize("also", [False, True], ids=["taken back", "left to root"])
def test_killed_request_that_can_not_be_completed_keeps_nobody_out(
    done: Done,
    also: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its policy is taken back; where that is refused, too, it is noted as refused, and the next
    request goes on all the same."""
    file = tmp_path / SOURCE.path.rpartition("/")[2]
    file.touch()
    forgotten = 0

    def refuse(*_: Any, again: bool) -> dict[int, Any]:
        if also or file.exists():
            raise RefusedError("no room")
        return {}

    def forget(_: Path) -> None:
        nonlocal forgotten
        forgotten += 1

    noted: list[Applied] = []
    monkeypatch.setattr(owned, "activate", refuse)
    monkeypatch.setattr(dropins, "RUNTIME", tmp_path)
    monkeypatch.setattr(notes, "forget_begun", forget)
    monkeypatch.setattr(notes, "keep_applied", lambda applied, _: noted.append(applied))
    active(None).finish(Begun(CGROUP.id, {str(CGROUP.id): CGROUP.path}))
    assert not file.exists()
    assert forgotten == 1
    (said,) = (each.getMessage() for each in caplog.records)
    what = "the rest of a killed request for /user.slice/x"
    if also:
        assert [each.refused for each in noted] == [f"{what} can't be taken back: no room"]
        assert said == f"{noted[0].refused}; try: kabpfctl apply"
    else:
        assert said == f"{what} was taken back: no room"


def test_every_former_policy_that_is_remembered_counts() -> None:
    """Also those that have one name, as a cgroup has that was attached again and again."""
    records = [
        PolicyRecord(dropins.owned_name(UID, cgroup), Options(), existing=bool(number % 2))
        for cgroup in range(POLICIES_MAX)
        for number in range(1 + FORMER_MAX)
    ]
    assert len(records) == RECORDS_MAX
    methods._check_records(records[1:], (), UID)
    methods._check_records(records, (), UID + 1)
    with pytest.raises(CallError, match="Refused"):
        methods._check_records(records, (), UID)
