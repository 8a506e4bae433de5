"""What kabpfctl check reads, which every reload of kabpf.service does as well."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from kabpf.commands import check
from kabpf.doctor.elsewhere import Elsewhere
from kabpf.kernel.loading import Loader
from kabpf.policy.files import Directories


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
