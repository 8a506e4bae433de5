"""Walks a cgroup2 tree by descriptors: a path may be longer than the kernel takes (PATH_MAX)."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from kabpf.plan.state import Cgroup

OPEN_MAX = 64  # directories at once; those above are reached again by ".."
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A cgroup that was removed meanwhile; the latter from what was open by then (kernfs).
_GONE = (errno.ENOENT, errno.ENODEV)


class Unread(dict[str, int]):
    """Cgroups whose inside could not be looked at: their paths, with the errno each."""


class _Level:
    """A directory on the way down, and what is left of it."""

    def __init__(self, cgroup: Cgroup, descriptor: int, left: list[Cgroup]) -> None:
        self.cgroup, self.left = cgroup, left
        self.descriptor: int | None = descriptor


def walk(
    top: Cgroup, directory: str, unread: Unread, *, opens_all: bool = False
) -> Iterator[tuple[Cgroup, int | None]]:
    """The cgroups inside `top`, whose directory is given, parents before their children. With
    `opens_all` each comes with a descriptor, until the next one is asked for, or with None where
    it can't be opened; without, some do.

    One that vanishes meanwhile is left out. What can't be looked at is noted in `unread`.
    """
    levels: list[_Level] = []
    try:
        try:
            descriptor = opened(directory)
        except OSError as error:
            _note(unread, top, error)
            return
        levels.append(_Level(top, descriptor, _children(top, descriptor, unread)))
        while levels:
            level = levels[-1]
            if not level.left:
                _ascend(levels, unread)
                continue
            child = level.left.pop()
            assert level.descriptor is not None
            try:
                # kernfs counts the directories below one in its link count: most cgroups have
                # none, and need no listing of their forty files.
                status = os.stat(child.name, dir_fd=level.descriptor, follow_symlinks=False)
                is_leaf = status.st_nlink == 2
                descriptor = -1
                if opens_all or not is_leaf:
                    descriptor = os.open(child.name, _DIRECTORY, dir_fd=level.descriptor)
            except OSError as error:
                if error.errno not in _GONE:
                    _note(unread, child, error)
                    yield child, None
                continue
            if is_leaf:
                try:
                    yield child, None if descriptor < 0 else descriptor
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)
                continue
            levels.append(_Level(child, descriptor, []))
            yield child, descriptor
            levels[-1].left = _children(child, descriptor, unread)
            if len(levels) > OPEN_MAX:
                _close(levels[-1 - OPEN_MAX])
    finally:
        for level in levels:
            _close(level)


def opened(path: str) -> int:
    """A descriptor of a directory, however long its absolute path is. Raises OSError."""
    descriptor = os.open("/", _DIRECTORY)
    names = [name for name in path.split("/") if name]
    # A name has at most 255 bytes, so that so many are shorter than PATH_MAX.
    pieces = ["/".join(names[i : i + 15]) for i in range(0, len(names), 15)]
    for piece in pieces:
        try:
            below = os.open(piece, _DIRECTORY, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor


def is_gone(error: OSError) -> bool:
    """Whether what could not be opened is not there, and not merely out of reach."""
    return error.errno in _GONE


def _children(cgroup: Cgroup, descriptor: int, unread: Unread) -> list[Cgroup]:
    try:
        with os.scandir(descriptor) as entries:
            return [cgroup.child(each.inode(), each.name) for each in entries if each.is_dir()]
    except OSError as error:
        _note(unread, cgroup, error)
        return []


def _ascend(levels: list[_Level], unread: Unread) -> None:
    """Leave the lowest level, and open the one above again where it was closed on the way down."""
    level = levels.pop()
    above = levels[-1] if levels else None
    try:
        if above and above.descriptor is None:
            if level.descriptor is None:
                raise OSError(errno.ENODEV, "")
            descriptor = os.open("..", _DIRECTORY, dir_fd=level.descriptor)
            if os.fstat(descriptor).st_ino == above.cgroup.id:
                above.descriptor = descriptor
            else:
                os.close(descriptor)
                raise OSError(errno.ESTALE, "")
    except OSError as error:
        assert above
        above.left = []
        unread[above.cgroup.path] = error.errno or 0
    finally:
        _close(level)


def _close(level: _Level) -> None:
    if level.descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(level.descriptor)
        level.descriptor = None


def _note(unread: Unread, cgroup: Cgroup, error: OSError) -> None:
    if not is_gone(error):
        unread[cgroup.path] = error.errno or 0
