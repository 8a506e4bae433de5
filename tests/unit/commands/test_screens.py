"""What a person sees: whole screens, at the widths of terminals, and in a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kabpf.commands import sockets, status
from kabpf.kernel.dataplane import Counters
from kabpf.observe.sockets import Address, Socket
from kabpf.plan.state import PolicyRecord
from kabpf.policy.model import Mode, Options, Range

SCREENS = Path(__file__).parent / "screens"
WIDTHS = (40, 80, 120, 200, None)  # None is a pipe
SOURCE = "/etc/kabpf/policy.d/{}.yaml:1"


def options(idle: int, interval: int, probes: int, user_timeout_s: int = 0) -> Options:
    timeout = Range.exactly(user_timeout_s * 1000) if user_timeout_s else None
    return Options(
        True, Range.exactly(idle), Range.exactly(interval), Range.exactly(probes), timeout
    )


LONG = "payments-reconciliation-worker@eu-central-1-production.service"
ROWS = [
    status.Row(
        "postgresql.service", 1, PolicyRecord("postgresql.service", options(60, 10, 6, 120)),
        Counters(20481, 1, 12, 0, 0, 0, 3, {}), SOURCE.format("postgresql.service"),
    ),
    status.Row(
        LONG, 24, PolicyRecord(LONG, Options(idle_s=Range(30, 300)), Mode.ENFORCE),
        Counters(1204817, 3, 0, 17, 4, 2, 0, {"EPERM": 2, "ENOPROTOOPT": 1}), SOURCE.format(LONG),
    ),
    status.Row(
        "batch", 0, PolicyRecord("batch", Options(keepalive=False)),
        Counters(0, 0, 0, 0, 0, 0, 0, {}), None,
    ),
]  # fmt: skip
RESULT: dict[str, Any] = {
    "loaded": True, "interrupted": False, "cgroup2": "/sys/fs/cgroup",
    "pins": "/sys/fs/bpf/kabpf", "loader": "libbpf",
    "kernel": {"release": "6.1.0-40-amd64", "btf": True},
    "watched": {"setsockopt": True, "syn_retries": False}, "daemon": 431,
    "new_cgroups_wait": False,
    "policy_files": {"policies": 3, "errors": [], "wrong_since": None, "applied": True},
    "refused": "", "not_recorded": {"cgroups": 0, "since": None},
    "removed_with_sockets": 0, "totals": {"asked_in_vain": 0, "unrecorded": 0},
}  # fmt: skip


def connection(cgroup: str | None, local: str, remote: str, **others: Any) -> Socket:
    local_address, _, local_port = local.rpartition(":")
    remote_address, _, remote_port = remote.rpartition(":")
    values: dict[str, Any] = {
        "cgroup": cgroup, "cgroup_id": 7, "namespace": 4026531840, "family": "ipv4",
        "local": Address(local_address, int(local_port)),
        "remote": Address(remote_address, int(remote_port)),
        "state": "established", "keepalive": True, "idle_s": 300, "interval_s": 30, "probes": 4,
        "user_timeout_ms": 0, "next_probe_ms": 299_200, "policy": "billing",
        "set_by": dict.fromkeys(("idle_s", "interval_s", "probes", "keepalive"), "policy"),
    }  # fmt: skip
    return Socket(**values | others)


SOCKETS = [
    connection("/system.slice/billing.service", "10.1.0.5:48956", "10.1.0.7:5432"),
    connection(
        f"/system.slice/system-payments.slice/{LONG}",
        "2001:db8:1234:5678:9abc:def0:1234:5678:48960", "2001:db8:1234:5678:9abc:def0:1234:1:5432",
        family="ipv6", idle_s=15, next_probe_ms=14_000,
        set_by={"idle_s": "application", "interval_s": "policy"},
    ),
    connection(
        "/system.slice/ssh.service", "127.0.0.1:22", "127.0.0.1:50120", is_removed=True,
    ),
    connection(
        None, "127.0.0.1:22", "127.0.0.1:50122", keepalive=False, next_probe_ms=None, policy=None,
        set_by={},
    ),
]  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("screen", ["status", "sockets"])
def test_screen_is_as_it_was_read(
    screen: str, width: int | None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The files were read by a person. KABPF_RECORD=1 writes them anew, to be read again."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: width is not None)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(status, "look", lambda: (RESULT, ROWS))
    if screen == "status":
        status.status(argparse.Namespace(policy=None, json=False, wide=False))
    else:
        sockets.print_list(SOCKETS, {}, is_wide=False)
    shown = capsys.readouterr().out
    file = SCREENS / f"{screen}-{width or 'pipe'}.txt"
    if os.environ.get("KABPF_RECORD"):
        file.write_text(shown)
    assert shown == file.read_text()
