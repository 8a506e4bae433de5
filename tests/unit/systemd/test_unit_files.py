"""systemd's files as they are written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kabpf.systemd.unit_files import Units, broader, environment_file, settings, words


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
        ("A=\u00a0b\x1f\v C=1", ["A=\u00a0b\x1f\v", "C=1"]),  # blanks to others than systemd
    ],
)
def test_words(value: str, expected: list[str]) -> None:
    """Words may be quoted, also in part, and have C's escapes; what follows a mistake is lost."""
    assert words(value) == expected


def test_settings() -> None:
    """Lines go on after a backslash at their very end, also over comments, and are known by their
    first."""
    text = (
        "# [Service]\n[Unit]\nA = b\n\n[Service]\nEnvironment=A=1 \\\n; comment\n  B=2\n"
        "no assignment\nC=\nD=1 \\\\\nE=1 \\ \nF=1 \\"
    )
    found = [(each.section, each.key, each.value, str(each.lines)) for each in settings(text, "a")]
    assert found == [
        ("Unit", "A", "b", "a:3"),
        ("Service", "Environment", "A=1  B=2", "a:6"),
        ("Service", "C", "", "a:10"),
        ("Service", "D", "1 \\\\", "a:11"),
        ("Service", "E", "1 \\", "a:12"),
        ("Service", "F", "1", "a:13"),
    ]


def test_environment_file() -> None:
    """Values are quoted as in a shell, also over lines; blanks inside stay, and what is no
    assignment is ignored."""
    text = (
        '#A=0\n;A=0\nA=1\n B = "two \\" words" \nC=\'$x\'\nD=a b\\\\c\nexport E=1\nF=1\\\n2\nG\n'
        "H=\"x\ny\" z\nI=a\\  \nJ=a'b'\n=1\nK='not ended\n"
    )
    found = {each.name: (each.value, *each.lines.numbers) for each in environment_file(text, "a")}
    assert found == {
        "A": ("1", 3), "B": ('two " words', 4), "C": ("$x", 5), "D": ("a b\\c", 6),
        "F": ("12", 8, 9), "H": ("x\nyz", 11, 12), "I": ("a ", 13), "J": ("a'b'", 14),
        "K": ("not ended\n", 16),
    }  # fmt: skip


LONG = (
    'A="' + "a" * 1_000_000, 'A="' + "\\a" * 500_000 + '"', "A=" + "\\" * 1_000_000,
    "A=x" + " " * 1_000_000 + "y", "A='" * 300_000, '"' * 1_000_000, "A=" + '"x"' * 300_000,
    "A=" + "\\ " * 500_000, "A= \\\n" * 200_000, "\n" * 1_000_000, "x\\\n" * 300_000,
)  # fmt: skip


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_time_grows_with_the_text_alone(text: str) -> None:
    """A mebibyte of anything is parsed in seconds; what grew with its square took minutes."""
    begin = time.process_time()
    environment_file(text, "a")
    words(text)
    list(settings(text, "a"))
    assert time.process_time() - begin < 5


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
    services = Units([strong, weak])
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
    assert Units([tmp_path]).names() == [
        "a.service", "b@.service", "b@1.service", "d.service", "e-.service", "x.service",
    ]  # fmt: skip


def test_units_of_other_types(tmp_path: Path) -> None:
    """Mounts and others have their own files and drop-ins alone."""
    for name in ("a.mount", "a.service", "b.mount.d/1.conf", "mount.d/2.conf", "service.d/3.conf"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    mounts = Units([tmp_path], "mount")
    assert mounts.names() == ["a.mount", "b.mount"]
    assert mounts.files("a.mount") == [tmp_path / "a.mount", tmp_path / "mount.d/2.conf"]
