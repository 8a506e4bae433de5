"""TCP sockets as inet_diag lists them (sock_diag(7)), and addresses as rtnetlink(7) does, of the
caller's network namespace.

pyroute2 needs 0.1 ms a connection for the same, and of a machine with 100,000 that is ten seconds.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from kabpf import proc
from kabpf.audit.connections import MAPPED
from kabpf.errors import RefusedError

NETLINK_ROUTE, NETLINK_SOCK_DIAG = 0, 4  # linux/netlink.h
SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
RTM_NEWADDR, RTM_GETADDR = 20, 22  # linux/rtnetlink.h
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFA_ADDRESS, IFA_LOCAL = 1, 2  # linux/if_addr.h
INET_DIAG_INFO, INET_DIAG_CGROUP_ID = 2, 21  # linux/inet_diag.h
ENOENT = 2

ROOM = 1 << 18  # bytes; the kernel fills up to 32 KiB of it in a dump (netlink_dump())

UNKNOWN = 0xFFFFFFFF  # a time that was not asked for

_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
# struct inet_diag_msg: family, state, timer, retrans, ports, addresses, interface, cookie, expires,
# queues, uid, inode
_SOCKET = struct.Struct("=BBBBHH16s16s4x8xI8x4xI")
_U64 = struct.Struct("=Q")
_ERROR = struct.Struct("=i")  # of struct nlmsgerr
# struct tcp_info: tcpi_last_data_sent, tcpi_last_ack_sent (never filled), tcpi_last_data_recv,
# tcpi_last_ack_recv
_TIMES = struct.Struct("=I4xII")
_TIMES_AT = 44
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg

_RECORD = struct.Struct("=QIIHHBBBB16s16s")
_NAMESPACE = struct.Struct("=IIII")
_NETWORK = struct.Struct("=B16s?")


class Record(NamedTuple):
    """A TCP socket. Times are milliseconds; addresses have 128 bits, an IPv4 one is v4-mapped."""

    cgroup_id: int
    expires_ms: int
    silence_ms: int  # since data or acknowledgements came or data went; UNKNOWN: not asked for
    local_port: int
    peer_port: int
    state: int  # include/net/tcp_states.h in the kernel
    timer: int  # idiag_timer
    tries: int  # idiag_retrans
    has_owner: int  # whether a process has it; 0 or 1
    local: bytes
    peer: bytes


class Network(NamedTuple):
    """An address of an interface, with the bits that its network has in common."""

    bits: int  # of 128
    address: bytes
    is_own: bool  # or that of the other end of a point-to-point link


class Listed(NamedTuple):
    """What there is in a network namespace."""

    system_idle_s: int  # net.ipv4.tcp_keepalive_time
    system_interval_s: int
    rto_max_ms: int
    networks: tuple[Network, ...]
    records: Iterator[Record]


def output(states: int, *, with_times: bool) -> Iterator[bytes]:
    """What `listed` reads, of the network namespace of this thread: sockets in states of this mask.

    With times it waits for sockets whose lock is held: the kernel takes it since Linux kernel
    commit 67db3e4bfbc9 ("tcp: no longer hold ehash lock while calling tcp_get_info()") (in v4.10).
    Raises RefusedError.
    """
    try:
        networks = list(_networks())
        yield _NAMESPACE.pack(
            _sysctl("tcp_keepalive_time", 7200),
            _sysctl("tcp_keepalive_intvl", 75),
            _sysctl("tcp_rto_max_ms", 120_000),
            len(networks),
        )
        yield b"".join(_NETWORK.pack(*each) for each in networks)
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _socket_request(family, states, with_times=with_times)
            for datagram in _dump(NETLINK_SOCK_DIAG, request):
                yield b"".join(_records(datagram))
    except OSError as error:
        hint = "try: modprobe tcp_diag" if error.errno == ENOENT else ""
        raise RefusedError("list TCP sockets", error.errno or 0, hint) from None


def listed(output: bytes) -> Listed:
    """What `output` wrote."""
    idle_s, interval_s, rto_max_ms, count = _NAMESPACE.unpack_from(output)
    start = _NAMESPACE.size + count * _NETWORK.size
    networks = _NETWORK.iter_unpack(output[_NAMESPACE.size : start])
    records = map(Record._make, _RECORD.iter_unpack(memoryview(output)[start:]))
    return Listed(idle_s, interval_s, rto_max_ms, tuple(map(Network._make, networks)), records)


def _sysctl(name: str, default: int) -> int:
    try:
        return proc.number(proc.read(f"/proc/sys/net/ipv4/{name}").strip())
    except OSError:
        return default


def _socket_request(family: int, states: int, *, with_times: bool) -> bytes:
    extensions = 1 << INET_DIAG_INFO - 1 if with_times else 0
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, states)
    return _request(SOCK_DIAG_BY_FAMILY, body)


def _request(kind: int, body: bytes) -> bytes:
    return _HEAD.pack(_HEAD.size + len(body), kind, NLM_F_REQUEST_DUMP, 1, 0) + body


def _dump(protocol: int, request: bytes) -> Iterator[memoryview]:
    """The datagrams of an answer, each until the next one is asked for. Raises OSError."""
    buffer = memoryview(bytearray(ROOM))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as asked:
        asked.send(request)
        while True:
            size = asked.recv_into(buffer)
            datagram = buffer[:size]
            if _HEAD.unpack_from(datagram)[1] == NLMSG_ERROR:
                (error,) = _ERROR.unpack_from(datagram, _HEAD.size)
                raise OSError(-error, os.strerror(-error))
            yield datagram
            if any(kind == NLMSG_DONE for _, _, kind in _messages(datagram)):
                return


class _Shape(NamedTuple):
    """Where the attributes of a message are, behind its struct inet_diag_msg."""

    heads: struct.Struct  # of all of them
    expected: tuple[int, ...]  # that these say
    cgroup: int | None
    info: int | None


def _records(datagram: memoryview) -> Iterator[bytes]:
    """Most messages of one length have the same attributes, which is looked up each time."""
    shapes: dict[int, _Shape] = {}
    for at, length, kind in _messages(datagram):
        if kind != SOCK_DIAG_BY_FAMILY:
            continue
        family, state, timer, tries, sport, dport, local, peer, expires, inode = (
            _SOCKET.unpack_from(datagram, at + _HEAD.size)
        )
        start = at + _HEAD.size + _SOCKET.size
        shape = shapes.get(length)
        if shape is None or shape.heads.unpack_from(datagram, start) != shape.expected:
            shape = shapes[length] = _shape(datagram, start, at + length)
        cgroup_id, silence = 0, UNKNOWN
        if shape.cgroup is not None:
            (cgroup_id,) = _U64.unpack_from(datagram, start + shape.cgroup)
        if shape.info is not None:
            silence = min(_TIMES.unpack_from(datagram, start + shape.info))
        if family == socket.AF_INET:
            local, peer = MAPPED + local[:4], MAPPED + peer[:4]
        yield _RECORD.pack(
            cgroup_id,
            expires,
            silence,
            socket.ntohs(sport),
            socket.ntohs(dport),
            state,
            timer,
            tries,
            inode != 0,
            local,
            peer,
        )


def _shape(datagram: memoryview, start: int, end: int) -> _Shape:
    form, expected, places, at = "=", [], {}, start
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(datagram, at)
        if length < _ATTRIBUTE.size:
            break
        places[kind] = at + _ATTRIBUTE.size - start
        expected += [length, kind]
        padded = min(_aligned(length), end - at)
        form += f"HH{padded - _ATTRIBUTE.size}x"
        at += _aligned(length)
    info = places.get(INET_DIAG_INFO)
    return _Shape(
        struct.Struct(form),
        tuple(expected),
        places.get(INET_DIAG_CGROUP_ID),
        None if info is None else info + _TIMES_AT,
    )


def _networks() -> Iterator[Network]:
    """The addresses of the network namespace."""
    request = _request(RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    for datagram in _dump(NETLINK_ROUTE, request):
        for at, length, kind in _messages(datagram):
            if kind != RTM_NEWADDR:
                continue
            family, bits = _ADDRESS.unpack_from(datagram, at + _HEAD.size)[:2]
            is_ipv4 = family == socket.AF_INET
            start = at + _HEAD.size + _ADDRESS.size
            # The address, of a point-to-point link the other end's, whose the bits are; and with
            # IPv4 the own one as well (linux/if_addr.h).
            found = dict(_attributes(datagram, start, at + length))
            for kind, address in found.items():
                if kind not in (IFA_ADDRESS, IFA_LOCAL) or len(address) != (4 if is_ipv4 else 16):
                    continue
                own = kind == IFA_LOCAL or IFA_LOCAL not in found
                yield Network(
                    bits + 96 if is_ipv4 else bits, MAPPED + address if is_ipv4 else address, own
                )


def _attributes(datagram: memoryview, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(datagram, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, bytes(datagram[at + _ATTRIBUTE.size : at + length])
        at += _aligned(length)


def _messages(datagram: memoryview) -> Iterator[tuple[int, int, int]]:
    """Where each message begins, its length and its kind."""
    at = 0
    while at + _HEAD.size <= len(datagram):
        length, kind = _HEAD.unpack_from(datagram, at)[:2]
        if length < _HEAD.size:
            return
        yield at, length, kind
        at += _aligned(length)


def _aligned(length: int) -> int:
    return length + 3 & ~3
