"""Which mounts come after kabpf: by their types, and by what /etc/fstab says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabpf.kernel.mountinfo import Mount
from kabpf.systemd import late_mounts

FSTAB = """\
# /dev/x /commented nfs defaults 0 0
UUID=1 / ext4 defaults 0 1
UUID=2 /srv ext4 defaults 0 2
UUID=3 /usb ext4 noauto,user 0 0
UUID=4 /slow xfs defaults,nofail 0 0
host:/x /share nfs4 rw
/dev/y /auto ext4 x-systemd.automount
/dev/iscsi /san ext4 _netdev
short
"""


def mounted(point: str, type_: str) -> Mount:
    return Mount(1, "/", point, type_)


def test_late_mounts_are_told_from_others() -> None:
    """Network file systems, FUSE and automounts are late, and what fstab does not mount at boot or
    does not wait for; local ones are not."""
    found = late_mounts.mount_points(
        [
            mounted("/", "ext4"),
            mounted("/srv", "ext4"),
            mounted("/net", "nfs"),
            mounted("/home/x/gdrive", "fuse.rclone"),
            mounted("/proc/misc", "autofs"),
        ],
        FSTAB,
    )
    assert found == {
        *("/net", "/home/x/gdrive", "/proc/misc"),
        *("/usb", "/slow", "/share", "/auto", "/san"),
    }


@pytest.mark.parametrize("link", ["file", "directory"])
def test_link_to_a_late_mount_is_told(tmp_path: Path, link: str) -> None:
    """The file's target counts, whether the file or its directory is the link, also where nothing
    is mounted there now."""
    late = {str(tmp_path / "share")}
    if link == "file":
        (tmp_path / "d").mkdir()
        (tmp_path / "d/a.yaml").symlink_to(tmp_path / "share/kabpf/a.yaml")
    else:
        (tmp_path / "d").symlink_to(tmp_path / "share/kabpf")
    assert late_mounts.place_of(tmp_path / "d/a.yaml", late) == str(tmp_path / "share")


def test_file_beside_a_late_mount_is_not(tmp_path: Path) -> None:
    """Neither is one below a mount that kabpf lies below itself."""
    (tmp_path / "a.yaml").touch()
    assert late_mounts.place_of(tmp_path / "a.yaml", {str(tmp_path / "a"), "/"}) is None


def test_warning_names_file_and_mount(tmp_path: Path) -> None:
    """A line for each file."""
    fstab = tmp_path / "fstab"
    fstab.write_text(f"host:/x {tmp_path}/share nfs4 rw\n")
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "c.yaml").symlink_to(tmp_path / "share/c.yaml")
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml")]
    assert late_mounts.warnings(paths, fstab) == [
        f"{tmp_path}/c.yaml: lies below {tmp_path}/share, which may be mounted after kabpf.service"
        " starts, expected a file that is there from the start"
    ]
    assert late_mounts.warnings(paths[:2], fstab) == late_mounts.warnings([], tmp_path / "none")
