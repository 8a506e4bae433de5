"""The example policies that the package installs as documents."""

from pathlib import Path

import pytest

from kabpf import files, language, policy

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_right(path: Path) -> None:
    """An example can be taken as it is: it has policies, and nothing to warn of."""
    policies = language.combine([files.read(path)])
    assert policies
    assert policy.warnings(policies) == []
