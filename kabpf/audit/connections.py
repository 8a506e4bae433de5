"""What is known of a connection, as values."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address (RFC 4291, 2.5.5.2)


class Timer(IntEnum):
    """The kernel's timer that ends first (idiag_timer, sock_diag(7)): of several the kernel tells
    that of data before that of keepalive (inet_sk_diag_fill() in net/ipv4/inet_diag.c)."""

    NONE = 0
    RETRANSMISSION = 1
    KEEPALIVE = 2  # also what ends a connection after its last close
    TIME_WAIT = 3
    WINDOW_PROBE = 4


class Place(IntEnum):
    """Where the peer is, by the addresses of the connection's own network namespace."""

    LOOPBACK = 0  # at an address of that namespace: its packets leave it nowhere
    NETWORK = 1  # in a network that one of its addresses is of
    BEYOND = 2


class Setter(IntEnum):
    """Who set an option (KABPF_BY_ in kabpf.h)."""

    SYSTEM = 0
    APPLICATION = 1
    POLICY = 2
    FORMER_POLICY = 3
    UNKNOWN = 4


OF_POLICIES = (Setter.POLICY, Setter.FORMER_POLICY)


class Keepalive(NamedTuple):
    """What of keepalive bounds a silence. None is unknown."""

    is_on: bool | None
    idle_s: int | None
    on_by: int = Setter.UNKNOWN  # a Setter
    idle_by: int = Setter.UNKNOWN
    interval_s: int | None = None
    interval_by: int = Setter.UNKNOWN


class Connection(NamedTuple):
    """A TCP connection as one look found it; of MPTCP each subflow."""

    namespace: int  # the network namespace's inode number
    cgroup_id: int
    local: bytes  # 128 bits, as the peer's; an IPv4 address is v4-mapped
    local_port: int
    peer: bytes
    peer_port: int
    is_incoming: bool
    place: int  # a Place
    state: str  # of observe.sockets.STATES
    is_orphan: bool  # no process has it, any more or yet
    timer: int  # a Timer
    tries: int  # retransmissions or probes that were not answered
    expires_ms: int  # until the timer ends
    silence_ms: int | None  # since data or acknowledgements came or data went; None: unknown
    keepalive: Keepalive
    system_idle_s: int = 7200  # what an unset idle is: net.ipv4.tcp_keepalive_time
    system_interval_s: int = 75  # and an unset interval: net.ipv4.tcp_keepalive_intvl
    rto_max_ms: int = 120_000  # between retransmissions, and between window probes, at most
