"""What `kabpfctl import` finds, and the policies that it proposes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kabpf.migration import places, proposals, wanted
from kabpf.policy import model, parser

UNIT = "usr/lib/systemd/system/db.service"
DROP_IN = "etc/systemd/system/db.service.d/keepalive.conf"
KEEPALIVE = "Environment=LD_PRELOAD=libkeepalive.so"
DONTDIE = "Environment=LD_PRELOAD=libdontdie.so"
THREE = "DD_TCP_KEEPALIVE_TIME=60 DD_TCP_KEEPALIVE_INTVL=10 DD_TCP_KEEPALIVE_PROBES=6"
OPTIONS = "keepalive: {idle: 60, interval: 10, probes: 6}"

Look = Callable[[dict[str, str]], proposals.Found]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Looks at a system that has these files and Debian's libkeepalive; those of units without a
    section are services'."""

    def found(files: dict[str, str]) -> proposals.Found:
        for name, text in {"usr/lib/libkeepalive.so": "\0KEEPIDLE\0", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            is_unit = "systemd/" in name and not text.startswith("[")
            path.write_text(f"[Service]\n{text}\n" if is_unit else f"{text}\n")
        return proposals.look(tmp_path, proc=None)

    return found


def read(found: proposals.Found) -> tuple[model.Policy, ...]:
    """The policies, as files have them."""
    assert {str(each.file.parent) for each in found.policies} <= {"/etc/kabpf/policy.d"}
    parsed = [parser.parse(each.text.encode(), str(each.file)) for each in found.policies]
    return parser.combine(parsed)


def proposed(found: proposals.Found) -> dict[str, list[str]]:
    """The lines of each policy without its comment, by the file's name; each one is right."""
    assert model.warnings(read(found)) == []
    return {each.file.name: each.text.splitlines()[1:] for each in found.policies}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (KEEPALIVE, "keepalive: on"),
        (f"{KEEPALIVE} KEEPIDLE=60 KEEPINTVL=10 KEEPCNT=6", OPTIONS),
        (f"{DONTDIE} {THREE}", OPTIONS),
        (f"{DONTDIE}\nEnvironment={THREE}", OPTIONS),
        (f'Environment="LD_PRELOAD=/a.so /usr/lib/$LIB/libdontdie.so.0" {THREE}', OPTIONS),
        (f"Environment=LD_PRELOAD=/a.so:libdontdie.so \\\n# why\n {THREE}", OPTIONS),
        (f"{KEEPALIVE} KEEPALIVE=off KEEPIDLE=60", "keepalive: off"),
        (f"{DONTDIE} DD_USE_KEEPALIVE=0", "keepalive: off"),
        (f"{KEEPALIVE} {THREE}", "keepalive: on"),  # another library's variables
        (f"{KEEPALIVE} KEEPIDLE= KEEPCNT=", "keepalive: on"),
        (f"ExecStart=/bin/sh -c 'LD_PRELOAD=libdontdie.so {THREE} exec db'", OPTIONS),
        (f"ExecStart=/usr/bin/env -S 'LD_PRELOAD=libdontdie.so {THREE} db'", OPTIONS),
        (f"ExecStart=/bin/sh -c 'exec env -i LD_PRELOAD=libdontdie.so {THREE} db'", OPTIONS),
        (f"{DONTDIE} {THREE}\nExecStart=/usr/bin/nice -n 5 /usr/bin/ionice -c3 db", OPTIONS),
        (
            f"Environment=A={THREE.split()[0]}\nEnvironment=LD_PRELOAD=libdontdie.so"
            "\nExecStart=env $A DD_TCP_KEEPALIVE_INTVL=10 DD_TCP_KEEPALIVE_PROBES=${B}6 db",
            OPTIONS,
        ),
        (f"{DONTDIE}\nEnvironment=DD_TCP_KEEPALIVE_TIME=5\n{DONTDIE} {THREE}", OPTIONS),
        (f"ExecStart=!/usr/bin/env -u A LD_PRELOAD=libdontdie.so {THREE} db A=b", OPTIONS),
        (f"{KEEPALIVE}\nUnsetEnvironment=LD_PRELOAD=other.so KEEPALIVE", "keepalive: on"),
    ],
)
def test_environment_of_a_unit(look: Look, lines: str, expected: str) -> None:
    """A unit whose environment preloads one of the two gets a policy that says the same."""
    found = look({UNIT: lines})
    assert proposed(found) == {"db.service.yaml": ["select: [{unit: db.service}]", expected]}
    assert (found.left_out, found.unclear) == ([], [])


@pytest.mark.parametrize(
    "lines",
    [
        "Environment=KEEPIDLE=60",
        f"{DONTDIE}\nEnvironment=",
        f"{DONTDIE}\nEnvironment=LD_PRELOAD=",
        f"{DONTDIE}\nUnsetEnvironment=LD_PRELOAD",
        f"# {DONTDIE}",
        f"{DONTDIE}\nExecStart=/usr/bin/env -u LD_PRELOAD db",
        f"{DONTDIE}\nExecStart=/usr/bin/env -i db",
        f"{DONTDIE}\nExecStart=/usr/bin/env - db",
        f"{DONTDIE}\nExecStart=/bin/sh -c 'unset LD_PRELOAD; exec db'",
        f"{DONTDIE}\nExecStart=/usr/bin/sudo -u db db",
        f"{DONTDIE}\nExecStart=/bin/su - db -c db",
        "Environment=LD_PRELOAD=libother.so LD_LIBRARY_PATH=/opt/keepalive",
        "[Socket]\nEnvironment=LD_PRELOAD=",
    ],
)
def test_unit_that_preloads_neither(look: Look, lines: str) -> None:
    """Variables alone, and what is reset or a comment, are nothing to replace."""
    found = look({UNIT: lines})
    assert (found.policies, found.unclear) == ([], [])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("-/etc/default/db", OPTIONS),
        ("/etc/default/d*", OPTIONS),
        ("/etc/default/%p", OPTIONS),
        ("/etc/default/%N", OPTIONS),
        ("-/etc/default/none", "keepalive: {idle: 5}"),
        ("-/etc/default/%H", "keepalive: {idle: 5}"),
    ],
)
def test_environment_file_of_a_unit(look: Look, value: str, expected: str) -> None:
    """What EnvironmentFile= names is read after Environment=, as far as its name is known."""
    unit = f"EnvironmentFile={value}\n{DONTDIE} DD_TCP_KEEPALIVE_TIME=5"
    found = look({UNIT: unit, "etc/default/db": THREE.replace(" ", "\n")})
    assert proposed(found)["db.service.yaml"][1] == expected


def test_name_of_a_file_writes_no_line(look: Look) -> None:
    """A newline in the name of a file that is read makes no further line of the policy."""
    name = "etc/env.d/a\nmode: enforce\n#.env"
    found = look({UNIT: f"EnvironmentFile=/etc/env.d/*\n{DONTDIE}", name: THREE.replace(" ", "\n")})
    assert proposed(found)["db.service.yaml"] == ["select: [{unit: db.service}]", OPTIONS]
    (proposal,) = found.policies
    assert "a\\nmode: enforce\\n#.env:1" in proposal.text.splitlines()[0]


@pytest.mark.parametrize(
    ("libraries", "variables", "expected"),
    [
        ("libkeepalive_socket.so", "", ["keepalive: {idle: 15, interval: 15, probes: 9,"
            " user_timeout: auto}"]),
        ("libkeepalive.so", "TCP_KEEPIDLE=60 TCP_KEEPINTVL=0 TCP_KEEPCNT=6",
            ["keepalive: {idle: 60, probes: 6}", "direction: out"]),
        ("libkeepalive_listen.so", "TCP_USER_TIMEOUT=90000 TCP_SYNCNT=3", [
            "keepalive: {idle: 15, interval: 15, probes: 9, user_timeout: 90000ms, syn_retries: 3}",
            "direction: in"]),
        ("libkeepalive.so:libkeepalive_listen.so", "TCP_USER_TIMEOUT=0", [
            "keepalive: {idle: 15, interval: 15, probes: 9, user_timeout: off}"]),
        ("libkeepalive.so", "", ["keepalive: {idle: 15, interval: 15, probes: 9,"
            " user_timeout: auto}", "direction: out"]),
        ("libkeepalive.so", "KEEPIDLE=60 TCP_KEEPIDLE= TCP_SYNCNT=0", ["keepalive: {idle: 15,"
            " interval: 15, probes: 9, user_timeout: auto}", "direction: out"]),
    ],
)  # fmt: skip
def test_libkeepalive_of_santos(
    look: Look, libraries: str, variables: str, expected: list[str]
) -> None:
    """The library of that name with TCP_* variables has defaults of its own, and a direction."""
    found = look({
        "usr/lib/libkeepalive.so": "\0TCP_KEEPIDLE\0",
        UNIT: f"Environment=LD_PRELOAD={libraries} {variables}",
    })  # fmt: skip
    assert proposed(found)["db.service.yaml"][1:] == expected
    assert found.left_out == []


@pytest.mark.parametrize("variables", ["", "TCP_KEEPIDLE=60", "KEEPIDLE=60"])
def test_library_that_is_not_there(look: Look, variables: str) -> None:
    """Whose libkeepalive it is hangs on its variables; without any, both meanings are said."""
    found = look({UNIT: f"Environment=LD_PRELOAD=/opt/libkeepalive.so {variables}"})
    lines = proposed(found)["db.service.yaml"][1:]
    if variables.startswith("TCP"):
        assert lines[1:] == ["direction: out"]
    else:
        assert lines == [f"keepalive: {'{idle: 60}' if variables else 'on'}"]
    said = [each for each in found.left_out if "Debian's" in each and "M. Santos" in each]
    assert len(said) == (variables == "")


@pytest.mark.parametrize("name", wanted.variables.WITHOUT_COUNTERPART)
def test_option_without_counterpart(look: Look, name: str) -> None:
    """What M. Santos's libraries set besides ends with them, and a warning says so."""
    found = look({UNIT: f"Environment=LD_PRELOAD=libkeepalive_socket.so {name}=10"})
    (said,) = found.left_out
    assert f"{UNIT}:2: {name}: no policy has a counterpart" in said
    assert found.unclear == []


def test_variables_of_the_other_library(look: Look) -> None:
    """Where the library that is there is Debian's, M. Santos's variables do nothing."""
    found = look({UNIT: f"{KEEPALIVE} TCP_KEEPIDLE=60"})
    assert proposed(found)["db.service.yaml"][1:] == ["keepalive: on"]
    (said,) = found.left_out
    assert "TCP_KEEPIDLE: is for the libkeepalive of M. Santos" in said


@pytest.mark.parametrize(
    ("lines", "expected", "said"),
    [
        (f"{KEEPALIVE} KEEPIDLE=0 KEEPCNT=6", "keepalive: {probes: 6}",
            "KEEPIDLE: 0 is not in 1 to 32767 seconds; libkeepalive ignores it"),
        (f"{KEEPALIVE} KEEPIDLE=soon", "keepalive: on",
            "KEEPIDLE: soon, expected a number, 1 to 32767 seconds; libkeepalive ignores it"),
        (f"{KEEPALIVE} KEEPIDLE=60s", "keepalive: {idle: 60}",
            "KEEPIDLE: 60s, expected a number, 1 to 32767 seconds; libkeepalive reads it as 60"),
        (f"{DONTDIE} DD_USE_KEEPALIVE=no", "keepalive: on",
            "DD_USE_KEEPALIVE: no, expected 0 or 1; libdontdie ignores it"),
        (f"{KEEPALIVE} KEEPALIVE=65", "keepalive: on",
            "KEEPALIVE: 65 is neither off nor on; libkeepalive ignores it"),
    ],
)  # fmt: skip
def test_value_that_is_ignored(look: Look, lines: str, expected: str, said: str) -> None:
    """What the library does not understand is not in the policy, and said with file and line."""
    found = look({UNIT: lines})
    assert proposed(found)["db.service.yaml"][1] == expected
    assert [each.partition(f"{UNIT}:2: ")[2] for each in found.left_out] == [said]


def test_libraries_that_contradict_each_other(look: Look) -> None:
    """What two libraries are asked for in different ways is in no policy, and said."""
    files = {
        "etc/ld.so.preload": "libdontdie.so\nlibkeepalive.so",
        UNIT: "Environment=KEEPIDLE=90 DD_TCP_KEEPALIVE_TIME=60 DD_TCP_KEEPALIVE_PROBES=6",
    }
    found = look(files)
    assert proposed(found) == {"everything.yaml": ["select: [{cgroup: /}]", "keepalive: on"]}
    (said,) = found.left_out
    assert f"{UNIT}:2: KEEPIDLE=90 and DD_TCP_KEEPALIVE_TIME=60 contradict each other" in said


def test_environment_that_changes_while_it_runs(look: Look) -> None:
    """DD_EVAL_ENVIRONMENT_ONCE=0 has no counterpart, and the advice is destinations."""
    found = look({UNIT: f"{DONTDIE} DD_EVAL_ENVIRONMENT_ONCE=0"})
    assert proposed(found)["db.service.yaml"][1] == "keepalive: on"
    (said,) = found.left_out
    assert "DD_EVAL_ENVIRONMENT_ONCE" in said
    assert "destinations" in said


def test_debugging_is_a_log(look: Look) -> None:
    """DD_DEBUG=1 has each socket logged, and so has the policy."""
    found = look({UNIT: f"{DONTDIE} DD_DEBUG=1"})
    assert proposed(found)["db.service.yaml"][1:] == ["keepalive: on", "log: sockets"]


def test_whole_system(look: Look) -> None:
    """ld.so.preload becomes a policy on /, and units that differ have theirs."""
    found = look({
        "etc/ld.so.preload": "# all\n/usr/lib/libkeepalive.so /usr/lib/libother.so",
        UNIT: "Environment=KEEPALIVE=off",
        "etc/systemd/system/mail.service": "Environment=KEEPIDLE=60",
        "etc/systemd/system/web.service": "Environment=A=b",
    })  # fmt: skip
    assert proposed(found) == {
        "everything.yaml": ["select: [{cgroup: /}]", "keepalive: on"],
        "db.service.yaml": ["select: [{unit: db.service}]", "keepalive: off"],
        "mail.service.yaml": ["select: [{unit: mail.service}]", "keepalive: {idle: 60}"],
    }
    assert [(each.line, each.what) for each in found.remove] == [
        (2, "/usr/lib/libkeepalive.so of /usr/lib/libkeepalive.so /usr/lib/libother.so"),
        (2, "KEEPIDLE=60"),
        (2, "KEEPALIVE=off"),
    ]


def test_shared_drop_ins(look: Look) -> None:
    """What is said for all services, for a template or a beginning is one policy, and none for the
    units that it reaches; a unit without it has a policy that says so."""
    found = look({
        "etc/systemd/system/service.d/a.conf": DONTDIE,
        UNIT: "ExecStart=/usr/bin/db",
        "usr/lib/systemd/system/web.service": "",
        "etc/systemd/system/web.service.d/b.conf": "Environment=LD_PRELOAD=",
        "etc/systemd/system/app-.service.d/b.conf": "Environment=DD_TCP_KEEPALIVE_TIME=60",
        "usr/lib/systemd/system/app-one.service": "",
        "usr/lib/systemd/system/vpn@.service": "EnvironmentFile=-/etc/default/vpn-%i",
        "etc/systemd/system/multi-user.target.wants/vpn@a.service": "",
        "etc/systemd/system/multi-user.target.wants/vpn@b.service": "",
        "etc/default/vpn-a": "DD_USE_KEEPALIVE=0",
    })  # fmt: skip
    assert proposed(found) == {
        "services.yaml": ['select: [{unit: "*.service"}]', "keepalive: on"],
        "app-.service.yaml": ['select: [{unit: "app-*.service"}]', "keepalive: {idle: 60}"],
        "web.service.yaml": ["select: [{unit: web.service}]", "keepalive: off"],
        "vpn@a.service.yaml": ["select: [{unit: vpn@a.service}]", "keepalive: off"],
    }


def test_environments_of_managers_and_sessions(look: Look) -> None:
    """DefaultEnvironment= is every service's; /etc/environment is that of sessions, and of users'
    managers."""
    found = look({
        "etc/systemd/system.conf.d/a.conf": f"[Manager]\nDefault{DONTDIE}",
        "etc/environment": "LD_PRELOAD=libkeepalive.so\nKEEPIDLE=60",
        "etc/systemd/user/sync.service": "Environment=KEEPIDLE=90",
    })  # fmt: skip
    assert proposed(found) == {
        "user.slice.yaml": ["select: [{unit: user.slice}]", "keepalive: {idle: 60}"],
        "services.yaml": ['select: [{unit: "*.service"}]', "keepalive: on"],
        "sync.service.user.yaml": ["select: [{user_unit: sync.service}]", "keepalive: {idle: 90}"],
    }


def test_manager_forgets_what_an_empty_assignment_resets(look: Look) -> None:
    """DefaultEnvironment= without a value takes back those before it, as Environment= does."""
    found = look({
        "etc/systemd/system.conf": f"[Manager]\nDefault{DONTDIE}",
        "usr/local/lib/systemd/system.conf.d/a.conf": "[Manager]\nDefaultEnvironment=",
    })  # fmt: skip
    assert proposed(found) == {}


def test_lines_to_remove(look: Look, tmp_path: Path) -> None:
    """Every line that has a part in it is named, one that is overridden too, and no other."""
    found = look({
        UNIT: f"ExecStart=/usr/bin/db\n{DONTDIE}\nEnvironment=A=b",
        DROP_IN: f'# ours\nEnvironment="LD_PRELOAD=liba.so:libdontdie.so"\nEnvironment={THREE}',
        "etc/default/other": "DD_TCP_KEEPALIVE_TIME=60",
    })  # fmt: skip
    assert [(each.file, each.line, each.what) for each in found.remove] == [
        (f"{tmp_path}/{DROP_IN}", 3, "libdontdie.so of LD_PRELOAD=liba.so:libdontdie.so"),
        *((f"{tmp_path}/{DROP_IN}", 4, what) for what in THREE.split()),
        (f"{tmp_path}/{UNIT}", 3, "LD_PRELOAD=libdontdie.so"),
    ]


def test_line_of_a_template_is_named_once(look: Look, tmp_path: Path) -> None:
    """What to remove is what the template has, however many instances there are."""
    template = "etc/systemd/system/vpn@.service"
    found = look({
        template: f"{DONTDIE} DD_TCP_KEEPALIVE_TIME=%i",
        "etc/systemd/system/multi-user.target.wants/vpn@30.service": "",
        "etc/systemd/system/multi-user.target.wants/vpn@60.service": "",
    })  # fmt: skip
    assert proposed(found)["vpn@60.service.yaml"][1] == "keepalive: {idle: 60}"
    assert [(each.file, each.what) for each in found.remove] == [
        (f"{tmp_path}/{template}", "LD_PRELOAD=libdontdie.so"),
        (f"{tmp_path}/{template}", "DD_TCP_KEEPALIVE_TIME=%i"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "line", "why"),
    [
        (UNIT, "ExecStart=/usr/lib/ld.so --preload libdontdie.so db", 2, "not evaluated"),
        (UNIT, 'ExecStart=/bin/sh -c "$$X && export LD_PRELOAD=libdontdie.so; db"', 2, "condition"),
        ("etc/default/db", "export LD_PRELOAD=libdontdie.so", 1, "no unit or script"),
        ("etc/cron.d/job", "LD_PRELOAD=libdontdie.so", 1, "no policy selects one of them"),
        ("opt/db/start", "#!/bin/sh\n$X && LD_PRELOAD=libdontdie.so exec db", 2, "condition"),
        ("opt/db/start", "#!/usr/bin/python3\nos.environ['LD_PRELOAD']='libdontdie.so'", 2,
            "not evaluated"),
        ("root/.bashrc", "export LD_PRELOAD=libdontdie.so", 1, "started from a shell"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said(
    look: Look, name: str, text: str, line: int, why: str
) -> None:
    """A line that names a library wherever it is not understood is an error, with its reason."""
    start = "usr/lib/systemd/system/start.service"
    found = look({start: "ExecStart=-/opt/db/start now", name: text})
    (said,) = found.unclear
    assert f"{name}:{line}: names libdontdie.so " in said
    assert why in said
    assert found.policies == []


def test_part_of_a_unit(look: Look) -> None:
    """What preloads for a unit's other commands alone is an error, and where it is the same for all
    there is none."""
    script = "#!/bin/sh\nLD_PRELOAD=libdontdie.so exec warm\n"
    start = {"opt/x/start": script}
    found = look({UNIT: "ExecStartPre=/opt/x/start\nExecStart=db", **start})
    assert found.policies == []
    (said,) = found.unclear
    assert "opt/x/start:2: preloads libdontdie.so for ExecStartPre= alone" in said
    found = look({UNIT: f"{DONTDIE}\nExecStartPre=/opt/x/start\nExecStart=db", **start})
    assert proposed(found)["db.service.yaml"][1] == "keepalive: on"
    assert found.unclear == []


def test_commands_that_differ(look: Look) -> None:
    """Two values in one unit are no policy, and both lines are named."""
    script = "LD_PRELOAD=libdontdie.so one &\nLD_PRELOAD=libdontdie.so DD_TCP_KEEPALIVE_TIME=5 two"
    found = look({UNIT: "ExecStart=bash /opt/start", "opt/start": script})
    assert found.policies == []
    assert [re.sub(".*/opt/", "", each)[:8] for each in found.unclear] == ["start:1:", "start:2:"]


def test_value_that_only_the_shell_knows(look: Look) -> None:
    """A number that a command gives is an error with its line, and no policy."""
    script = "export KEEPIDLE=$(cat /run/idle)\nexport LD_PRELOAD=libkeepalive.so\nexec db"
    found = look({UNIT: "ExecStart=sh /opt/start", "opt/start": script})
    assert found.policies == []
    (said,) = found.unclear
    assert "opt/start:1: KEEPIDLE: its value is known only where it runs" in said


@pytest.mark.parametrize(
    ("lines", "select"),
    [
        ("ExecStart=/bin/su db -c /usr/bin/db", "{unit: user-107.slice}"),
        ("ExecStart=/usr/sbin/runuser -l db -w LD_PRELOAD -c db", "{unit: user-107.slice}"),
        ("PAMName=login\nUser=db\nExecStart=db", "{unit: user-107.slice}"),
        ("ExecStart=/bin/su -m nobody-knows -c db", "{unit: user.slice}"),
        ("ExecStart=/usr/bin/podman run --rm -e LD_PRELOAD=libdontdie.so db", "--cgroups=split"),
        ("ExecStart=docker run --name x -eLD_PRELOAD=libdontdie.so db", "system.slice/docker-"),
        ("ExecStart=docker run --cgroup-parent=db.slice --env LD_PRELOAD=libdontdie.so db",
            "{unit: db.slice}"),
    ],
)  # fmt: skip
def test_processes_that_leave_the_unit(look: Look, lines: str, select: str) -> None:
    """Where a unit's processes are elsewhere, an error says where, and what selects them."""
    found = look({UNIT: f"{DONTDIE}\n{lines}", "etc/passwd": "db:x:107:107::/:/bin/sh"})
    assert found.policies == []
    (said,) = found.unclear
    assert "libdontdie.so for db.service, but" in said
    assert select in said


@pytest.mark.parametrize(
    "lines",
    [
        f"{DONTDIE}\nExecStart=/usr/sbin/runuser -u db -- db",
        "ExecStart=/usr/bin/podman run --cgroups=split --env=LD_PRELOAD=libdontdie.so db",
        f"{DONTDIE}\nExecStart=/usr/bin/setpriv --reuid 5 db",
        f"{DONTDIE}\nExecStart=/bin/su db -c db",
    ],
)
def test_processes_that_stay(look: Look, lines: str) -> None:
    """What opens no session, and PAM without pam_systemd(8), leaves them in the unit."""
    found = look({UNIT: lines, "etc/pam.d/su": "session required pam_unix.so"})
    assert proposed(found)["db.service.yaml"][1] == "keepalive: on"
    assert found.unclear == []


def test_preload_of_a_client(look: Look) -> None:
    """The environment of a unit does not reach the container that it starts."""
    found = look({UNIT: f"{DONTDIE}\nExecStart=docker run -e KEEPIDLE=5 db"})
    assert found.policies == []
    (said,) = found.left_out
    assert f"{UNIT}:2: preloads libdontdie.so into the client alone" in said


def test_environment_that_pam_gives(look: Look) -> None:
    """/etc/environment is also that of the programs whose PAM stack reads it and moves nothing."""
    found = look({
        "etc/environment": "export LD_PRELOAD=libkeepalive.so",
        "etc/pam.d/cron": "session required pam_env.so\n@include common",
        "etc/pam.d/common": "session required pam_unix.so",
        "etc/pam.d/sshd": "auth include common\nsession required pam_env.so readenv=1\n"
            "-session optional pam_systemd.so",
        "etc/pam.d/atd": "auth required pam_env.so envfile=/etc/default/locale",
        "usr/lib/systemd/system/cron.service": "ExecStart=/usr/sbin/cron -f",
        "usr/lib/systemd/system/ssh.service": "ExecStart=/usr/sbin/sshd -D",
        "usr/lib/systemd/system/atd.service": "ExecStart=/usr/sbin/atd -f",
    })  # fmt: skip
    assert {*proposed(found)} == {"user.slice.yaml", "cron.service.yaml"}


def test_pam_of_a_unit(look: Look) -> None:
    """PAMName= and su(1) add what PAM reads, where the processes stay in the unit."""
    found = look({
        "etc/environment": "LD_PRELOAD=libdontdie.so\nDD_TCP_KEEPALIVE_TIME=60",
        "etc/pam.d/app": "session required pam_env.so",
        "etc/pam.d/su": "session required pam_env.so",
        UNIT: "PAMName=app\nExecStart=db",
        "etc/systemd/system/su.service": "ExecStart=su x -c db",
        "etc/systemd/system/no.service": "ExecStart=db",
    })  # fmt: skip
    assert {*proposed(found)} == {"user.slice.yaml", "db.service.yaml", "su.service.yaml"}


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("/usr/bin/python3 -u /opt/x/main", "opt/x/main"),
        ("/usr/bin/env perl /opt/x/main", "opt/x/main"),
        ("docker compose up", "opt/x/compose.yaml"),
        ("/usr/bin/docker-compose -f other.yml up -d", "opt/x/other.yml"),
        ("/opt/x/main", "opt/x/main"),
    ],
)
def test_files_of_other_programs(look: Look, command: str, file: str) -> None:
    """What an interpreter or docker compose reads is looked through, too."""
    unit = f"WorkingDirectory=/opt/x\nExecStart={command}"
    found = look({UNIT: unit, file: "#!/usr/bin/ruby\nLD_PRELOAD: libdontdie.so"})
    (said,) = found.unclear
    assert f"{file}:2: names libdontdie.so" in said


def test_generated_unit(look: Look, tmp_path: Path) -> None:
    """What a generator wrote is named by the file that a person edits."""
    quadlet = "etc/containers/systemd/web.container"
    found = look({
        quadlet: "[Container]\nImage=x\nEnvironment=LD_PRELOAD=libdontdie.so",
        "run/systemd/generator/web.service": f"[Unit]\nSourcePath=/{quadlet}\n[Service]\n"
            "ExecStart=/usr/bin/podman run --cgroups=split --env LD_PRELOAD=libdontdie.so x",
        "etc/init.d/old": "#!/bin/sh\nLD_PRELOAD=libdontdie.so oldd",
        "run/systemd/generator.late/old.service": "[Unit]\nSourcePath=/etc/init.d/old\n[Service]\n"
            "ExecStart=/etc/init.d/old start",
        "etc/other": "x\nLD_PRELOAD=libdontdie.so\n",
        "run/systemd/generator/other.service": "[Unit]\nSourcePath=/etc/other\n[Service]\n"
            "Environment=LD_PRELOAD=libdontdie.so",
    })  # fmt: skip
    assert {*proposed(found)} == {"web.service.yaml", "old.service.yaml", "other.service.yaml"}
    assert [f"{each.file}:{each.line}" for each in found.remove] == [
        f"{tmp_path}/{quadlet}:3", f"{tmp_path}/etc/init.d/old:2", f"{tmp_path}/etc/other:2",
    ]  # fmt: skip
    assert found.unclear == []


def test_other_types_of_units(look: Look) -> None:
    """Mounts, swaps and sockets have environments and commands of their own."""
    found = look({
        "etc/systemd/system/a.mount": "[Mount]\nEnvironment=LD_PRELOAD=libdontdie.so",
        "etc/systemd/system/b.swap": "[Swap]\nEnvironment=LD_PRELOAD=libdontdie.so",
        "etc/systemd/system/c.socket": "[Socket]\nExecStartPre=env LD_PRELOAD=libdontdie.so x",
        "etc/systemd/system/d.socket": "[Socket]\nListenStream=1",
    })  # fmt: skip
    assert {*proposed(found)} == {"a.mount.yaml", "b.swap.yaml"}
    (said,) = found.unclear
    assert "c.socket:2: preloads libdontdie.so for ExecStartPre= alone" in said


def test_library_of_another_name(look: Look) -> None:
    """What is preloaded is looked into, whatever its name is."""
    found = look({
        "opt/ka.so": "\0DD_TCP_KEEPALIVE_TIME\0",
        UNIT: 'Environment="LD_PRELOAD=/usr/lib/other.so /opt/ka.so" DD_TCP_KEEPALIVE_TIME=60',
    })  # fmt: skip
    assert proposed(found)["db.service.yaml"][1] == "keepalive: {idle: 60}"
    assert found.remove[0].what.startswith("/opt/ka.so of LD_PRELOAD=")


def test_it_says_what_it_searched(look: Look) -> None:
    """Each kind of place is named with how much of it there was."""
    found = look({UNIT: "", "etc/cron.d/x": "", "etc/default/x": "A=1"})
    text = "\n".join(found.searched)
    assert "environment files: 1\n" in text
    assert all(kind.what in text for kind in places.KINDS)
    found = look({
        UNIT: "ExecStart=/opt/x.sh", "opt/x.sh": "#!/bin/sh\n" + ". $X/a\n" * 5,
        "etc/cron.d/x": "* * * * * root /opt/y.sh /dev/zero /opt/y.sh/z /opt", "opt/y.sh": "#!\n",
    })  # fmt: skip
    assert "files that those name: 1 file" in found.searched
    assert re.search(r"make up .*x\.sh:2, .*x\.sh:3, .*x\.sh:4 and 2 more", found.not_searched)
    assert (found.unclear, found.unread) == ([], [])


TOKENS = (
    "Environment=", "EnvironmentFile=-/etc/default/x", "ExecStart=/usr/bin/env ", "LD_PRELOAD=",
    "libdontdie.so", "libkeepalive.so.0", "_listen", "KEEPALIVE=off", "KEEPIDLE=", "TCP_KEEPCNT=",
    "TCP_USER_TIMEOUT=", "DD_USE_KEEPALIVE=", "DD_TCP_KEEPALIVE_TIME=5 ",
    "60", "0", "-1", "9" * 20, " ", "\n", "\\", "\"", "'", "%i", "%%", "#",
    "=", "\\x41", "\\ud800", "\0", "\xff", "/**/..",
)  # fmt: skip


@given(
    st.lists(st.lists(st.sampled_from(TOKENS), max_size=20).map("".join), min_size=4, max_size=4)
)
def test_any_files_make_right_policies(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """Whatever the files hold, what is proposed are policy files."""
    root = tmp_path_factory.mktemp("any")
    for name, text in zip(
        (UNIT, DROP_IN, "etc/default/x", "etc/ld.so.preload"), texts, strict=True
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"[Service]\n{text}" if "systemd" in name else text)
    names = {policy.name for policy in read(proposals.look(root, proc=None))}
    assert names <= {"everything", "db.service"}


@pytest.fixture
def kabpfctl(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `kabpfctl import` where these files are the only ones of /etc and systemd."""
    script = (
        'for d in /etc /usr/lib/systemd; do mount --bind "$0/$d" $d; done;'
        ' mount -t tmpfs tmpfs /run; exec "$@"'
    )
    apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script]
    apart.append(str(tmp_path))
    for name in ("etc", "usr/lib/systemd"):
        (tmp_path / name).mkdir(parents=True)
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("it needs root and a mount namespace to have files of the test's own")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [*apart, sys.executable, "-P", "-m", "kabpf.cli", "import", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


def test_import_says_what_to_do(
    kabpfctl: Callable[..., subprocess.CompletedProcess[str]], look: Look
) -> None:
    """The policies are printed with their files, then the lines to remove; what is ignored is a
    warning."""
    look({DROP_IN: f"{KEEPALIVE} KEEPIDLE=60 KEEPCNT=0"})
    done = kabpfctl()
    assert (done.returncode, done.stdout.partition("searched: ")[0]) == (
        0,
        f"""write /etc/kabpf/policy.d/db.service.yaml:
    # In place of libkeepalive: /{DROP_IN}:2
    select: [{{unit: db.service}}]
    keepalive: {{idle: 60}}
then run: kabpfctl apply
remove from /{DROP_IN}:2: LD_PRELOAD=libkeepalive.so
remove from /{DROP_IN}:2: KEEPIDLE=60
remove from /{DROP_IN}:2: KEEPCNT=0
""",
    )
    assert done.stderr == (
        f"warning: /{DROP_IN}:2: KEEPCNT: 0 is not in 1 to 127; libkeepalive ignores it\n"
    )


def test_import_prints_json(
    kabpfctl: Callable[..., subprocess.CompletedProcess[str]], look: Look
) -> None:
    """The same as JSON; something that is not understood is status 1."""
    look({"etc/ld.so.preload": "libdontdie.so", "etc/profile": "LD_PRELOAD=libdontdie.so ssh"})
    done = kabpfctl("--json")
    said = done.stderr.rstrip("\n")
    printed = json.loads(done.stdout)
    assert "processes" in printed.pop("searched")[-1]
    assert "homes" in printed.pop("not_searched")
    assert (done.returncode, printed) == (
        1,
        {
            "version": 1,
            "policies": [
                {
                    "file": "/etc/kabpf/policy.d/everything.yaml",
                    "text": "# In place of libdontdie: /etc/ld.so.preload:1\n"
                    "select: [{cgroup: /}]\nkeepalive: on\n",
                }
            ],
            "remove": [{"file": "/etc/ld.so.preload", "line": 1, "what": "libdontdie.so"}],
            "left_out": [],
            "unclear": [said],
            "unread": [],
        },
    )
    assert said.startswith("/etc/profile:1: names libdontdie.so ")


def test_import_that_finds_nothing(
    kabpfctl: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """It says so, and where it looked, with status 0."""
    done = kabpfctl()
    first, *rest = done.stdout.splitlines()
    assert (done.returncode, first, done.stderr) == (
        0, "neither libkeepalive nor libdontdie was found where import looks", "",
    )  # fmt: skip
    assert [line.partition(": ")[0] for line in rest] == ["searched"] * (len(rest) - 1) + [
        "not searched"
    ]
