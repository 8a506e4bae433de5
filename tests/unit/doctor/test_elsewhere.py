"""Units whose policy does not reach their sockets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kabpf.doctor import elsewhere
from kabpf.errors import RefusedError
from kabpf.kernel.cgroups import CgroupTree

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
