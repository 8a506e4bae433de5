"""The package's manual pages as the man and the groff of each Debian show them."""

from __future__ import annotations

import built_docs
from machine import Machine

PAGES = (("7", "kabpf"), ("5", "kabpf.yaml"), ("1", "kabpfctl"), ("8", "kabpfd"))


def test_pages_fit_eighty_columns(machine: Machine) -> None:
    """man has nothing to warn of, and no line is wider."""
    assert [(page, built_docs.faults(machine.attempt, *page)) for page in PAGES] == [
        (page, []) for page in PAGES
    ]
