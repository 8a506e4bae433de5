"""The reader of bbolt's databases, on those that podman 4.3 and containerd left."""

import contextlib
import errno
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kabpf.engines import bolt

ENGINES = Path(__file__).parents[2] / "engines"
PODMAN = gzip.decompress(
    (ENGINES / "podman-4.3/root/var/lib/containers/storage/libpod/bolt_state.db.gz").read_bytes()
)
CONTAINERD = gzip.decompress(next((ENGINES / "containerd-1.7").rglob("meta.db.gz")).read_bytes())


@contextlib.contextmanager
def opened(content):
    descriptor = os.memfd_create("database")
    try:
        os.write(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)


def look(content, at):
    with opened(content) as descriptor:
        return bolt.look(descriptor, at)


def test_values_and_buckets_are_found():
    """A key, all keys of a bucket, and neither where there is none."""
    ids = list(look(PODMAN, lambda view: view.items(b"id-registry")))
    assert len(ids) == 6  # five containers and a pod
    configs = look(PODMAN, lambda view: [view.value(b"ctr", id, b"config") for id in ids])
    names = {json.loads(config)["name"] for config in configs if config}
    assert names == {"pod-1", "quad-1", "inpod", "par", "cfs"}
    assert look(PODMAN, lambda view: view.value(b"ctr", ids[0])) is None  # a bucket
    assert look(PODMAN, lambda view: view.value(b"ctr", b"none", b"config")) is None
    assert look(PODMAN, lambda view: view.items(b"none")) == {}


def test_older_meta_page_is_not_taken():
    """The newest transaction counts; where its page is torn, the one before."""
    newest = max((0, 4096), key=lambda at: CONTAINERD[at + 64 : at + 72][::-1])
    torn = bytearray(CONTAINERD)
    torn[newest + 70] ^= 1
    with opened(CONTAINERD) as whole, opened(torn) as other:
        metas = [bolt._newest_meta(descriptor).transaction for descriptor in (whole, other)]
    assert metas[1] == metas[0] - 1


def test_database_that_changes_meanwhile_is_read_again():
    """What was read while a transaction ended is not believed."""
    with opened(PODMAN) as descriptor:
        seen = []

        def at(view):
            seen.append(view.value(b"runtime-config", b"os"))
            if len(seen) == 1:  # a transaction ends: the older meta page is written
                commit(descriptor)
            return seen[-1]

        assert bolt.look(descriptor, at) == b"linux"
        assert len(seen) == 2


def test_database_that_never_rests_is_given_up():
    """It is tried some times, and no more."""
    with opened(PODMAN) as descriptor, pytest.raises(BlockingIOError):
        bolt.look(descriptor, lambda _: commit(descriptor))


def commit(descriptor):
    """What ends a transaction of bbolt that changes nothing."""
    metas = {at: bytearray(os.pread(descriptor, 64, at + 16)) for at in (0, 4096)}
    old, new = sorted(metas, key=lambda at: int.from_bytes(metas[at][48:56], "little"))
    meta = metas[new]
    meta[48:56] = (int.from_bytes(meta[48:56], "little") + 1).to_bytes(8, "little")
    meta[56:64] = bolt._fnv1a(bytes(meta[:56])).to_bytes(8, "little")
    os.pwrite(descriptor, meta, old + 16)


@given(st.integers(0, len(PODMAN) - 1), st.binary(min_size=1, max_size=64))
def test_broken_database_raises_nothing_else(place, junk):
    """A file that somebody has broken ends in an error that the caller knows."""
    broken = PODMAN[:place] + junk + PODMAN[place + len(junk) :]
    with contextlib.suppress(OSError):
        look(broken, lambda view: (view.items(b"id-registry"), view.value(b"ctr", b"a", b"config")))


@pytest.mark.parametrize("content", [b"", b"\0" * 100_000, PODMAN[:100], PODMAN[:5000]])
def test_other_file_is_no_database(content):
    """Neither is one that was cut off."""
    with pytest.raises(OSError, match="Bad message"):
        look(content, lambda view: view.items(b"id-registry"))


def branch(number, child, children=200):
    """A branch page all of whose children are one page."""
    page = bolt._HEADER.pack(number, bolt._IS_BRANCH, children, 0)
    return (page + bolt._BRANCH_ELEMENT.pack(0, 0, child) * children).ljust(4096, b"\0")


def leaf(number, key_size, value_size, values=200):
    """A leaf page whose elements all have one key and one value."""
    page = bolt._HEADER.pack(number, bolt._IS_LEAF, values, 0)
    return (page + bolt._LEAF_ELEMENT.pack(0, 16, key_size, value_size) * values).ljust(4096, b"\0")


def database(root, *pages):
    """A database with these pages, which begin with page 2."""
    meta = bolt._META.pack(bolt._MAGIC, bolt._VERSION, 4096, 0, root, 0, 2, 9, 1, 0)[:-8]
    meta += bolt._fnv1a(meta).to_bytes(8, "little")
    metas = [(bytes(16) + meta).ljust(4096, b"\0")] * 2
    return b"".join((*metas, *pages))


@pytest.mark.parametrize(
    "content",
    [
        database(2, branch(2, 2)),
        database(2, branch(2, 1 << 60)),
        database(1 << 60),
        database(2, *(branch(number, number + 1) for number in range(2, 9)), leaf(9, 0, 0, 1)),
        database(2, leaf(2, 8, 4000)),
        database(2, leaf(2, 4000, 0)),
    ],
    ids=[
        "a page in itself",
        "a page far away",
        "a root far away",
        "each in all",
        "one value",
        "one key",
    ],
)
@pytest.mark.parametrize("path", [(), (b"a",), (b"a", b"b")])
def test_pages_without_end_are_given_up(content, path):
    """Where pages lead to themselves or out of the file, or elements share their bytes, nothing is
    found, or an error says so after some megabytes."""
    try:
        assert look(content, lambda view: view.items(*path)) == {}
    except OSError as error:
        assert error.errno == errno.EBADMSG
