"""What several files of unit tests look at."""

from __future__ import annotations

from pathlib import Path

import built_docs
import pytest


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/docs builds."""
    return built_docs.build(tmp_path_factory.mktemp("docs"))
