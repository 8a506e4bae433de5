"""How long a connection may be silent, and so whether a middlebox may forget it. Pure.

A middlebox (a firewall, a NAT gateway, a load balancer) forgets a connection when no packet of it
has come for the idle timeout. A connection is **at risk** if its greatest possible silence is at
least the idle timeout: until a probe, a retransmission, or for ever. What it did until now does not
count: one that sent a byte a moment ago may be silent for as long as one that sent none for an
hour.

- Without keepalive a silence has no bound (RFC 9293, 3.8.4: it is off by default). A user timeout
  bounds how long data may stay unacknowledged (tcp(7)), and sends nothing by itself.
- With keepalive it is idle, or interval if that is longer: after a probe the kernel waits for it,
  and an answer does not start idle anew (tcp_keepalive_timer() in net/ipv4/tcp_timer.c). The timer
  that runs already may end later: where the system's idle was shortened, and where keepalive was
  turned on in a connection that was silent by then (tcp_set_keepalive()).
- The kernel's timers end late by up to an eighth since Linux kernel commit 500462a9de65 ("timers:
  Switch to a non-cascading wheel") (in v4.8).
- Data that was sent again without an answer is sent again at intervals that double up to 120 s
  (TCP_RTO_MAX in include/net/tcp.h), or to net.ipv4.tcp_rto_max_ms, which is there since Linux
  kernel commit 1280c26228bd ("tcp: add tcp_rto_max_ms sysctl") (in v6.15). Meanwhile no probe is
  sent. A window that the peer has closed is probed in the same way (tcp_probe0_when()).
- Data in flight that was not sent again is acknowledged in a moment, and then the above holds.
- A connection that waits for the acknowledgement of its FIN, or that no process has any more, is
  ended by the kernel. One in time-wait is over. One that is being opened sends its SYN again.
- Packets between two addresses of one network namespace go through no middlebox.

Two things can't be seen. The kernel notes nothing of the peer's own probes: tcp_validate_incoming()
in net/ipv4/tcp_input.c drops them before tcp_ack(). So a connection that only its peer keeps alive
counts as at risk. And nothing tells of TCP_RTO_MAX_MS.
"""

from __future__ import annotations

import math
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from kabpf.audit.connections import Connection, Keepalive, Place, Timer

SHORTEST_S, LONGEST_S = 1, 432000  # of idle timeouts

OPENING = ("syn-sent", "syn-recv")
# The kernel waits for an acknowledgement, or for the end of a time, and then it is over.
ENDING = ("fin-wait-1", "closing", "last-ack", "time-wait", "close")
LATE = 8  # a timer ends late by at most this part


class Why(StrEnum):
    """What decides how long a connection may be silent."""

    LISTENER = "no connection"
    LOOPBACK = "loopback"
    OPENING = "being opened"
    ENDING = "being closed"
    RETRANSMISSION = "data sent again"
    WINDOW_PROBES = "the peer's window is closed"
    KEEPALIVE = "keepalive's idle"
    INTERVAL = "keepalive's interval"
    TIMER = "keepalive's timer"
    UNKNOWN = "keepalive's idle is not known"
    NOTHING = "no keepalive"


class Silence(NamedTuple):
    """How long a connection may be silent, in milliseconds; `math.inf` is for ever. One that is not
    known is at least so long."""

    longest_ms: float
    why: Why
    is_known: bool = True

    def is_at_risk(self, timeout_s: int) -> bool | None:
        """Whether a middlebox with this idle timeout may forget it; None where nobody can tell."""
        if self.longest_ms >= timeout_s * 1000:
            return True
        return False if self.is_known else None


BY_KEEPALIVE = (Why.KEEPALIVE, Why.INTERVAL, Why.UNKNOWN)
NEVER_FORGOTTEN = (Why.LISTENER, Why.LOOPBACK, Why.OPENING, Why.ENDING)


def of(connection: Connection, keepalive: Keepalive | None = None) -> Silence:
    """How long a connection may be silent, by what it has of keepalive or by what it would have."""
    is_present = keepalive is None or keepalive is connection.keepalive
    keepalive = keepalive or connection.keepalive
    timer = connection.timer
    if timer == Timer.RETRANSMISSION and not connection.tries:
        timer = Timer.NONE
    found = _of(
        connection.state,
        connection.is_orphan,
        connection.place == Place.LOOPBACK,
        timer,
        keepalive.is_on,
        keepalive.idle_s,
        keepalive.interval_s,
        connection.rto_max_ms,
    )
    if timer != Timer.KEEPALIVE or not is_present or found.why not in BY_KEEPALIVE:
        return found
    # At the timer's end comes a probe, or another wait for one (tcp_keepalive_timer()). Silence
    # does not tell of probes that were not answered.
    until_ms = connection.expires_ms + (0 if connection.tries else connection.silence_ms or 0)
    if until_ms <= found.longest_ms:
        return found
    return found._replace(longest_ms=until_ms, why=Why.TIMER if found.is_known else Why.UNKNOWN)


@lru_cache(maxsize=4096)  # of 100,000 connections most are alike
def _of(
    state: str,
    is_orphan: bool,
    is_loopback: bool,
    timer: int,
    is_on: bool | None,
    idle_s: int | None,
    interval_s: int | None,
    rto_max_ms: int,
) -> Silence:
    if state == "listen":
        return Silence(0, Why.LISTENER)
    if is_loopback:
        return Silence(0, Why.LOOPBACK)
    if state in OPENING:
        return Silence(0, Why.OPENING)
    if state in ENDING or (is_orphan and state == "fin-wait-2"):
        return Silence(0, Why.ENDING)
    if timer == Timer.RETRANSMISSION:
        return Silence(_late(rto_max_ms), Why.RETRANSMISSION)
    if timer == Timer.WINDOW_PROBE:
        return Silence(_late(rto_max_ms), Why.WINDOW_PROBES)
    if is_on is False:
        return Silence(math.inf, Why.NOTHING)
    if is_on is None or idle_s is None or interval_s is None:
        return Silence(0, Why.UNKNOWN, is_known=False)
    if interval_s > idle_s:
        return Silence(_late(interval_s * 1000), Why.INTERVAL)
    return Silence(_late(idle_s * 1000), Why.KEEPALIVE)


def _late(milliseconds: int) -> float:
    return milliseconds * (LATE + 1) / LATE
