"""Units of systemd: files in directories, and what systemctl says of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabpf.doctor import units
from kabpf.doctor.findings import Finding, error, note, ok, warning

SHOWN = """\
Id={id}
LoadState={load}
ActiveState={active}
UnitFileState={file}
Result={result}
NeedDaemonReload={reload}
"""
GOOD = {
    "load": "loaded", "active": "active", "file": "enabled", "result": "success", "reload": "no",
}  # fmt: skip
SERVICE, RELOAD, RETROFIT = "kabpf.service", "kabpf-reload.path", "kabpf-retrofit.socket"
REQUEST = "kabpf-request.socket"
HELPER = "kabpf-retrofit@3-120-0.service"
IN_ORDER = ok("kabpf.service is enabled and active")


@pytest.mark.parametrize(
    ("unit", "differs", "expected"),
    [
        (SERVICE, {}, [IN_ORDER]),
        (SERVICE, {"active": "inactive"}, [ok("kabpf.service is enabled and inactive")]),
        (
            SERVICE,
            {"file": "disabled"},
            [
                warning(
                    "kabpf.service is not enabled: no policy after the next boot",
                    "systemctl enable kabpf.service",
                )
            ],
        ),
        (
            SERVICE,
            {"load": "masked", "active": "inactive"},
            [warning("kabpf.service is masked", "systemctl unmask kabpf.service")],
        ),
        (
            SERVICE,
            {"reload": "yes"},
            [warning("kabpf.service was changed on disk", "systemctl daemon-reload")],
        ),
        (
            SERVICE,
            {"active": "failed", "result": "watchdog"},
            [error("kabpf.service failed: watchdog", "journalctl -u kabpf.service")],
        ),
        (
            SERVICE,
            {"load": "not-found", "active": "inactive"},
            [
                note(
                    "kabpf.service is not installed: nothing starts kabpf at boot",
                    "kabpfd --install-units",
                )
            ],
        ),
        (
            RELOAD,
            {"active": "inactive"},
            [
                IN_ORDER,
                note(
                    "kabpf-reload.path is not active: policy files that change wait for systemctl"
                    " reload kabpf",
                    "systemctl start kabpf-reload.path",
                ),
            ],
        ),
        (
            RETROFIT,
            {"active": "inactive"},
            [
                IN_ORDER,
                warning(
                    "kabpf-retrofit.socket is not active: open connections can't be given a policy",
                    "systemctl start kabpf-retrofit.socket",
                ),
            ],
        ),
        (
            HELPER,
            {"active": "failed", "result": "timeout"},
            [IN_ORDER, error(f"{HELPER} failed: timeout", f"journalctl -u {HELPER}")],
        ),
    ],
    ids=str,
)
def test_units_as_systemd_shows_them(
    unit: str, differs: dict[str, str], expected: list[Finding]
) -> None:
    """What systemctl show prints of our units, and what is made of it."""
    shown = "\n".join(
        SHOWN.format(id=name, **GOOD | (differs if name == unit else {}))
        for name in (SERVICE, RELOAD, RETROFIT, HELPER)
    )
    assert list(units.judge(shown)) == expected


def test_systemd_that_says_nothing_is_no_finding() -> None:
    """systemctl that can't reach systemd prints nothing."""
    assert list(units.judge("")) == []


def test_socket_that_was_removed_is_told(tmp_path: Path) -> None:
    """systemd goes on listening where nobody finds it; a socket that is not active has no file."""
    shown = "\n\n".join(
        f"Id={name}\nLoadState=loaded\nActiveState={active}"
        for name, active in ((RETROFIT, "active"), (REQUEST, "inactive"))
    )
    assert list(units._removed_sockets(shown, tmp_path)) == [
        warning(
            f"{tmp_path}/retrofit.socket is gone, where {RETROFIT} listens",
            f"systemctl restart {RETROFIT}",
        )
    ]
    (tmp_path / "retrofit.socket").touch()
    assert list(units._removed_sockets(shown, tmp_path)) == []
