"""What people have in the wild, in small: a folder for each case, whose `tree` has the files of a
machine and whose `expected.yaml` has what `kabpfctl import` says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kabpf.migration import proposals
from kabpf.policy import parser

CASES = sorted(path.parent for path in Path(__file__).parent.glob("cases/*/expected.yaml"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_case(case: Path) -> None:
    """Policies are these and no others; of each warning and error, this is in the text."""
    expected = yaml.safe_load((case / "expected.yaml").read_text())
    found = proposals.look(case / "tree", proc=None)
    policies = {each.file.name: each.text.splitlines()[2] for each in found.policies}
    assert policies == expected.get("policies", {})
    parser.combine([parser.parse(each.text.encode(), str(each.file)) for each in found.policies])
    for key in ("left_out", "unclear"):
        said = [each.replace(str(case / "tree"), "") for each in getattr(found, key)]
        wanted = expected.get(key, [])
        assert len(said) == len(wanted), said
        assert [each for each in wanted if not any(each in line for line in said)] == [], said
    assert found.unread == []
