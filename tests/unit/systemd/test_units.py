"""The units that systemd has files of."""

from __future__ import annotations

from pathlib import Path

from kabpf.systemd import units


def test_unit_files_with_their_real_names(tmp_path: Path) -> None:
    """A link to another unit is an alias, one to /dev/null a mask; the stronger directory counts,
    and directories are no units."""
    strong, weak = tmp_path / "etc", tmp_path / "lib"
    for directory in (strong, weak):
        directory.mkdir()
    for name in ("mariadb.service", "old.service", "nginx.service"):
        (weak / name).touch()
    (strong / "mysql.service").symlink_to(weak / "mariadb.service")
    (strong / "old.service").symlink_to("/dev/null")
    (strong / "nginx.service.d").mkdir()
    assert units.unit_names((strong, weak, tmp_path / "none")) == {
        "mariadb.service": "mariadb.service",
        "mysql.service": "mariadb.service",
        "nginx.service": "nginx.service",
        "old.service": "",
    }
