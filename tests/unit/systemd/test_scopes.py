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


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/", ""),
        ("/init.scope", ""),
        ("/system.slice", ""),
        ("/system.slice/cron.service", "cron.service"),
        ("/system.slice/a.service/inner/kabpf-run-1-00000000", "a.service"),
        ("/system.slice/_cgroup.a.service", "cgroup.a.service"),
        (f"{USERS}/session-3.scope", "session-3.scope"),
        (f"{USERS}/user@1000.service/init.scope", ""),
        (f"{USERS}/user@1000.service/inner", ""),
        (f"{USERS}/user@1000.service/app.slice/a.service", "a.service"),
        ("/machine.slice/a.scope/system.slice", ""),
    ],
)
def test_unit_is_the_innermost(path: str, unit: str) -> None:
    """Slices and managers are none that a command could lose the limits of."""
    assert scopes.unit_of(path) == unit


def test_session_is_told_by_its_scope() -> None:
    """A scope that somebody made is no session, nor is a manager."""
    assert scopes.is_in_session(f"{USERS}/session-c1.scope/kabpf-run-1-00000000")
    assert not scopes.is_in_session(f"{USERS}/kabpf-run-1-00000000.scope")
    assert not scopes.is_in_session(f"{USERS}/user@1000.service/app.slice/a.scope")
