"""Names as people type them, and what is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.systemd import names, units


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Systemd's files of both kinds."""
    files = tmp_path / "units"
    files.mkdir()
    (files / "ssh.service").touch()
    (files / "sshd.service").symlink_to("ssh.service")
    (files / "front-tcp.socket").write_text("[Socket]\nService=front.service\n")
    monkeypatch.setitem(units.DIRECTORIES, "unit", (str(files),))
    return files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app", ("app.service", "app.socket")),
        ("app.service", ("app.service", "app.socket")),
        ("app.slice", ("app.slice",)),
        ("my.app", ("my.app.service", "my.app.socket")),
        ("app@1", ("app@1.service", "app@1.socket")),
        ("app@.service", ("app@*.service", "app@*.socket", "app.socket")),
        ("sshd", ("ssh.service", "ssh.socket")),
        ("sshd.service", ("ssh.service", "ssh.socket")),
        ("front", ("front.service", "front.socket", "front-tcp.socket")),
        ("front*", ("front*",)),
        ("cpu.service", ("_cpu.service", "_cpu.socket")),
    ],
)
def test_unit_is_taken_as_systemctl_takes_it(text: str, expected: tuple[str, ...]) -> None:
    """Without a type it is a service, an alias is its unit; what a policy covers comes along."""
    assert names.covered_by(text) == expected


def tree(tmp_path: Path) -> CgroupTree:
    for path in ("system.slice/app.service", "system.slice/ssh.service", "a/twice", "b/twice",
                 "a/cron.service", "b/cron.service"):  # fmt: skip
        (tmp_path / "tree" / path).mkdir(parents=True, exist_ok=True)
    return CgroupTree(tmp_path / "tree")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("system.slice/app.service", "/system.slice/app.service"),
        ("/system.slice/app.service", "/system.slice/app.service"),
        ("system.slice/../a/twice/", "/a/twice"),
        ("app.service", "/system.slice/app.service"),
        ("app", "/system.slice/app.service"),
        ("sshd", "/system.slice/ssh.service"),
        ("a", "/a"),
    ],
)
def test_path_is_found(tmp_path: Path, text: str, expected: str) -> None:
    """By a path as systemd-cgls(1) prints it, and by the name of a unit."""
    assert names.path(tree(tmp_path), text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no cgroup, expected a directory below {tree}"),
        ("none", "cgroup none, expected a directory below {tree}, or a running unit"),
        ("none/none", "cgroup none/none, expected a directory below {tree}"),
        ("cron", "cron is ambiguous: /a/cron.service, /b/cron.service; give one of these paths"),
    ],
)
def test_what_is_meant_is_said(tmp_path: Path, text: str, said: str) -> None:
    """A name that nothing has, or several cgroups, is refused with what may be."""
    with pytest.raises(RefusedError) as raised:
        names.path(tree(tmp_path), text)
    assert str(raised.value) == said.format(tree=tmp_path / "tree")


@pytest.mark.parametrize(
    "text", ["app", "app.service", "ssh", "sshd", "front", "cron", "a", "twice", "tmpl@1", "x*"]
)
def test_unit_that_runs_or_is_installed_is_known(
    tmp_path: Path, directory: Path, text: str
) -> None:
    """By its cgroup or its file, an alias, too, and an instance by its template; a glob may mean
    units of later."""
    (directory / "tmpl@.service").touch()
    names.require_unit(text, tree(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sshs", "did you mean ssh.service?"),
        ("crom.service", "did you mean cron.service?"),
        ("none", "try: systemctl list-units --all"),
        ("tmpl@1", "try: systemctl list-units --all"),
    ],
)
def test_unit_that_nobody_knows_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """With the name that is meant, if one is near."""
    with pytest.raises(RefusedError) as raised:
        names.require_unit(text, tree(tmp_path))
    assert str(raised.value) == f"{text}: no such unit, running or installed; {said}"
