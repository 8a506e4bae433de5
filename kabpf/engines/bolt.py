"""Reads a bbolt database, as podman 4 and containerd have, while its owner writes it.

bbolt never writes into a page that its newest meta page leads to: what one transaction replaces may
be used again by the one after it at the earliest (freelist.go, release(); db.go, freePages()). So
what was read is right if the newest meta page is the same one afterwards, without a lock.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from kabpf.engines.files import BYTES_MAX

_HEADER = struct.Struct("<QHHI")  # page.go: id, flags, count, overflow
_LEAF_ELEMENT = struct.Struct("<IIII")  # flags, pos, ksize, vsize
_BRANCH_ELEMENT = struct.Struct("<IIQ")  # pos, ksize, page
_BUCKET = struct.Struct("<QQ")  # bucket.go: root page, sequence
# db.go: magic, version, page size, flags, root bucket, freelist, pages, transaction, checksum
_META = struct.Struct("<IIIIQQQQQQ")
_MAGIC, _VERSION = 0xED0CDAED, 2
_IS_BRANCH, _IS_LEAF = 0x01, 0x02
_IS_BUCKET = 0x01
_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)
_DEPTH_MAX = 32
_READ_MAX = 2 * BYTES_MAX  # bytes, by one look: pages that lead to each other have no end
_TRIES = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Meta:
    page_size: int
    root: int
    transaction: int


class View:
    """A database as it was at one moment."""

    def __init__(self, descriptor: int, meta: _Meta) -> None:
        self._descriptor = descriptor
        self._meta = meta
        self._left = _READ_MAX

    def value(self, *path: bytes) -> bytes | None:
        """The value of the key at the end of the names of its buckets; None where there is none.
        Raises OSError."""
        bucket = self._bucket(path[:-1])
        found = bucket and self._find(bucket, path[-1])
        return found[1] if found and not found[0] & _IS_BUCKET else None

    def items(self, *path: bytes) -> dict[bytes, bytes]:
        """The keys of a bucket with their values, without buckets in it; empty where there is no
        such bucket. Raises OSError."""
        bucket = self._bucket(path)
        found = self._all(bucket, _DEPTH_MAX) if bucket else ()
        return {key: value for flags, key, value in found if not flags & _IS_BUCKET}

    def _bucket(self, path: tuple[bytes, ...]) -> bytes | None:
        """The root page of a bucket."""
        page = self._page(self._meta.root)
        for name in path:
            flags, value = self._find(page, name) or (0, b"")
            if not flags & _IS_BUCKET:
                return None
            root, _ = _BUCKET.unpack_from(value)
            page = self._page(root) if root else value[_BUCKET.size :]  # a small one is inline
        return page

    def _find(self, page: bytes, key: bytes) -> tuple[int, bytes] | None:
        """The flags and the value of a key below a page."""
        for _ in range(_DEPTH_MAX):
            if not _is_branch(page):
                return next(
                    ((flags, value) for flags, own, value in _leaf(page) if own == key), None
                )
            # The last child whose first key is not after this one; the first where all are.
            below = [child for first, child in _branch(page) if first <= key]
            page = self._page(below[-1] if below else next(_branch(page))[1])
        raise _wrong()

    def _all(self, page: bytes, depth: int) -> Iterator[tuple[int, bytes, bytes]]:
        if not _is_branch(page):
            yield from _leaf(page)
        elif not depth:
            raise _wrong()
        else:
            for _, child in _branch(page):
                yield from self._all(self._page(child), depth - 1)

    def _page(self, number: int) -> bytes:
        size = self._meta.page_size
        page = os.pread(self._descriptor, size, number * size)
        own, _, _, overflow = _HEADER.unpack_from(page)
        self._left -= (1 + overflow) * size
        if own != number or overflow * size > BYTES_MAX or self._left < 0:
            raise _wrong()
        if overflow:
            page += os.pread(self._descriptor, overflow * size, (number + 1) * size)
        return page


def look(descriptor: int, at: Callable[[View], _T]) -> _T:
    """What a function finds in a database, all of one moment; it may be called several times.

    Raises OSError: EBADMSG for what is no such database, EAGAIN for one that changes too fast."""
    for _ in range(_TRIES):
        meta = _newest_meta(descriptor)
        try:
            found = at(View(descriptor, meta))
        except (OSError, struct.error, ValueError, OverflowError, StopIteration):
            if meta == _newest_meta(descriptor):
                raise _wrong() from None
            continue
        if meta == _newest_meta(descriptor):
            return found
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _newest_meta(descriptor: int) -> _Meta:
    """Of the first two pages; a transaction ends with writing the older one."""
    first = _meta_at(descriptor, 0)
    sizes = (first.page_size,) if first else _PAGE_SIZES
    second = next(filter(None, (_meta_at(descriptor, size) for size in sizes)), None)
    metas = [meta for meta in (first, second) if meta]
    if not metas:
        raise _wrong()
    return max(metas, key=lambda meta: meta.transaction)


def _meta_at(descriptor: int, offset: int) -> _Meta | None:
    raw = os.pread(descriptor, _META.size, offset + _HEADER.size)
    if len(raw) < _META.size:
        return None
    magic, version, size, _, root, _, _, _, transaction, checksum = _META.unpack(raw)
    right = (magic, version) == (_MAGIC, _VERSION) and checksum == _fnv1a(raw[:-8])
    return _Meta(size, root, transaction) if right and size in _PAGE_SIZES else None


def _fnv1a(content: bytes) -> int:
    digest = 0xCBF29CE484222325
    for byte in content:
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return digest


def _is_branch(page: bytes) -> bool:
    flags = _HEADER.unpack_from(page)[1]
    if flags not in (_IS_BRANCH, _IS_LEAF):
        raise _wrong()
    return bool(flags == _IS_BRANCH)


def _branch(page: bytes) -> Iterator[tuple[bytes, int]]:
    """The first key of each child, with its page."""
    left = len(page)  # elements do not overlap
    for place in _elements(page):
        start, size, child = _BRANCH_ELEMENT.unpack_from(page, place)
        left -= size
        if left < 0:
            raise _wrong()
        yield page[place + start : place + start + size], child


def _leaf(page: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The flags, key and value of each element."""
    left = len(page)  # elements do not overlap
    for place in _elements(page):
        flags, start, key, value = _LEAF_ELEMENT.unpack_from(page, place)
        left -= key + value
        if left < 0:
            raise _wrong()
        middle = place + start + key
        yield flags, page[place + start : middle], page[middle : middle + value]


def _elements(page: bytes) -> range:
    count = _HEADER.unpack_from(page)[2]
    return range(_HEADER.size, _HEADER.size + 16 * count, 16)


def _wrong() -> OSError:
    return OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
