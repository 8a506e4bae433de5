"""Where a scope of `kabpfctl run` is to be."""

from __future__ import annotations

import pytest

from kabpf.systemd import scopes

USERS = "/user.slice/user-1000.slice"


@pytest.mark.parametrize(
    ("path", "of_root", "of_user"),
    [
        ("/", "", ""),
        ("/init.scope", "", ""),
        ("/system.slice/cron.service", "system.slice", ""),
        (f"{USERS}/session-3.scope", "user-1000.slice", ""),
        (f"{USERS}/user@1000.service/init.scope", "user-1000.slice", ""),
        (f"{USERS}/user@1000.service/app.slice/a.scope", "user-1000.slice", "app.slice"),
        (f"{USERS}/user@1000.service/app.slice/app-a.slice/a", "user-1000.slice", "app-a.slice"),
        ("/machine.slice/a.scope/system.slice/b.service", "machine.slice", ""),
    ],
)
def test_scope_is_in_the_slice_of_the_caller(path: str, of_root: str, of_user: str) -> None:
    """The slice is the innermost that the manager of who asks has made for this process."""
    assert scopes.own_slice(path, is_root=True) == of_root
    assert scopes.own_slice(path, is_root=False) == of_user
