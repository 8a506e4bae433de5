"""What a person sees: whole screens, at the widths of terminals, and in a pipe."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import audited
import pytest
import terminal
from kabpfctl import KABPFCTL

from kabpf import live, output, tables
from kabpf.commands import (
    audit,
    check,
    doctor,
    explain,
    import_,
    metrics,
    monitor,
    plan,
    presets,
    sockets,
    status,
    verify,
)
from kabpf.containers.facts import Container, Pod
from kabpf.doctor.findings import error, note, ok, warning
from kabpf.kernel import abi, loading
from kabpf.kernel.dataplane import Counters
from kabpf.migration.proposals import Found, Proposal, Removal
from kabpf.observe import containers
from kabpf.observe.events import Event, Lost
from kabpf.observe.sockets import Address, Socket
from kabpf.plan.state import Cgroup, PolicyRecord
from kabpf.policy import parser
from kabpf.policy.model import Mode, Options, Policy, Range
from kabpf.runtime import notes

SCREENS = Path(__file__).parent / "screens"
WIDTHS = (40, 80, 120, 200, None)  # None is a pipe
SOURCE = "/etc/kabpf/policy.d/{}.yaml:1"


def options(idle: int, interval: int, probes: int, user_timeout_s: int = 0) -> Options:
    timeout = Range.exactly(user_timeout_s * 1000) if user_timeout_s else None
    return Options(
        True, Range.exactly(idle), Range.exactly(interval), Range.exactly(probes), timeout
    )


LONG = "payments-reconciliation-worker@eu-central-1-production.service"
ID = "6b1f0c" * 10 + "d3e4"
POD = f"/kubepods.slice/kubepods-pod7c1d.slice/cri-containerd-{ID}.scope"
KNOWN = Container(
    ID, "containerd", "main", "registry.example/web:1", pod=Pod("shop", "web-5d9c7b-x2x7k", "7c1d")
)
ROWS = [
    status.Row(
        "postgresql.service", 1, PolicyRecord("postgresql.service", options(60, 10, 6, 120)),
        Counters(20481, 1, 12, 0, 0, 0, 2, 3, 2, {}), SOURCE.format("postgresql.service"),
    ),
    status.Row(
        LONG, 24, PolicyRecord(LONG, Options(idle_s=Range(30, 300)), Mode.ENFORCE),
        Counters(1204817, 3, 0, 17, 4, 2, 0, 0, 0, {"EPERM": 2, "ENOPROTOOPT": 1}),
        SOURCE.format(LONG),
    ),
    status.Row(
        "batch", 0, PolicyRecord("batch", Options(keepalive=False)),
        Counters(0, 0, 0, 0, 0, 0, 0, 0, 0, {}), None,
    ),
]  # fmt: skip
RESULT: dict[str, Any] = {
    "loaded": True, "interrupted": False, "cgroup2": "/sys/fs/cgroup",
    "pins": "/sys/fs/bpf/kabpf", "loader": "libbpf",
    "kernel": {"release": "6.1.0-40-amd64", "btf": True},
    "watched": {"setsockopt": True, "syn_retries": False}, "daemon": 431,
    "new_cgroups_wait": False,
    "active": {"policies": 3, "covered": 25, "cgroups": 74},
    "policy_files": {"policies": 3, "errors": [], "wrong_since": None, "applied": True},
    "refused": "", "not_recorded": {"cgroups": 0, "since": None},
    "removed_with_sockets": 0, "totals": {"events_dropped": 0, "unrecorded": 0},
}  # fmt: skip


def connection(cgroup: str | None, local: str, remote: str, **others: Any) -> Socket:
    local_address, _, local_port = local.rpartition(":")
    remote_address, _, remote_port = remote.rpartition(":")
    values: dict[str, Any] = {
        "cgroup": cgroup, "cgroup_id": 7, "namespace": 4026531840, "family": "ipv4",
        "local": Address(local_address, int(local_port)),
        "peer": Address(remote_address, int(remote_port)),
        "state": "established", "keepalive": True, "idle_s": 300, "interval_s": 30, "probes": 4,
        "user_timeout_ms": 0, "next_probe_ms": 299_200, "policy": "billing",
        "set_by": dict.fromkeys(("idle_s", "interval_s", "probes", "keepalive"), "policy"),
    }  # fmt: skip
    return Socket(**values | others)


SOCKETS = [
    connection("/system.slice/billing.service", "10.1.0.5:48956", "10.1.0.7:5432"),
    connection(
        f"/system.slice/system-payments.slice/{LONG}",
        "2001:db8:1234:5678:9abc:def0:1234:5678:48960", "2001:db8:1234:5678:9abc:def0:1234:1:5432",
        family="ipv6", idle_s=15, next_probe_ms=14_000,
        set_by={"idle_s": "application", "interval_s": "policy"},
    ),
    connection(POD, "10.244.1.17:8080", "10.244.2.101:51734"),
    connection(
        "/system.slice/ssh.service", "127.0.0.1:22", "127.0.0.1:50120", is_removed=True,
    ),
    connection(
        None, "127.0.0.1:22", "127.0.0.1:50122", keepalive=False, next_probe_ms=None, policy=None,
        set_by={}, is_removed=True,
    ),
]  # fmt: skip


FILES = {
    "/etc/kabpf/policy.yaml": "defaults: {interval: 10s, probes: 6}\n",
    "/etc/kabpf/policy.d/postgresql@.service.yaml": "keepalive: {idle: 60s, user_timeout: auto}\n",
    f"/etc/kabpf/policy.d/{LONG}.yaml": "keepalive: {preset: aws-nlb}\ndirection: out\n"
    "destinations: [{to: 2001:db8:1234:5678::/64, ports: [5432], idle: 30s..90s}]\n",
    "/etc/kabpf/policy.d/zz.yaml": "select: [{cgroup: /system.slice/**}]\nkeepalive: off\n",
}
COVERED = {
    "/system.slice/system-postgresql.slice/postgresql@15-main.service": "postgresql@.service",
    f"/system.slice/system-payments.slice/{LONG}": LONG,
    "/user.slice/user-1000.slice/user@1000.service/app.slice/syncthing.service": "zz",
    POD: "zz",
    "/kabpf-demo": "zz",
}


def policies() -> tuple[Policy, ...]:
    return parser.combine([parser.parse(text.encode(), name) for name, text in FILES.items()])


def reported(cgroup: str | None, remote: str, **members: Any) -> Event:
    blank = abi.read_report(bytes(abi.REPORT_SIZE))
    assert isinstance(blank, abi.Report)
    address, _, port = remote.rpartition(":")
    values = {
        "local": IPv6Address("::ffff:10.1.0.5").packed, "remote": IPv6Address(address).packed,
        "local_port": 48956, "remote_port": int(port), "family": int(socket.AF_INET6),
        "direction": abi.OUT, "keepalive": 1, "idle_s": 300, "interval_s": 30, "probes": 4,
    }  # fmt: skip
    return Event(1_700_000_000_123_000_000, blank._replace(**values | members), cgroup, "billing")


def outcomes(*each: int) -> int:
    """Of idle, interval, probes, user timeout, keepalive and SYN retries."""
    return sum(outcome << place * abi.OUTCOME_BITS for place, outcome in enumerate(each))


BILLING, PEER = "/system.slice/billing.service", "::ffff:10.1.0.7:5432"
FAR = "2001:db8:1234:5678:9abc:def0:1234:5678:5432"
KEPT, SET = abi.KEPT, abi.SET
EVENTS = [
    reported(BILLING, PEER, pid=812, command=b"billing", outcomes=outcomes(SET, SET, SET, 0, SET)),
    reported(BILLING, PEER, idle_s=15, outcomes=outcomes(KEPT, SET, KEPT, 0, SET)),
    reported(BILLING, ":::0", direction=0, local_port=80),
    reported(POD, "::ffff:10.244.2.101:51734", direction=abi.IN, outcomes=outcomes(SET)),
    reported(
        f"/system.slice/system-payments.slice/{LONG}", FAR, direction=abi.IN,
        outcomes=outcomes(22, SET, 0, 0, 92),
    ),
    reported(BILLING, PEER, keepalive=0, what=abi.IGNORED, option=3, asked=1500),
    reported(BILLING, PEER, what=abi.TURNED_OFF, option=4, asked=0),
    reported(
        BILLING, PEER, what=abi.TIMED_OUT, reason=2, error=110, silent_ms=500, closed_ms=11_040,
    ),
    reported(None, PEER, what=abi.OPEN, outcomes=outcomes(SET)),
    Lost(1_700_000_000_000_000_000, 120),
]  # fmt: skip
FINDINGS = [
    ("kernel", ok("Linux 6.1.0-40-amd64")),
    ("selectors", warning(
        f"/etc/kabpf/policy.d/ngnix.service.yaml:1: unit ngnix.service of policy {LONG}: no such"
        " unit, running or installed", "kabpfctl edit ngnix.service",
    )),
    ("pins", error("/sys/fs/bpf/kabpf is damaged: kabpf_cgroups missing", "kabpfctl apply")),
    ("fallbacks", note("no user timeout in postgresql.service", "man kabpf.yaml")),
]  # fmt: skip
FOUND = Found(
    [Proposal(Path("/etc/kabpf/policy.d/billing.service.yaml"),
              "# In place of libdontdie: /etc/systemd/system/billing.service.d/keepalive.conf:2\n"
              "select: [{unit: billing.service}]\nkeepalive: {idle: 60, interval: 10}\n")],
    [Removal("/etc/systemd/system/billing.service.d/keepalive.conf", 2,
             "LD_PRELOAD=libdontdie.so")],
    searched=["units of systemd, with their drop-ins and environment files: 137"],
    not_searched="homes of users, images and file systems of containers",
)  # fmt: skip
WRONG: dict[str, Any] = {
    "refused": "", "interrupted": True, "daemon": None, "new_cgroups_wait": True,
    "policy_files": {
        "policies": 0, "errors": [f"{SOURCE.format(LONG)}: keepalive.idle: 10h is too much"],
        "wrong_since": None, "applied": False,
    },
}  # fmt: skip


@functools.cache
def audit_found() -> audit.Audited:
    paths = ["/system.slice/billing.service", f"/system.slice/system-payments.slice/{LONG}", None]
    far = IPv6Address("2001:db8:1234:5678:9abc:def0:1234:5678").packed
    found = audit.units.found(
        [
            *(audited.connection(cgroup_id=0, silence_ms=each * 500_000) for each in range(3)),
            audited.connection(cgroup_id=0, place=0),
            *(audited.connection(cgroup_id=1, **audited.probing(60)) for _ in range(4)),
            audited.connection(cgroup_id=1, peer=far, local=far, place=1, silence_ms=None),
            audited.connection(cgroup_id=1, keepalive=audited.RUNS, timer=2, expires_ms=9000),
            audited.connection(cgroup_id=2, **audited.probing(7200)),
        ],
        lambda id: audit.named(paths[id]),
        (350, 3600),
        lambda id: lambda connection: audited.on(175) if id else connection.keepalive,
    )
    return audit.Audited(list(found.values()), True, 1, [])


def show_audit(asked: list[audit.Asked], **others: bool) -> None:
    audit.print_list(audit_found(), asked, **others)


NLB, ASA = audit.Asked(350, "aws-nlb"), audit.Asked(3600, None)


def asked(**others: Any) -> argparse.Namespace:
    blank = {
        "policy": None,
        "json": False,
        "wide": False,
        "watch": False,
        "files": [],
        "loader": "libbpf",
    }
    return argparse.Namespace(**blank | others)


def show_plan(*, is_wide: bool) -> None:
    by_name = {each.name: each for each in policies()}
    covered = [(Cgroup(1, 0, path), by_name[name]) for path, name in COVERED.items()]
    plan.print_list(covered, is_wide=is_wide)


def show_explained() -> None:
    wanted = [Cgroup(1, 0, path) for path in ("/", *COVERED)]
    for each in explain.decided(policies(), wanted):
        output.print_lines(explain.lines(each, False))


def show_events(*, is_wide: bool) -> None:
    screen = monitor.Screen(is_wide=is_wide)
    print(screen.heads() + "".join(map(screen.line, EVENTS)), end="")


def show_checked() -> None:
    names = ("good.yaml", f"{LONG}.yaml", "none.yaml")
    Path(names[0]).write_text("select: [{cgroup: /a}]\nkeepalive: {idle: 60s, user_timeout: 5s}\n")
    Path(names[1]).write_text("keepalive:\n  idle: 10h\n  probs: 3\n")
    check.check(asked(files=names))


def show_status_live() -> None:
    """The second look, ten seconds after the first."""
    view = status._Watched(None)
    view._rates = live.Rates(clock=iter((0.0, 10.0)).__next__)
    view._rates.note({row.record: [0] * len(status._counts(row)) for row in ROWS})
    view.look()
    print("\n".join(view.lines(0, 10)))


def show_metrics() -> None:
    pytest.importorskip("prometheus_client")
    metrics.metrics(argparse.Namespace(http=False, sockets=False, textfile=None))


SCREEN: dict[str, Callable[[], object]] = {
    "status": lambda: status.status(asked()),
    "status-wrong": lambda: status.status(asked()),
    "status-policy": lambda: status.status(asked(policy=LONG)),
    "status-watch": show_status_live,
    "metrics": show_metrics,
    "sockets": lambda: sockets.print_list(SOCKETS, {}, is_wide=False),
    "sockets-wide": lambda: sockets.print_list(SOCKETS, {}, is_wide=True),
    "audit": lambda: show_audit([NLB, ASA], has_file=True, is_one=True),
    "plan": lambda: show_plan(is_wide=False),
    "plan-wide": lambda: show_plan(is_wide=True),
    "explain": show_explained,
    "monitor": lambda: show_events(is_wide=False),
    "monitor-wide": lambda: show_events(is_wide=True),
    "doctor": lambda: doctor.print_list(FINDINGS),
    "check": show_checked,
    "verify": lambda: verify.verify(asked()),
    "verify-wrong": lambda: verify.verify(asked()),
    "presets": lambda: presets.presets(asked()),
    "presets-wide": lambda: presets.presets(asked(wide=True)),
    "import": lambda: print("\n".join(import_.text(FOUND))),
}
OF_ANY_WIDTH = {
    "sockets-wide", "plan-wide", "monitor-wide", "presets-wide", "check", "verify", "verify-wrong",
    "import", "metrics",
}  # fmt: skip


@pytest.fixture
def on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[int | None], None]:
    """Makes standard output a terminal of a width, or a pipe."""

    screen = request.getfixturevalue("screen") if "screen" in request.fixturenames else ""
    look = (RESULT | WRONG, ROWS[:1]) if screen.endswith("-wrong") else (RESULT, ROWS)

    def become(width: int | None) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: width is not None)
        monkeypatch.setenv("COLUMNS", str(width))

    monkeypatch.setattr(status, "look", lambda: look)
    monkeypatch.setattr(status, "look_at", lambda _tree, _loaded: look)
    monkeypatch.setattr(loading, "opened", lambda _pins, _tree: contextlib.nullcontext())
    monkeypatch.setattr(notes, "read_applied", lambda _: None)
    monkeypatch.setattr(containers, "_known", lambda _path, _id: KNOWN)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.chdir(tmp_path)
    return become


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("screen", SCREEN)
def test_screen_is_as_it_was_read(
    screen: str, width: int | None, on: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The files were read by a person. KABPF_RECORD=1 writes them anew, to be read again."""
    on(width)
    SCREEN[screen]()
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    is_same = width is None or screen in OF_ANY_WIDTH
    file = SCREENS / f"{screen}-{'pipe' if is_same else width}.txt"
    if os.environ.get("KABPF_RECORD"):
        file.write_text(shown)
    assert shown == file.read_text()


def test_nothing_to_do_is_said_as_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing is loaded and no file has a policy, verify counts nothing and ends with 0."""
    none = {"policies": 0, "covered": 0, "cgroups": 0}
    files = {"policies": 0, "errors": [], "wrong_since": None, "applied": True}
    nothing = RESULT | {"loaded": False, "active": none, "policy_files": files}
    monkeypatch.setattr(status, "look", lambda: (nothing, []))
    assert verify.verify(asked()) == 0
    assert capsys.readouterr().out == "there are no policies; kabpf is not loaded\n"


# A table's first line. No part of it can be taken in two ways, which would take for ever.
HEADS = re.compile(r" *[A-Z]+(?: {2,}[A-Z/][A-Z0-9/s]*(?: [A-Z0-9/s]+)*)+$")
FITTED = [
    "status", "status-wrong", "status-policy", "status-watch", "sockets", "audit", "plan",
    "explain", "monitor", "doctor", "presets",
]  # fmt: skip


@pytest.mark.parametrize("screen", FITTED)
def test_screen_fits_any_terminal(
    screen: str, on: Callable[[int | None], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From 40 columns on no line is wider than the terminal, and every column of the pipe's screen
    is there, as often as there is a table in it or a row in blocks."""
    piped = (SCREENS / f"{screen}-pipe.txt").read_text()
    heads = {head for line in piped.splitlines() if HEADS.match(line) for head in cells(line)}
    for width in range(40, 201):
        on(width)
        SCREEN[screen]()
        lines = capsys.readouterr().out.splitlines()
        assert max(map(tables.text_width, lines)) <= width
        shown = {head for line in lines for head in cells(line)}
        assert heads <= shown


def cells(line: str) -> list[str]:
    return re.split(" {2,}", line.strip())


def test_thousand_rows_are_a_table_like_others(
    on: Callable[[int | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """With every column in each line, and at once."""
    on(80)
    began = time.process_time()
    sockets.print_list(SOCKETS[:1] * 1000, {}, is_wide=False)
    covered = [Cgroup(1, 0, f"/a/{number}.service") for number in range(1000)]
    plan.print_list([(cgroup, policies()[0]) for cgroup in covered])
    took_s = time.process_time() - began
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2002
    assert {len(line.split()) for line in lines[1:1001]} == {6}
    assert {len(line) for line in lines[1:1001]} == {len(lines[1])}
    assert took_s < 2


def test_unknown_and_unset_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """- is not set, and ? is not known, in every column."""
    unset = connection("/a.service", "10.0.0.1:1", "10.0.0.2:2", user_timeout_ms=0, set_by={})
    unknown = connection(
        "/a.service", "10.0.0.1:1", "10.0.0.2:2", keepalive=None, idle_s=None, interval_s=None,
        probes=None, user_timeout_ms=None, next_probe_ms=None, policy=None, set_by={},
    )  # fmt: skip
    sockets.print_list([unset, unknown], {}, is_wide=True)
    _, *lines = capsys.readouterr().out.splitlines()
    known = ["on", "300s", "30s", "4", "-", "299.2s", "system"]
    assert [line.split()[5:] for line in lines] == [known, ["?"] * 5 + ["-", "?"]]
    assert output.cell(None, "s") == "-"


def test_cgroup_has_one_name_on_every_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """That of its unit, with the manager or container it is in, where it is in one."""
    path = "/user.slice/user-1000.slice/user@1000.service/app.slice/sync.service"
    name = "user@1000.service/sync.service"
    sockets.print_list([connection(path, "10.0.0.1:1", "10.0.0.2:2")], {}, is_wide=False)
    plan.print_list([(Cgroup(1, 0, path), policies()[0])])
    screen = monitor.Screen(is_wide=False)
    print(screen.heads() + screen.line(reported(path, PEER)), end="")
    shown = capsys.readouterr().out.splitlines()[1::2]
    (first, *_) = explain.lines(next(explain.decided(policies(), [Cgroup(1, 0, path)])), None)
    assert [name in line.split() for line in (*shown, first)] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_terminal_shows_the_screen_that_was_read(width: int) -> None:
    """The program itself, in a pseudo-terminal whose size the kernel knows."""
    exit_status, lines = terminal.output(KABPFCTL, "presets", columns=width)
    assert exit_status == 0
    assert lines == (SCREENS / f"presets-{width}.txt").read_text().splitlines()
    _, found = terminal.output(KABPFCTL, "doctor", columns=width)
    assert max(map(tables.text_width, found)) <= width
    assert " warning" in found[-1] and " error" in found[-1]
