"""Units whose policy does not reach their sockets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabpf.commands import explain
from kabpf.doctor import elsewhere
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.observe import containers
from kabpf.plan.state import Cgroup
from kabpf.policy import parser

OWN = "/system.slice/app.service"
SESSION = "/user.slice/user-1001.slice/session-c3.scope"


def shown(command: str, main: int = 7, state: str = "active", sub: str = "running") -> str:
    """As `systemctl show` has it."""
    return (
        f"Id=app.service\nActiveState={state}\nSubState={sub}\nMainPID={main}\n"
        f"ControlGroup={OWN}\nExecStart={{ path={command.split()[0]} ; argv[]={command} ;"
        " ignore_errors=no ; start_time=[n/a] }\nPAMName=\n"
    )


def found(
    tmp_path: Path, text: str, place: str = OWN, *, populated: bool = True
) -> list[tuple[str, str]]:
    """What is said, and advised, of a unit whose main process is at `place`."""
    (tmp_path / OWN[1:]).mkdir(parents=True, exist_ok=True)
    (tmp_path / OWN[1:] / "cgroup.events").write_text(f"populated {int(populated)}\n")
    judged = elsewhere.judged(text, CgroupTree(tmp_path), lambda _: place)
    return [(each.text, each.advice) for each in judged]


USER = (
    "start it with User= and without PAM (setpriv, runuser -u), or select unit: user-1001.slice,"
    " which has all sessions of that user"
)
ENGINE = "select the containers: cgroup: /system.slice/docker-*.scope"
SPLIT = "add --cgroups=split to podman run, or select cgroup: /machine.slice/libpod-*.scope"


@pytest.mark.parametrize(
    ("command", "place", "advice"),
    [
        ("/bin/su - app -c /opt/app", SESSION, USER),
        ("/sbin/runuser -l app -c /opt/app", f"{SESSION}/below", USER),
        ("/opt/app", "/elsewhere/app", "select cgroup: /elsewhere/app"),
        ("/usr/bin/podman run x", "/machine.slice/libpod-conmon-1.scope", SPLIT),
        ("/opt/app", "/system.slice/app.service2", "select cgroup: /system.slice/app.service2"),
    ],
)
def test_main_process_in_another_cgroup_is_told(
    tmp_path: Path, command: str, place: str, advice: str
) -> None:
    """With the cgroup that it is in, and what to select or to change."""
    text = f"app.service is active, but its main process 7 is in {place}"
    assert found(tmp_path, shown(command), place) == [(text, advice)]


@pytest.mark.parametrize(
    ("command", "sub", "advice"),
    [
        ("/usr/bin/podman run --rm x", "running", SPLIT),
        ("/usr/bin/env A=1 /usr/bin/docker run x", "running", ENGINE),
        ("/usr/bin/docker compose up -d", "exited", ENGINE),
    ],
)
def test_engine_is_told(tmp_path: Path, command: str, sub: str, advice: str) -> None:
    """A client of an engine is in the unit, and the containers are not."""
    ((text, advised),) = found(tmp_path, shown(command, sub=sub), populated=sub == "running")
    assert text.endswith("whose containers are in cgroups of their own")
    assert advised == advice


@pytest.mark.parametrize("own", [f" {OWN}", ""])
@pytest.mark.parametrize("sub", ["running", "exited"])
def test_empty_cgroup_of_an_active_unit_is_told(tmp_path: Path, own: str, sub: str) -> None:
    """Where no main process says where the others are. systemd removes the cgroup of a oneshot that
    has ended, whose processes may be in a session, or in another unit."""
    text = shown("/opt/app", main=0, sub=sub).replace(OWN, own.strip())
    assert found(tmp_path, text, populated=False) == [
        (
            f"app.service is active, but no process is in its cgroup{own}",
            "systemctl status app.service",
        )
    ]


@pytest.mark.parametrize(
    "text",
    [
        shown("/opt/app"),
        shown("/usr/bin/podman run --cgroups=split x"),
        shown("/usr/bin/podman ps"),
        shown("/bin/su - app", main=0, state="inactive", sub="dead"),
        "",
        f"Id=app.service\nActiveState=active\nMainPID=x\nControlGroup={OWN}\n",
        "no assignment\n\n=\n",
    ],
)
def test_unit_that_is_reached_is_not_told(tmp_path: Path, text: str) -> None:
    """Nor one that does not run, nor text that is no answer."""
    assert found(tmp_path, text, f"{OWN}/below") == []


def test_process_that_can_not_be_seen_is_not_told(tmp_path: Path) -> None:
    """As for kabpf.service, from which those of others are hidden."""
    (tmp_path / OWN[1:]).mkdir(parents=True)

    def place(_: str) -> str:
        raise RefusedError("process 7")

    (tmp_path / OWN[1:] / "cgroup.events").write_text("populated 1\n")
    assert list(elsewhere.judged(shown("/opt/app"), CgroupTree(tmp_path), place)) == []


def test_unit_that_started_a_process_is_found() -> None:
    """Also by the processes in between."""
    unit = elsewhere.Elsewhere("app.service", os.getppid(), "", "")
    other = elsewhere.Elsewhere("other.service", 0, "", "")
    assert elsewhere.started(os.getpid(), [other, unit]) is unit
    assert elsewhere.started(os.getpid(), [other]) is None


@pytest.mark.parametrize(
    ("path", "manager", "container"),
    [
        ("/system.slice/app.service", "", ""),
        ("/init.scope", "", ""),
        ("/user.slice/user-7.slice/user@7.service/app.slice/a.service",
         "/user.slice/user-7.slice/user@7.service", ""),
        ("/machine.slice/box.scope/payload/system.slice/app.service",
         "/machine.slice/box.scope/payload", "/machine.slice/box.scope/payload"),
        ("/machine.slice/box.scope/payload/init.scope",
         "/machine.slice/box.scope/payload", "/machine.slice/box.scope/payload"),
        ("/machine.slice/box.scope/payload/user.slice/user@0.service/a.service",
         "/machine.slice/box.scope/payload/user.slice/user@0.service",
         "/machine.slice/box.scope/payload"),
        ("/machine.slice/box.scope/supervisor", "", ""),
        ("/machine.slice/libpod-1.scope/container/system.slice/app.service", "", ""),
    ],
)  # fmt: skip
def test_systemd_of_a_container_is_found(
    tmp_path: Path, path: str, manager: str, container: str
) -> None:
    """By the scope that each systemd has for itself; a user's is in no container."""
    for above in (
        "", "/user.slice/user-7.slice/user@7.service", "/machine.slice/box.scope/payload",
        "/machine.slice/box.scope/payload/user.slice/user@0.service",
    ):  # fmt: skip
        (tmp_path / above[1:] / "init.scope").mkdir(parents=True)
    tree = CgroupTree(tmp_path)
    assert next(elsewhere.managers_above(path, tree), "") == manager
    assert elsewhere.container(path, tree) == container


USER_7 = "/user.slice/user-7.slice/user@7.service"


def of_users(*below: str) -> list[tuple[str, str]]:
    """What is said, and advised, of containers below a user's manager."""
    found = elsewhere.of_users(f"{USER_7}/{each}" for each in below)
    return [(each.text, each.advice) for each in found]


@pytest.mark.parametrize(
    ("below", "selector"),
    [
        ("user.slice/libpod-{}.scope", f"cgroup: {USER_7}/user.slice/libpod-*.scope"),
        ("user.slice/docker-{}.scope", f"cgroup: {USER_7}/user.slice/docker-*.scope"),
        ("libpod-{}", f"cgroup: {USER_7}/libpod-*"),
        ("app.slice/db.service/libpod-payload-{}", "user_unit: db.service"),
        ("app.slice/a\\x2db@1.service/libpod-payload-{}", r"user_unit: a\x2db@1.service"),
        ("a*b/libpod-{}.scope", f"cgroup: {USER_7}/**"),
        ("app.slice/*.service/libpod-payload-{}", f"cgroup: {USER_7}/**"),
        ("app.slice/a b.service/libpod-payload-{}", f"cgroup: {USER_7}/**"),
    ],
)
def test_container_of_a_user_is_told_with_the_selector_that_names_it(
    below: str, selector: str
) -> None:
    """And no name that a user makes up selects more; where a policy has that, it is theirs."""
    path = below.format("a" * 64)
    ((text, advice),) = of_users(path, f"{path}/container")
    assert text == (
        f"{USER_7}/{path} is a container of user 7, whose engine's store is in the user's home,"
        " which kabpf does not read: container: and pod: selectors do not name it"
    )
    assert advice == f"select {selector}"
    kind, _, glob = selector.partition(": ")
    policy = parser.combine(
        [parser.parse(f"{{select: [{{{kind}: '{glob}'}}], keepalive: on}}".encode(), "/p.yaml")]
    )
    (found,) = explain.decided(policy, [Cgroup(2, 1, f"{USER_7}/{path}")])
    assert found.policy is policy[0]


def test_containers_of_a_user_are_told_once() -> None:
    """However many there are; with one selector for all of them."""
    scopes = [f"user.slice/libpod-{digit * 64}.scope" for digit in "abc"]
    ((text, advice),) = of_users(*scopes)
    assert text.startswith(f"{USER_7}/{scopes[0]} and 2 more containers are containers of user 7,")
    assert text.endswith(" selectors do not name them")
    assert advice == f"select cgroup: {USER_7}/user.slice/libpod-*.scope"
    ((_, advice),) = of_users(*scopes, f"app.slice/db.service/libpod-payload-{'d' * 64}")
    assert advice == f"select cgroup: {USER_7}/**"


def test_container_that_an_engine_knows_is_no_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's engine may have started it below a user's manager."""
    monkeypatch.setattr(containers, "of", lambda path: object())
    assert of_users(f"user.slice/libpod-{'a' * 64}.scope") == []
