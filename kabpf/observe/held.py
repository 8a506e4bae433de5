"""Which TCP sockets a process holds: its descriptors, and the kernel's table of its namespace."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator

from kabpf import proc
from kabpf.audit.connections import MAPPED
from kabpf.observe.sockets import Address, Socket, text

TABLES = ("tcp", "tcp6")
TABLE_MAX = 256 << 20  # bytes; a line takes some 150
LISTENERS_AMONG = 1024  # of a process's descriptors: it may have a million, listeners come first
LISTEN = b"0A"  # TCP_LISTEN in include/net/tcp_states.h in the kernel
_DESCRIPTOR = re.compile(r"socket:\[([0-9]+)\]")

_Ends = tuple[Address, Address]


def of_process(process: str, sockets: Iterable[Socket]) -> list[Socket]:
    """Those of the sockets that a process holds, of its network namespace.

    Sockets that listen at one address are not told apart (SO_REUSEPORT).
    """
    inodes = set(_inodes(process))
    ends: set[_Ends] = set()
    for table in TABLES if inodes else ():
        with contextlib.suppress(OSError):
            ends.update(
                (_read(words[1]), _read(words[2]))
                for words in _rows(process, table)
                if words[9] in inodes
            )
    try:
        namespace = os.stat(f"/proc/{process}/ns/net").st_ino
    except OSError:
        return []
    return [
        each
        for each in sockets
        if each.namespace == namespace and (_address(each.local), _address(each.peer)) in ends
    ]


def listeners(
    processes: Iterable[int], sockets: Iterable[Socket]
) -> Iterator[tuple[int, list[Socket]]]:
    """Those of the listeners among the sockets that each process holds, of its network namespace;
    all that listen at an address of its own."""
    at: defaultdict[tuple[int, Address], list[Socket]] = defaultdict(list)
    for each in sockets:
        if each.state == "listen":
            at[each.namespace, _address(each.local)].append(each)
    tables: dict[int, dict[bytes, Address]] = {}
    for process in processes:
        with contextlib.suppress(OSError):
            namespace = os.stat(f"/proc/{process}/ns/net").st_ino
            if namespace not in tables:
                tables[namespace] = dict(_listening(process))
            table = tables[namespace]
            own = itertools.islice(_inodes(str(process)), LISTENERS_AMONG)
            addresses = {table[inode] for inode in own if inode in table}
            if found := [each for address in addresses for each in at[namespace, address]]:
                yield process, found


def _listening(process: int) -> Iterator[tuple[bytes, Address]]:
    """The inodes of the listeners of a process's network namespace, and where they listen."""
    for table in TABLES:
        for words in _rows(process, table):
            if words[3] == LISTEN:
                yield words[9], _read(words[1])


def _address(address: Address) -> Address:
    return Address("", 0) if not address.port else address


def _inodes(process: str) -> Iterator[bytes]:
    """One for each descriptor, in their order, b"" for those of something else."""
    with contextlib.suppress(OSError), os.scandir(f"/proc/{process}/fd") as descriptors:
        for each in descriptors:
            found = None
            with contextlib.suppress(OSError):
                found = _DESCRIPTOR.fullmatch(os.readlink(each.path))
            yield found[1].encode() if found else b""


def _rows(process: int | str, table: str) -> Iterator[list[bytes]]:
    """The words of each line of a table: 1 and 2 are the socket's ends, 3 is its state, 9 its inode
    (proc_pid_net(5)). Raises OSError."""
    for line in proc.read(f"/proc/{process}/net/{table}", TABLE_MAX).split(b"\n")[1:]:
        words = line.split()
        if len(words) > 9:
            yield words


def _read(word: bytes) -> Address:
    """An end as the kernel prints it: words of 32 bits in its own byte order."""
    number, _, port = word.partition(b":")
    raw = bytes.fromhex(number.decode())
    if sys.byteorder == "little":
        raw = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return _address(Address(text(raw if len(raw) == 16 else MAPPED + raw), int(port, 16)))
