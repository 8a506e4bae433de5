"""Tells systemd how a service is (sd_notify(3)), and how often it wants to hear."""

from __future__ import annotations

import contextlib
import os
import socket

# systemd drops a longer message, whatever is in it (NOTIFY_BUFFER_MAX in its src/core/manager.c is
# 4096).
NOTIFY_BYTES_MAX = 2000


def watchdog_s() -> float | None:
    """Half the timeout after which systemd misses this process (sd_watchdog_enabled(3)), or None
    where it does not watch."""
    own = str(os.getpid())
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", own) != own:
        return None
    return int(microseconds) / 2e6


def notify(message: str) -> None:
    """Tell systemd, if it listens (sd_notify(3)); what is too long for it is cut."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        if address.startswith("@"):
            address = "\0" + address[1:]
        text = message.encode(errors="replace")[:NOTIFY_BYTES_MAX].decode(errors="ignore")
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.sendto(text.encode(), address)
