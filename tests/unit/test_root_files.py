"""Small files of root's are read within bounds, and written with their own modes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kabpf import root_files


def link(file: Path) -> None:
    file.with_name("other").write_bytes(b"")
    file.symlink_to("other")


def written_by(mode: int) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(b"")
        file.chmod(mode)

    return write


def huge(file: Path) -> None:
    file.touch(mode=0o600)
    os.truncate(file, 1 << 40)


KINDS = {
    "FIFO": (os.mkfifo, errno.EINVAL),
    "directory": (Path.mkdir, errno.EINVAL),
    "link": (link, errno.ELOOP),
    "writable by the group": (written_by(0o620), errno.EPERM),
    "writable by all": (written_by(0o602), errno.EPERM),
    "huge": (huge, errno.EFBIG),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_may_have_put_there_is_refused(tmp_path: Path, kind: str) -> None:
    """It is neither waited for nor read to its end."""
    make, expected = KINDS[kind]
    make(tmp_path / "file")
    with pytest.raises(OSError) as raised:
        root_files.read(tmp_path / "file", 100)
    assert raised.value.errno == expected


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device"])
def test_beginning_of_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A link may lead to it as well."""
    if kind == "device":
        (tmp_path / "file").symlink_to("/dev/zero")
    else:
        KINDS[kind][0](tmp_path / "file")
    with pytest.raises(OSError) as raised:
        root_files.beginning(tmp_path / "file", 100)
    assert raised.value.errno == errno.EINVAL


def test_beginning_of_a_file_is_read(tmp_path: Path) -> None:
    """Behind a link, too, whoever may write it, and no more than is asked for."""
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "file").chmod(0o666)
    (tmp_path / "link").symlink_to("file")
    assert root_files.beginning(tmp_path / "link", 100) == b"abc"
    assert root_files.beginning(tmp_path / "link", 2) == b"ab"
    with pytest.raises(FileNotFoundError):
        root_files.beginning(tmp_path / "none", 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="it needs root")
def test_file_of_another_user_and_device_are_refused(tmp_path: Path) -> None:
    """Root does not read what belongs to somebody else, nor opens a device by mistake."""
    (tmp_path / "file").write_bytes(b"x")
    os.chown(tmp_path / "file", 4242, 4242)
    for path, expected in ((tmp_path / "file", errno.EPERM), (Path("/dev/zero"), errno.EINVAL)):
        with pytest.raises(OSError) as raised:
            root_files.read(path, 100)
        assert raised.value.errno == expected


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_modes_are_those_asked_for(tmp_path: Path, umask: int) -> None:
    """Whatever the umask says; a file that stood under the passing name changes nothing."""
    file = tmp_path / "file"
    file.with_name(".file").write_bytes(b"another's")
    file.with_name(".file").chmod(0o666)
    before = os.umask(umask)
    try:
        root_files.replace(file, b"one", mode=0o600)
        root_files.replace(file, b"two", mode=0o644, sync=True)
    finally:
        os.umask(before)
    assert root_files.read(file, 3) == b"two"
    assert file.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("path", ["/", "."])
def test_directory_that_has_no_name_is_not_replaced(path: str) -> None:
    """It is an error like that of any other directory."""
    with pytest.raises(IsADirectoryError):
        root_files.replace(Path(path), b"one", mode=0o600)


def test_directories_are_closed_to_others_writing(tmp_path: Path) -> None:
    """They are made as far as they are missing."""
    before = os.umask(0)
    try:
        root_files.replace(tmp_path / "a/b/file", b"one", mode=0o600)
    finally:
        os.umask(before)
    assert [(tmp_path / each).stat().st_mode & 0o777 for each in ("a", "a/b")] == [0o755] * 2


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    """Nothing half-written stays, under no name."""
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        root_files.replace(tmp_path / "file", b"one", mode=0o600)
    assert os.listdir(tmp_path) == ["file"]
