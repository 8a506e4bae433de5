"""Connections as an audit knows them."""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any

from kabpf.audit.connections import Connection, Keepalive, Place, Setter, Timer

OFF = Keepalive(False, 7200, Setter.SYSTEM, Setter.SYSTEM, 75, Setter.SYSTEM)
HIDDEN = Keepalive(None, None)  # what inet_diag tells while another timer runs
RUNS = Keepalive(True, None)  # what it tells of keepalive's


def on(idle_s: int, interval_s: int = 10, interval_by: int = Setter.SYSTEM) -> Keepalive:
    setter = Setter.APPLICATION
    return Keepalive(True, idle_s, setter, setter, interval_s, interval_by)


def connection(**others: Any) -> Connection:
    """An idle connection to a peer behind a router, without keepalive."""
    values: dict[str, Any] = {
        "namespace": 4026531840, "cgroup_id": 7,
        "local": IPv6Address("::ffff:10.1.0.5").packed, "local_port": 48956,
        "peer": IPv6Address("::ffff:10.2.0.7").packed, "peer_port": 5432,
        "is_incoming": False, "place": Place.BEYOND, "state": "established",
        "is_orphan": False, "timer": Timer.NONE, "tries": 0, "expires_ms": 0,
        "silence_ms": 1000, "keepalive": OFF,
    }  # fmt: skip
    return Connection(**values | others)


def probing(idle_s: int, **others: Any) -> dict[str, Any]:
    left = max(0, idle_s * 1000 - others.get("silence_ms", 1000))
    values = {"keepalive": on(idle_s), "timer": Timer.KEEPALIVE, "expires_ms": left}
    return values | others
