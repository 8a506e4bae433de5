"""What decides about a cgroup, and the words in which it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plans import container

from kabpf.commands import explain
from kabpf.commands.explain import Reason
from kabpf.doctor import elsewhere
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.observe import containers
from kabpf.plan import containers as plan_containers
from kabpf.plan.state import Cgroup
from kabpf.policy import files, parser
from kabpf.policy.files import Directories
from kabpf.policy.model import Policy

MAIN = """\
defaults: {probes: 6}
policies:
  all:
    select: [{cgroup: "/a/**"}]
    keepalive: {idle: 60}
  unit:
    select:
      - {unit: "x.service"}
      - {unit: "y.service"}
    keepalive:
      preset: aws-nlb
      user_timeout: auto
      jitter: 10%
    direction: out
    destinations:
      - {to: 10.0.0.0/8, ports: [5432, 6432], idle: 30s..90s}
      - {to: "2001:db8::/32", keepalive: off}
"""


@pytest.fixture
def policies(tmp_path: Path) -> tuple[Policy, ...]:
    (tmp_path / "policy.yaml").write_text(MAIN)
    where = Directories(tmp_path / "policy.yaml", ())
    return parser.combine([files.read(path) for path in files.paths(where)])


def reason(policies: tuple[Policy, ...], path: str) -> Reason:
    (found,) = explain.decided(policies, [Cgroup(1, 0, path)])
    return found


def test_selector_that_decides_is_named(policies: tuple[Policy, ...], tmp_path: Path) -> None:
    """The winner comes with its own selector, and with those that name the same cgroup and are
    weaker."""
    found = reason(policies, "/a/y.service")
    assert found.policy and found.selector
    assert (found.policy.name, found.selector.text) == ("unit", "y.service")
    assert [(policy.name, each.text) for policy, each in found.beaten] == [("all", "/a/**")]
    assert found.decided_at == "/a/y.service"


def test_ancestor_that_decides_is_named(policies: tuple[Policy, ...]) -> None:
    """Where nothing names a cgroup itself, the nearest one above that is named decides."""
    found = reason(policies, "/b/x.service/deep/er")
    assert found.policy and found.policy.name == "unit"
    assert found.decided_at == "/b/x.service"


def test_socket_is_told_from_its_service(policies: tuple[Policy, ...], tmp_path: Path) -> None:
    """A socket that a service's selector brings along says so."""
    lines = explain.lines(reason(policies, "/b/x.socket"), None)
    because = f"  because unit x.service ({tmp_path}/policy.yaml:8) names it, as one of its sockets"
    assert lines[2] == because


@pytest.mark.parametrize("path", ["/", "/b", "/a"])
def test_cgroup_without_policy_is_said_to_have_none(
    policies: tuple[Policy, ...], path: str
) -> None:
    """Where nothing names the cgroup or one above it, that is the answer."""
    found = reason(policies, path)
    assert (found.policy, found.selector, found.beaten) == (None, None, ())
    assert explain.lines(found, None) == [
        path,
        "  no policy: nothing names it, nor a cgroup above it",
    ]


def test_each_option_has_its_line_and_arithmetic(
    policies: tuple[Policy, ...], tmp_path: Path
) -> None:
    """Every value is told with the file and line that gave it, and with how it was computed."""
    shown = explain.lines(reason(policies, "/b/x.service/in"), False)
    file = tmp_path / "policy.yaml"
    assert [" ".join(line.split()) for line in shown] == [
        "/b/x.service/in",
        f"policy unit, {file}:6",
        f"because unit x.service ({file}:8) names /b/x.service, which it is in",
        "changed since the last apply; try: kabpfctl apply",
        "OPTION VALUE SOURCE",
        "mode fill default",
        f"direction out {file}:14",
        "loopback true default",
        "existing true default",
        f"keepalive on {file}:10",
        f"idle 175s {file}:11",
        "preset aws-nlb: half of its idle timeout of 350 s",
        f"interval 29s {file}:11",
        "preset aws-nlb: a twelfth of its idle timeout of 350 s",
        f"probes 5 {file}:11",
        "preset aws-nlb: idle + interval * 5 stays below its idle timeout of 350 s",
        f"user timeout 320s {file}:12",
        "auto: 175 s + 29 s * 5",
        f"jitter 10% {file}:13",
        "to 10.0.0.0/8 port 5432, 6432: keepalive on, idle 30s..90s, interval 29s, probes 5,"
        " user timeout 235s, jitter 10%",
        "to 2001:db8::/32: keepalive off",
    ]


def test_json_has_the_same(policies: tuple[Policy, ...], tmp_path: Path) -> None:
    """Programs get each value with its source, and the weaker selectors."""
    shown = json.loads(json.dumps(explain.as_json(reason(policies, "/a/x.service"), True)))
    file = tmp_path / "policy.yaml"
    assert (shown["cgroup"], shown["policy"], shown["active"]) == ("/a/x.service", "unit", True)
    assert shown["selector"] == {"unit": "x.service", "source": f"{file}:8"}
    assert shown["weaker"] == [{"policy": "all", "cgroup": "/a/**", "source": f"{file}:4"}]
    assert shown["values"]["probes"]["value"] == 5
    assert shown["values"]["direction"] == {"value": "out", "source": f"{file}:14", "note": ""}
    assert shown["values"]["mode"] == {"value": "fill", "source": None, "note": "default"}
    assert shown["destinations"][0]["to"] == "10.0.0.0/8"
    assert shown["destinations"][0]["options"]["idle_s"] == [30, 90]


def test_container_selector_that_decides_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the selectors of its path that it beats; what is below is in it."""
    path = f"/machine.slice/libpod-{'a' * 64}.scope"
    (tmp_path / "policy.yaml").write_text(
        "policies:\n"
        "  engine: {select: [{container: {engine: podman}}], keepalive: on}\n"
        "  slice: {select: [{cgroup: /machine.slice/**}], keepalive: on}\n"
        "  name: {select: [{unit: nginx.service}, {container: {name: web-*}}], keepalive: on}\n"
    )
    where = Directories(tmp_path / "policy.yaml", ())
    found = parser.combine([files.read(each) for each in files.paths(where)])
    known = container({"name": "web-1", "id": "a" * 64, "image": "registry.example/web:1"})
    containers._known.cache_clear()
    monkeypatch.setattr(
        containers, "_looked_up", lambda own, id, second: known if own == path else None
    )
    for inside in (path, f"{path}/container", f"{path}/container/nginx.service"):
        got = reason(found, inside)
        assert got.policy and got.selector
        assert (got.policy.name, got.selector.kind, got.decided_at) == ("name", "container", path)
        assert [policy.name for policy, _ in got.beaten] == ["engine", "slice"]
    text = explain.lines(reason(found, f"{path}/container"), None)
    assert text[:4] == [
        "web-1",
        f"  cgroup {path}/container",
        "  container aaaaaaaaaaaa of podman, image registry.example/web:1",
        f"  policy name, {tmp_path}/policy.yaml:4",
    ]
    assert text[4].startswith(f'  because container {{name: "web-*"}} ({tmp_path}/policy.yaml:4)')
    containers._known.cache_clear()


USER_7 = "/user.slice/user-7.slice/user@7.service"
OF_USER = f"{USER_7}/user.slice/libpod-{'a' * 64}.scope"


@pytest.mark.parametrize(
    ("select", "is_told"),
    [
        ("container: {name: web}", True),
        ("unit: user-7.slice", True),
        ("user_unit: libpod-*.scope", False),
        (f"cgroup: {USER_7}/**", False),
    ],
)
def test_container_of_a_user_is_told_unless_its_policy_is_for_the_users_manager(
    select: str, is_told: bool
) -> None:
    """A policy of a slice above may be inherited where a container's was meant."""
    text = f"{{select: [{{{select}}}], keepalive: on}}"
    found = parser.combine([parser.parse(text.encode(), "/p.yaml")])
    below = explain._beyond_containers([reason(found, f"{OF_USER}/container")])
    assert len(elsewhere.of_users(below)) == is_told


@pytest.mark.parametrize(
    ("labels", "policy", "refusal"),
    [
        ({"io.kabpf.keepalive": "idle=60"}, "container:idle=60s", ""),
        ({"io.kabpf.keepalive": "idle=60", "io.kabpf.policy": "gift"}, "gift", "policy gift"),
        ({"io.kabpf.keepalive": "idle=60", "team": "web"}, "web", "policy web is stronger"),
        ({"io.kabpf.keepalive": "idle=5", "team": "web"}, "web", "idle: 5 s is not in 30..3600 s"),
        ({"io.kabpf.keepalive": "idle=99"}, None, "containers have 1 others already"),
        ({"team": "web"}, "web", ""),
    ],
)
def test_why_options_of_a_container_do_not_count(
    labels: dict[str, str], policy: str | None, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because they are wrong, or something else is stronger, or others have the room."""
    monkeypatch.setattr(plan_containers, "ASKED_MAX", 1)
    text = (
        "containers: {idle: 30s..1h}\npolicies:\n"
        "  gift: {offered: true, keepalive: on}\n"
        "  web: {select: [{container: {label: {team: web}}}], keepalive: on}\n"
    )
    found = parser.combine([parser.parse(text.encode(), "/p.yaml")])
    path = f"/machine.slice/libpod-{'a' * 64}.scope"
    known = container({"id": "a" * 64, "labels": labels})
    containers._known.cache_clear()
    monkeypatch.setattr(
        containers, "_looked_up", lambda own, id, second: known if own == path else None
    )
    (got,) = explain.decided(found, [Cgroup(1, 0, path)], ["container:idle=60s"])
    assert (got.policy and got.policy.name) == policy
    assert got.refusal.startswith(refusal) and bool(got.refusal) == bool(refusal)
    containers._known.cache_clear()


@pytest.mark.parametrize(
    ("name", "is_told"), [("web", True), ("web*", True), ("no-such-one.service", False)]
)
def test_names_of_users_containers_are_said_to_be_unknown(
    name: str, is_told: bool, tmp_path: Path
) -> None:
    """Where there are such containers, and what is asked for is no unit."""
    (tmp_path / OF_USER[1:]).mkdir(parents=True)
    told = "kabpf does not know the names of users' containers"
    with pytest.raises(RefusedError) as error:
        explain._cgroups(name, CgroupTree(tmp_path))
    assert (told in str(error.value)) is is_told
    (tmp_path / OF_USER[1:]).rmdir()
    with pytest.raises(RefusedError) as error:
        explain._cgroups(name, CgroupTree(tmp_path))
    assert told not in str(error.value)
