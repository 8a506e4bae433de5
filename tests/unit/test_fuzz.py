"""The parsers of what others write, on good inputs and on each that was found to be bad once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import targets


@pytest.fixture(scope="module", autouse=True)
def end():
    yield
    targets.end()


@pytest.mark.parametrize("target", targets.TARGETS)
def test_parser_reads_what_was_kept(target):
    """And the same cut short, as a file that is being written is."""
    for content in (b"", b"\0", b"\xff\r\n", *targets.seeds(target)):
        targets.TARGETS[target](content)
        targets.TARGETS[target](content[: len(content) // 2])
