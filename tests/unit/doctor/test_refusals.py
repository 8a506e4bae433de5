"""What is said below an error of bpf(2)."""

from __future__ import annotations

import errno

import pytest

from kabpf.doctor import refusals
from kabpf.doctor.checks import Check, Here
from kabpf.doctor.findings import Findings, ok, warning
from kabpf.errors import BpfError, KabpfError, RefusedError, all_refusals


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check finds something odd, and something in order."""

    def odd(name: str) -> Check:
        def found(_: Here) -> Findings:
            yield ok("in order")
            yield warning(f"{name} is odd", f"mend {name}")

        return Check(found)

    monkeypatch.setattr(refusals, "CHECKS", {name: odd(name) for name in refusals.CHECKS})


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (errno.EPERM, ["capabilities", "bpf(2)", "lockdown", "neighbours"]),
        (errno.EBUSY, ["neighbours", "pins"]),
        (errno.E2BIG, ["neighbours", "limits"]),
        (errno.ENOSPC, ["limits", "bpffs"]),
        (errno.ENOENT, []),
    ],
)
def test_refusal_says_what_doctor_knows(error: int, names: list[str]) -> None:
    """What the checks find that look at what is answered so, with its remedy."""
    expected = [line for name in names for line in (f"  {name} is odd", f"    fix: mend {name}")]
    assert refusals.explained(BpfError("attach", error)) == expected


@pytest.mark.parametrize("problem", [KabpfError("a"), RefusedError("make a", errno.EPERM)])
def test_other_errors_say_no_more(problem: KabpfError) -> None:
    """They have nothing to do with bpf(2)."""
    assert refusals.explained(problem) == []


def test_refusals_together_are_explained() -> None:
    """One of bpf(2) among several keeps its errno."""
    problems = (
        RefusedError("read a", errno.EPERM),
        BpfError("attach b", errno.ENOSPC),
        BpfError("attach b", errno.ENOSPC),
    )
    with pytest.raises(BpfError) as raised, all_refusals() as collected:
        for problem in problems:
            with collected():
                raise problem
    assert str(raised.value) == (
        "read a: Operation not permitted; attach b: No space left on device"
    )
    assert raised.value.error == errno.ENOSPC
    assert refusals.explained(raised.value)[0] == "  limits is odd"
