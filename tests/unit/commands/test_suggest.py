"""Which file `kabpfctl suggest` writes for which cgroup, and that it writes over none."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import pytest
from audited import OFF, connection, on

from kabpf import output
from kabpf.audit import silence
from kabpf.audit.units import AtRisk, Counts, Unit
from kabpf.commands import suggest
from kabpf.commands.audit import Audited
from kabpf.containers.facts import Container, Pod
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.observe import containers
from kabpf.policy import files, parser, presets, selectors, writer
from kabpf.policy.model import Options, Policy, Rules

ID = "0123456789abcdef" * 4
SHOP = Pod("shop", "web-1", "1")
SESSIONS = '{unit: "session-*.scope"}'
USER = "/user.slice/user-1000.slice/user@1000.service"
KNOWN = {
    f"/machine.slice/libpod-{ID}.scope": Container(ID, "podman", "web", "registry.example/web"),
    f"/kubepods.slice/crio-{ID}.scope": Container(ID, "crio", "main", "web", pod=SHOP),
    f"/system.slice/docker-{ID}.scope": Container(ID, "docker", "we*b", "web"),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "of", KNOWN.get)


@pytest.mark.parametrize(
    ("path", "stem", "selected"),
    [
        ("/system.slice/billing.service", "billing.service", ""),
        (
            "/system.slice/system-postgresql.slice/postgresql@15-main.service",
            "postgresql@.service",
            "",
        ),
        ("/system.slice/10-app.service", "cgroup-system.slice-10-app.service-", "{cgroup: "),
        (f"{USER}/app.slice/sync.service", "user-sync.service", "{user_unit: sync.service}"),
        (f"{USER}/app.slice/sync@a.service", "user-sync@.service", "{user_unit: sync@.service}"),
        (
            f"{USER}/app.slice/app-gnome-firefox-4711.scope",
            "user-app-gnome-firefox.scope",
            '{user_unit: "app-gnome-firefox-*.scope"}',
        ),
        (f"{USER}/app.slice/a b.service", "cgroup-user.slice-", "{cgroup: "),
        ("/user.slice/user-1000.slice/session-3.scope", "scope-session", SESSIONS),
        ("/user.slice/user-0.slice/session-c1.scope", "scope-session", SESSIONS),
        ("/init.scope", "init.scope", ""),
        ("/system.slice/app.service/work", "app.service", ""),
        (
            "/system.slice/app.service/ssh.service",
            "cgroup-system.slice-app.service-ssh.service-",
            "{cgroup: /system.slice/app.service/ssh.service}",
        ),
        ("/top/app.service", "app.service", ""),
        (USER, "user@.service", ""),
        ("/a/b", "cgroup-a-b-", "{cgroup: /a/b}"),
        (f"/machine.slice/libpod-{ID}.scope", "container-web", "{container: {name: web}}"),
        (
            f"/kubepods.slice/crio-{ID}.scope",
            "pod-shop-main-",
            "{pod: {namespace: shop, container: main}}",
        ),
    ],
)
def test_cgroup_has_a_file(path: str, stem: str, selected: str) -> None:
    """Named after its unit, where that selects it; else with a selector."""
    found = suggest.named(path)
    assert found.stem.startswith(stem)
    assert files.has_policy_name(f"{found.stem}.yaml")
    if selected:
        assert writer.selector(found.selectors[0]).startswith(selected)
        assert found.selectors
    else:
        assert (found.stem, found.selectors) == (stem, ())
        assert selectors.named_by(found.stem, "")


@pytest.mark.parametrize(
    "path",
    [
        None, "/", "/system.slice", "/a/b*c", "/a/b\nc", "/a/\udcff",
        f"{USER}/app.slice/*.service", "/system.slice/a?c.service", "/system.slice/run-u12.service",
        "/system.slice/run-r0123abcd.scope", f"{USER}/app.slice/run-p12-i34.scope",
        f"/system.slice/docker-{ID}.scope", f"/system.slice/docker-{ID[::-1]}.scope",
    ],
)  # fmt: skip
def test_cgroup_that_no_file_can_select_has_none(path: str | None) -> None:
    """The reason is said."""
    with pytest.raises(RefusedError):
        suggest.named(path)


@pytest.mark.parametrize(
    "where", ["/system.slice/{}.service", f"{USER}/app.slice/{{}}.service", "/a.service/{}"]
)
def test_file_selects_what_a_stranger_named_and_nothing_else(where: str) -> None:
    """Or there is none."""
    made = 0
    for raw in hostile.NAMES.values():
        try:
            named = suggest.named(where.format(os.fsdecode(raw[:240])))
        except RefusedError as error:
            assert output.shown(str(error)) == str(error)
            continue
        file = f"{named.stem}.yaml"
        assert files.has_policy_name(file)
        policy = Policy("a", named.selectors, Rules(Options(True)), suggest.NOWHERE)
        (read,) = parser.combine([parser.parse(writer.text(policy, "why").encode(), file)])
        (selector,) = read.selectors
        assert not selector.is_glob
        assert [selector.text] == ([each.text for each in named.selectors] or [named.stem])
        made += 1
    assert made > 5


def test_names_of_strangers_make_different_files() -> None:
    """Of one line, and never a path."""
    stems = {
        suggest.named(path).stem for path in ("/a/b", "/a-b", "/a b", "/../b", f"/{'a' * 250}")
    }
    assert len(stems) == 5
    for stem in stems:
        assert "/" not in stem
        assert len(stem) < 200


def test_cgroups_of_users_leave_root_s_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and connections in them: --write fills no directory, and more
    policies than the kernel has room for would be refused at the next apply."""
    monkeypatch.setattr(suggest, "FILES_MAX", 3)
    at_risk: list[Any] = [None, None]
    units = {
        path: Unit(path, path, [], at_risk=at_risk * count)
        for path, count in (("/u/a", 2), ("/u/b", 3), ("/u/c", 4), ("/r/a", 1), ("/r/b", 2))
    }
    by_file = {suggest.named(path): [unit] for path, unit in units.items()}
    found = suggest.first(by_file, lambda path: 1000 if path.startswith("/u/") else 0)
    assert [unit.name for (unit,) in found.values()] == ["/r/b", "/r/a", "/u/c"]


def test_names_of_strangers_make_no_line_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Of cgroups with connections at risk: each has a file that is read as it is meant, or it is
    said why it has none. What is printed are lines of printable characters."""
    found = {}
    for raw in hostile.NAMES.values():
        path = f"/own/{os.fsdecode(raw)}"
        one = connection(keepalive=OFF)
        found[path] = Unit(*suggest.audit.named(path), [Counts(1)], connections=1)
        found[path].at_risk = [AtRisk(one, silence.of(one))]
    audited = Audited([*found.values()], True, 1, [])
    preview = SimpleNamespace(plan=SimpleNamespace(cgroups={}))
    monkeypatch.setattr(suggest.audit, "look", lambda *_: audited)
    monkeypatch.setattr(suggest.cgroups, "find_tree", lambda _: CgroupTree(tmp_path))
    monkeypatch.setattr(suggest.mountinfo, "own_mounts", tuple)
    monkeypatch.setattr(suggest.files, "read_all", lambda _: {})
    monkeypatch.setattr(suggest.files, "paths", lambda _: [])
    monkeypatch.setattr(suggest.reconcile, "preview", lambda *_: preview)
    given: Any = {"timeout": 350, "preset": None, "unit": None, "write": False}
    for as_json in (False, True):
        assert suggest.suggest(argparse.Namespace(**given, json=as_json)) == 1
        out, err = capfdbinary.readouterr()
        assert hostile.wrong_with(out, "C.UTF-8") == hostile.wrong_with(err, "C.UTF-8") == ""
    policies = json.loads(out)["policies"]
    assert len(policies) > 5
    for each in policies:
        parsed = parser.parse(each["text"].encode(), each["file"])
        ((selector,),) = (policy.selectors for policy in parser.combine([parsed]))
        assert selector.kind == "unit" or selector.text in found


def test_what_waits_for_its_policy_needs_no_other() -> None:
    """Files that are not applied yet, and timers that began in a silence, leave connections at risk
    for a while."""
    (policy,) = parser.combine(
        [parser.parse(b"keepalive: {idle: 60, interval: 10}", "a.service.yaml")]
    )
    late = connection(keepalive=on(60), timer=2, silence_ms=350_000, expires_ms=50_000)
    making: Any = object.__new__(suggest._Making)
    making._asked, making._timeout = suggest.Asked(350, None), presets.Timeout(350)
    making._installed, making._names = [], set()
    for one in (connection(), late):
        unit = Unit("a.service", "/a.service", [Counts(1)], connections=1)
        unit.at_risk = [AtRisk(one, silence.of(one))]
        assert unit.at_risk[0].silence.is_at_risk(350)
        making._present = {one.cgroup_id: policy}
        with pytest.raises(RefusedError, match="policy files are enough"):
            making._one(suggest.Named("a.service"), [unit])
        making._present = {}
        assert (
            making._one(suggest.Named("a.service"), [unit]).proposal.file.name == "a.service.yaml"
        )


def test_no_file_is_written_over(tmp_path: Path) -> None:
    """Not even one that comes meanwhile, or a link to nowhere; no other is left behind."""
    there, link = tmp_path / "there.yaml", tmp_path / "link.yaml"
    there.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    proposals: list[Any] = [
        suggest.Proposal(path, "new") for path in (there, link, tmp_path / "fresh.yaml")
    ]
    written, refused = suggest.write(proposals)
    assert [each.file.name for each in written] == ["fresh.yaml"]
    assert len(refused) == 2
    assert there.read_text() == "mine"
    assert (tmp_path / "fresh.yaml").read_text() == "new"
    assert (tmp_path / "fresh.yaml").stat().st_mode & 0o777 == 0o644
    assert len([*tmp_path.iterdir()]) == 3
