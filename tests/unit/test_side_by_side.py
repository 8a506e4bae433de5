"""The table of docs/migrating.md: what programs get under kabpf and under the preload libraries."""

from side_by_side import ROWS, table


def test_table_has_every_program() -> None:
    """Each program that the comparison runs has its row, in its order, and nothing else has one."""
    assert list(table()) == [row.text for row in ROWS]


def test_kabpf_covers_what_a_preload_library_covers() -> None:
    """Where one of the libraries sets its options, so does kabpf."""
    for *theirs, ours in table().values():
        assert "set" not in theirs or ours == "set"
