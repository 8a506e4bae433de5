"""What libbpf's calls return, as exceptions."""

from __future__ import annotations

import errno

import pytest

from kabpf.errors import KabpfError, LimitError, RefusedError
from kabpf.kernel.libbpf import library


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE])
def test_limit_of_open_files_is_no_refusal(error: int) -> None:
    """So nobody takes it for a data plane that is damaged, and loads another one."""
    with pytest.raises(LimitError, match=r"open x: .*; try: ulimit -n"):
        library.checked("open x", -error)


def test_other_errors_are_refusals() -> None:
    """With their numbers, by which callers tell them."""
    with pytest.raises(RefusedError) as raised:
        library.checked("open x", -errno.EPERM)
    assert raised.value.error == errno.EPERM
    assert not issubclass(LimitError, RefusedError) and issubclass(LimitError, KabpfError)
