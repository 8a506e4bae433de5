"""What kabpfctl check reads, which every reload of kabpf.service does as well."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kabpf.apply import reconcile
from kabpf.commands import check
from kabpf.doctor import checks
from kabpf.doctor.elsewhere import Elsewhere
from kabpf.kernel.loading import Loader
from kabpf.policy import parser
from kabpf.policy.files import Directories
from kabpf.systemd import units


def test_installed_files_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for units that their policies do not reach."""
    read = []
    found = [Elsewhere("a.service", 0, "found", "advice")]
    monkeypatch.setattr(check.files, "SYSTEM", Directories(tmp_path / "policy.yaml", ()))
    monkeypatch.setattr(check.files, "load", lambda where: (read.append(where), ())[1])
    monkeypatch.setattr(check.cgroups, "find_tree", lambda mounted: None)
    monkeypatch.setattr(check.elsewhere, "of_policies", lambda policies, tree: found)
    assert check.check(Namespace(files=[], loader=Loader.LIBBPF, json=True)) == 0
    (result,) = json.loads(capsys.readouterr().out)["files"]
    assert result["warnings"] == ["found; advice"]
    assert len(read) == 1


def test_check_and_doctor_judge_what_apply_makes_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sockets that systemd's files relate to a service are globs of its policy, too."""
    sockets = " ".join(f"a%i-a{number}-b%i-c%i.socket" for number in range(100))
    (tmp_path / "front@.service").write_text(f"[Service]\nSockets={sockets}\n")
    monkeypatch.setitem(units.DIRECTORIES, "unit", (str(tmp_path),))
    text = b"select: [{unit: front@.service}]\nkeepalive: {idle: 5}\n"
    policies = parser.combine([parser.parse(text, "/etc/kabpf/policy.d/a.yaml")])
    assert reconcile.automaton_of(policies).globs.left_out
    said = "/etc/kabpf/policy.d/a.yaml:1: resolved by kabpfd: unit front@*.service"
    (warning,) = check.checked("a", lambda: policies, Loader.LIBBPF)["warnings"]
    assert warning.startswith(said)
    here = cast(Any, SimpleNamespace(policies=policies, parsed=[]))
    found = [each for each in checks._policy_files(here) if "resolved" in each.text]
    assert [each.text for each in found] == [warning]
