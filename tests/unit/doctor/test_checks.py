"""kabpfctl doctor where it needs no kernel: checks that fail, the command."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from kabpfctl import as_nobody

from kabpf.doctor import checks
from kabpf.doctor.checks import Check, Here
from kabpf.doctor.findings import Finding, Findings, error, note, ok, warning
from kabpf.errors import PolicyError, RefusedError, UnsupportedError
from kabpf.kernel.dataplane import Totals
from kabpf.output import count


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (PolicyError("a.yaml:1: wrong"), note("skipped: the policy files are wrong")),
        (UnsupportedError("no tree, expected one"), note("skipped: no tree")),
        (RefusedError("look", 1), warning("skipped: look: Operation not permitted")),
        (ImportError("no yaml"), note("skipped: no yaml")),
        (FileNotFoundError(2, "no"), warning("skipped: [Errno 2] no")),
        (
            KeyError("x"),
            error(
                "a bug in kabpf: KeyError('x')",
                "report it, with the output of: kabpfctl doctor --json",
            ),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_that_fails_is_a_finding(problem: Exception, expected: Finding) -> None:
    """Whatever keeps a check from going on is said, after what it had found."""

    def failing(_: Here) -> Findings:
        yield ok("so far")
        raise problem

    assert list(checks.carried_out(Check(failing), Here())) == [ok("so far"), expected]


LIMIT = "set cgroup.max.descendants (cgroups(7)) where so many are made"


@pytest.mark.parametrize(
    ("cgroups", "unrecorded", "expected"),
    [
        (1000, 0, [ok("1000 cgroups, room for 65536")]),
        (
            60_000,
            0,
            [warning("60000 cgroups, room for 65536", LIMIT)],
        ),
        (
            1000,
            2,
            [
                warning(
                    "2 new cgroups not recorded, because there were too many",
                    f"{LIMIT}; then: kabpfctl apply",
                ),
                ok("1000 cgroups, room for 65536"),
            ],
        ),
    ],
)
def test_room_for_cgroups(
    cgroups: int,
    unrecorded: int,
    expected: list[Finding],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That there is little room, and that there was none, is said before it matters again."""
    monkeypatch.setattr(checks, "RUN", tmp_path)
    tree = SimpleNamespace(cgroups=lambda: range(cgroups), mount=Path("/tree"))
    loaded = SimpleNamespace(totals=lambda: Totals(0, unrecorded))
    here = SimpleNamespace(
        machine=SimpleNamespace(is_root=True),
        tree=tree,
        dataplane=lambda: contextlib.nullcontext(loaded),
    )
    assert list(checks.carried_out(checks.CHECKS["limits"], here)) == expected  # type: ignore[arg-type]


def test_everybody_may_ask() -> None:
    """Without root the command looks at what it can, says what it did not look at, and ends with
    status 1 where something is an error."""
    outcome = as_nobody("doctor", "--json")
    found = json.loads(outcome.output)["findings"]
    assert {frozenset(each) for each in found} == {frozenset(("check", "status", "found", "fix"))}
    grades = {each["check"]: each["status"] for each in found}
    assert grades["kernel"] in ("ok", "error")
    pins = next(each for each in found if each["check"] == "pins")
    assert (pins["status"], pins["found"]) == ("note", "skipped (needs root)")
    assert outcome.status == any(each["status"] == "error" for each in found)
    assert "a bug in kabpf" not in outcome.output
    assert outcome.errors == ""


def test_list_is_for_people() -> None:
    """The gravest findings come first, each with what mends it below; the last line counts them."""
    *lines, last = as_nobody("doctor").output.splitlines()
    place = next(place for place, line in enumerate(lines) if "  capabilities: " in line)
    assert lines[place].startswith("note     capabilities: ")
    assert lines[place + 1].startswith("         fix: sudo ")
    grades = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert grades == sorted(grades, key=["error", "warning", "note", "ok"].index)
    warnings, errors = grades.count("warning"), grades.count("error")
    assert last == f"{count(warnings, 'warning')}, {count(errors, 'error')}"
