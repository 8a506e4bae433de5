"""systemd's files as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabpf.systemd.unit_files import Services, broader, environment_file, settings, words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("A=1 B=2", ["A=1", "B=2"]),
        ('"A=b c" B="d e" \'F=g "h"\'', ["A=b c", "B=d e", 'F=g "h"']),
        (r"A=\x41\101\s\tb \"quoted\"", ["A=AA \tb", '"quoted"']),
        ('A=1 "never ends', ["A=1"]),
        ("  ", []),
        ('A=""', ["A="]),
        (r'A=\"b" c"', ['A="b c']),
    ],
)
def test_words(value: str, expected: list[str]) -> None:
    """Words may be quoted, also in part, and have C's escapes; what follows a mistake is lost."""
    assert words(value) == expected


def test_settings(tmp_path: Path) -> None:
    """Lines go on after a backslash at their very end, also over comments, and are known by their
    first."""
    file = tmp_path / "a.service"
    file.write_text(
        "# [Service]\n[Unit]\nA = b\n\n[Service]\nEnvironment=A=1 \\\n; comment\n  B=2\n"
        "no assignment\nC=\nD=1 \\\\\nE=1 \\ \nF=1 \\"
    )
    found = [(each.section, each.key, each.value, str(each.lines)) for each in settings(file)]
    assert found == [
        ("Unit", "A", "b", f"{file}:3"),
        ("Service", "Environment", "A=1  B=2", f"{file}:6"),
        ("Service", "C", "", f"{file}:10"),
        ("Service", "D", "1 \\\\", f"{file}:11"),
        ("Service", "E", "1 \\", f"{file}:12"),
        ("Service", "F", "1", f"{file}:13"),
    ]


def test_environment_file(tmp_path: Path) -> None:
    """Values are quoted as in a shell; blanks inside stay, and what is no assignment is ignored."""
    file = tmp_path / "default"
    file.write_text(
        '#A=0\n;A=0\nA=1\n B = "two \\" words" \nC=\'$x\'\nD=a b\\\\c\nexport E=1\nF=1\\\n2\nG\n'
    )
    found = {each.name: (each.value, each.lines.first) for each in environment_file(file)}
    assert found == {
        "A": ("1", 3), "B": ('two " words', 4), "C": ("$x", 5), "D": ("a b\\c", 6), "F": ("12", 8),
    }  # fmt: skip


def test_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Nothing is read from what is missing, or is a directory."""
    assert environment_file(tmp_path / "missing") == []
    assert list(settings(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.service", []),
        ("a-b-c.service", ["a-b-.service", "a-.service"]),
        ("a@b.service", ["a@.service"]),
        ("a-b@c.service", ["a-b@.service", "a-.service", "a-@c.service", "a-@.service"]),
        ("a-.service", []),
    ],
)
def test_broader(name: str, expected: list[str]) -> None:
    """A service has the drop-ins of its template, and of what its dashes leave of its name."""
    assert broader(name) == expected


def test_files_of_a_service(tmp_path: Path) -> None:
    """The strongest unit file counts, and every drop-in in the order of their names; of those of
    one name the strongest. An alias has drop-ins, too."""
    weak, strong = tmp_path / "weak", tmp_path / "strong"
    for path in (
        weak / "a-b.service", strong / "a-b.service", strong / "a-b.service.d/3.conf",
        weak / "a-b.service.d/3.conf", weak / "alias.service.d/2.conf",
        weak / "a-.service.d/1.conf", strong / "service.d/1.conf",
        strong / "service.d/4.conf", strong / "c.service.d/1.conf",
        strong / "a-b.service.d/5.txt",
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (strong / "alias.service").symlink_to("a-b.service")
    services = Services([strong, weak])
    assert services.files("a-b.service") == [
        strong / "a-b.service", weak / "a-.service.d/1.conf", weak / "alias.service.d/2.conf",
        strong / "a-b.service.d/3.conf", strong / "service.d/4.conf",
    ]  # fmt: skip
    assert services.shared() == [strong / "service.d/1.conf", strong / "service.d/4.conf"]


def test_names_of_services(tmp_path: Path) -> None:
    """Units are known by files, drop-ins and the links that start instances; aliases, what is
    masked, and what is no name of a unit are not."""
    odd = ("@.service", "a b.service", ".a.service")
    for name in ("a.service", "b@.service", "c.socket", "x.service", *odd):
        (tmp_path / name).touch()
    for name in (
        "d.service.d",
        "service.d",
        "e-.service.d",
        "alias.service.d",
        "multi.target.wants",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "multi.target.wants/b@1.service").symlink_to("../b@.service")
    (tmp_path / "alias.service").symlink_to("a.service")
    (tmp_path / "masked.service").symlink_to("/dev/null")
    assert Services([tmp_path]).names() == [
        "a.service", "b@.service", "b@1.service", "d.service", "e-.service", "x.service",
    ]  # fmt: skip
