"""The example policies that the package installs as documents."""

from pathlib import Path

import pytest

from kabpf.policy import files, model, parser

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_right(path: Path) -> None:
    """An example can be taken as it is: it has policies, and nothing to warn of."""
    policies = parser.combine([files.read(path)])
    assert policies
    assert model.warnings(policies) == []
