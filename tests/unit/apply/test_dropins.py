"""Drop-ins that commands write."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kabpf.apply import dropins
from kabpf.errors import RefusedError


@contextmanager
def no_space() -> Iterator[None]:
    """Inside, files can have no bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [{}, {"a.yaml": b"before"}])
def test_file_that_can_not_be_written_leaves_what_was_there(
    tmp_path: Path, before: dict[str, bytes]
) -> None:
    """Nothing half-written stays, under no name."""
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    with (
        no_space(),
        pytest.raises(RefusedError, match=r"a\.yaml: File too large"),
        dropins.written(tmp_path / "a.yaml", b"after"),
    ):
        raise AssertionError("the block began")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
