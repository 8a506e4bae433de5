"""The example policies that the package installs as documents."""

from pathlib import Path

import pytest

from kabpf.policy import files, model, parser

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_right(path: Path) -> None:
    """An example can be taken as it is: it has policies, nothing to warn of, and no user timeout,
    which has a price."""
    policies = parser.combine([files.read(path)])
    assert policies
    assert model.warnings(policies) == []
    assert not [each.name for each in policies if "user_timeout" in each.origins]
