"""What reports of the kernel mean, which of them a filter selects, and how they are written."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kabpf.commands import monitor
from kabpf.kernel import abi
from kabpf.kernel.abi import CLAMPED, IGNORED, KEPT, NEW, OPEN, SET, TIMED_OUT, TURNED_OFF
from kabpf.observe import events, journal
from kabpf.observe.events import Event, Filter, Lost
from kabpf.observe.journal import Journal
from kabpf.plan.state import Cgroup
from kabpf.runtime.pace import Pace

CONNECTION = {
    "local": bytes(10) + b"\xff\xff" + bytes([10, 1, 0, 5]),
    "remote": bytes(15) + b"\1",
    "local_port": 48956,
    "remote_port": 5432,
    "family": int(socket.AF_INET),
    "direction": abi.OUT,
}
OPTIONS = {"keepalive": 1, "idle_s": 60, "interval_s": 10, "probes": 6, "user_timeout_ms": 0}
UNIT = "/system.slice/web.service"


def outcomes(*each: int) -> int:
    """Of idle, interval, probes, user timeout, keepalive and SYN retries."""
    return sum(outcome << place * abi.OUTCOME_BITS for place, outcome in enumerate(each))


def event(*, cgroup: str | None = UNIT, policy: str | None = "web", **members: Any) -> Event:
    blank = abi.read_report(bytes(abi.REPORT_SIZE))
    assert isinstance(blank, abi.Report)
    return Event(
        1_700_000_000_000_000_000,
        blank._replace(**CONNECTION, **OPTIONS)._replace(**members),
        cgroup,
        policy,
    )


@pytest.mark.parametrize(
    ("what", "found", "expected"),
    [
        (NEW, outcomes(SET, SET, SET, 0, SET), "set"),
        (NEW, outcomes(), "set"),
        (NEW, outcomes(KEPT, SET), "kept"),
        (NEW, outcomes(KEPT, KEPT), "kept"),
        (NEW, outcomes(SET, 92, KEPT), "failed"),
        (NEW, outcomes(0, 0, 0, 0, 0, 22), "failed"),
        (OPEN, outcomes(SET), "updated"),
        (OPEN, outcomes(KEPT), "kept"),
        (OPEN, outcomes(SET, KEPT), "kept"),
        (OPEN, outcomes(22), "failed"),
        (IGNORED, 0, "ignored"),
        (CLAMPED, 0, "clamped"),
        (TURNED_OFF, 0, "turned_off"),
        (TIMED_OUT, 0, "timed_out"),
    ],
)
def test_kind_of_event_is_the_gravest_outcome(what: int, found: int, expected: str) -> None:
    """A socket on which anything was refused has failed; left is one that keeps a value of its own,
    as `status` counts it; set is one that has all of its policy's."""
    assert event(what=what, outcomes=found).kind == expected


def test_options_have_value_and_outcome() -> None:
    """An option that is not set on the socket has no value; a refused one has its errno."""
    found = event(idle_s=15, outcomes=outcomes(KEPT, SET, 0, 22, SET)).options
    assert {name: tuple(option) for name, option in found.items()} == {
        "idle_s": (15, "kept"),
        "interval_s": (10, "set"),
        "probes": (6, None),
        "user_timeout_ms": (None, "EINVAL"),
        "keepalive": (True, "set"),
    }


@pytest.mark.parametrize(
    ("wanted", "selected"),
    [
        (Filter(), True),
        (Filter(cgroup="/system.slice"), True),
        (Filter(cgroup="/user.slice"), False),
        (Filter(units=("web*",)), True),
        (Filter(units=("db.service",)), False),
        (Filter(policy="web"), True),
        (Filter(policy="w"), False),
        (Filter(events=frozenset(["timed_out", "set"])), True),
        (Filter(events=frozenset(["timed_out"])), False),
        (Filter(units=("web*",), policy="other"), False),
    ],
)
def test_filter_selects_what_every_condition_allows(wanted: Filter, selected: bool) -> None:
    """By cgroup and unit as `sockets` does, by policy, and by kind of event."""
    assert wanted(event()) is selected


def test_filter_by_cgroup_leaves_out_what_is_in_none_that_is_known() -> None:
    """Where the cgroup's path is not known, only a filter that asks for none selects the event."""
    assert Filter()(event(cgroup=None))
    assert not Filter(cgroup="/")(event(cgroup=None))


def wide(found: Event) -> str:
    """A line of monitor --wide."""
    screen = monitor.Screen(is_wide=True)
    screen.heads()
    return screen.line(found)


@pytest.mark.parametrize(
    ("members", "columns"),
    [
        (
            {"pid": 7, "command": b"curl", "outcomes": outcomes(SET, SET, SET, 0, SET)},
            "set web.service 7 curl out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 -",
        ),
        (
            {"idle_s": 15, "outcomes": outcomes(KEPT, SET, SET, 22, SET)},
            "failed web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 15s (kept) 10s 6 EINVAL",
        ),
        (
            {"direction": 0, "remote_port": 0},
            "set web.service ? ? listen 10.1.0.5:48956 * web on 60s 10s 6 -",
        ),
        (
            {"what": IGNORED, "option": 0, "asked": 15, "user_timeout_ms": 120_000},
            "ignored web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 120s"
            " setsockopt of idle 15s",
        ),
        (
            {"what": CLAMPED, "option": 3, "asked": 1500},
            "clamped web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 -"
            " setsockopt of user timeout 1500ms",
        ),
        (
            {"what": IGNORED, "option": 4, "asked": 0},
            "ignored web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 -"
            " setsockopt of keepalive off",
        ),
        (
            {"what": TURNED_OFF, "option": 4, "asked": 0},
            "turned_off web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 -"
            " setsockopt of keepalive off",
        ),
        (
            {"what": TIMED_OUT, "reason": 1, "error": 110, "silent_ms": 5100, "sent": 3},
            "timed_out web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 -"
            " keepalive: silent for 5.1s, 3 unanswered, ETIMEDOUT",
        ),
        (
            {"what": TIMED_OUT, "reason": 2, "error": 110, "silent_ms": 500, "closed_ms": 11_040},
            "timed_out web.service ? ? out 10.1.0.5:48956 [::1]:5432 web on 60s 10s 6 -"
            " user timeout: the peer's window closed for 11.0s, silent for 0.5s, 0 unanswered,"
            " ETIMEDOUT",
        ),
    ],
)
def test_line_says_what_happened(members: dict[str, Any], columns: str) -> None:
    """One line has the event in fixed columns, here without the blanks between, and the time."""
    line = wide(event(**members))
    assert line.endswith("\n")
    assert " ".join(line.split()[1:]) == columns.replace("web.service", UNIT)


def test_names_in_a_line_can_do_no_harm_to_a_terminal() -> None:
    """A command or a cgroup may have any name."""
    line = wide(event(cgroup="/a\x1b[2J", pid=1, command=b"x\ny"))
    assert "/a\\x1b[2J" in line
    assert "x\\ny" in line
    assert line.count("\n") == 1


def test_command_is_as_long_as_it_says() -> None:
    """Older kernels leave the rest of a longer name behind its end."""
    assert event(pid=1, command=b"sh\0thon3\0\0").command == "sh"


def test_columns_begin_where_their_heads_do() -> None:
    """As long as what they show is of usual length."""
    line = wide(event(pid=7, command=b"curl"))
    heads = monitor.Screen(is_wide=True).heads()
    for head, cell in (("CGROUP", UNIT), ("POLICY", "web "), ("INTERVAL", "10s")):
        assert heads.index(head) == line.index(cell)


def test_json_has_every_fact() -> None:
    """An object on one line, with units in its names."""
    line = monitor.as_json(
        event(what=TIMED_OUT, reason=2, error=113, silent_ms=5, sent=2, pid=9, command=b"db")
    )
    found = json.loads(line)
    assert line.count("\n") == 1
    assert found | {"options": None} == {
        "version": 1,
        "time": "2023-11-14T22:13:20.000000+00:00",
        "event": "timed_out",
        "cgroup": UNIT,
        "cgroup_id": 0,
        "unit": "web.service",
        "container": None,
        "network_namespace": 0,
        "pid": 9,
        "command": "db",
        "direction": "out",
        "family": "ipv4",
        "local": {"address": "10.1.0.5", "port": 48956},
        "peer": {"address": "::1", "port": 5432},
        "policy": "web",
        "options": None,
        "setsockopt": None,
        "timeout": {
            "reason": "user timeout",
            "error": "EHOSTUNREACH",
            "silent_ms": 5,
            "unanswered": 2,
            "window_closed_ms": 0,
        },
    }
    assert found["options"]["idle_s"] == {"value": 60, "outcome": None}


def test_json_of_lost_events_has_their_number() -> None:
    """A reader that was too slow is told so in its stream."""
    assert json.loads(monitor.as_json(Lost(0, 3))) == {
        "version": 1,
        "time": "1970-01-01T00:00:00.000000+00:00",
        "event": "lost",
        "count": 3,
    }


@pytest.fixture
def received(tmp_path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """A journal's socket at `tmp_path`/socket; gives what it has received, one by one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "socket"))
        channel.setblocking(False)

        def read() -> dict[str, str]:
            lines = channel.recv(1 << 16).decode().splitlines()
            return dict(line.split("=", 1) for line in lines)

        yield read


@pytest.fixture
def book(tmp_path: Path, lines: list[str]) -> Iterator[Journal]:
    """A Journal at `tmp_path`/socket, with `lines` for a fall-back."""

    def otherwise(line: str) -> bool:
        lines.append(line)
        return len(lines) < 2

    with Journal(otherwise, str(tmp_path / "socket")) as opened:
        yield opened


@pytest.fixture
def lines() -> list[str]:
    """What went past the journal."""
    return []


def test_journal_has_fields_to_search_by(
    received: Callable[[], dict[str, str]], book: Journal
) -> None:
    """The message is for people, the fields for journalctl; --unit finds the event by the unit."""
    book.write(event(pid=7, command=b"curl", outcomes=outcomes(SET, KEPT, 22, 0, SET)))
    assert received() == {
        "MESSAGE": "failed: 10.1.0.5:48956 -> [::1]:5432 of web.service, curl[7], policy web:"
        " keepalive on, idle 60s, interval 10s (kept), probes EINVAL",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "kabpfd",
        "OBJECT_SYSTEMD_UNIT": "web.service",
        "KABPF_EVENT": "failed",
        "KABPF_POLICY": "web",
        "KABPF_CGROUP": UNIT,
        "KABPF_UNIT": "web.service",
        "KABPF_PID": "7",
        "KABPF_COMMAND": "curl",
        "KABPF_DIRECTION": "out",
        "KABPF_LOCAL": "10.1.0.5:48956",
        "KABPF_PEER": "[::1]:5432",
        "KABPF_IDLE_S": "60",
        "KABPF_IDLE_S_OUTCOME": "set",
        "KABPF_INTERVAL_S": "10",
        "KABPF_INTERVAL_S_OUTCOME": "kept",
        "KABPF_PROBES": "6",
        "KABPF_PROBES_OUTCOME": "EINVAL",
        "KABPF_KEEPALIVE": "1",
        "KABPF_KEEPALIVE_OUTCOME": "set",
    }


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"direction": abi.IN}, "set: 10.1.0.5:48956 <- [::1]:5432 of web.service, policy web:"),
        ({"direction": 0}, "set: 10.1.0.5:48956 of web.service, policy web: keepalive on,"),
        (
            {"what": TIMED_OUT, "reason": 3, "error": 110, "silent_ms": 900, "sent": 15},
            "timed out: 10.1.0.5:48956 -> [::1]:5432 of web.service, policy web:"
            " retransmissions: silent for 0.9s, 15 unanswered, ETIMEDOUT",
        ),
        ({"cgroup": None}, "set: 10.1.0.5:48956 -> [::1]:5432 of an unknown cgroup, policy web:"),
    ],
)
def test_message_is_a_sentence_of_its_own(members: dict[str, Any], text: str) -> None:
    """It reads without the fields."""
    assert journal.message(event(**members)).startswith(text)


def test_name_with_a_line_feed_makes_no_field_of_its_own(tmp_path: Path, book: Journal) -> None:
    """Whoever names a process can't write other fields into the journal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "socket"))
        book.write(event(pid=1, command=b"x\nPRIORITY=0"))
        raw = channel.recv(1 << 16)
    assert b"KABPF_COMMAND\n\x0c\0\0\0\0\0\0\0x\nPRIORITY=0\n" in raw
    assert b"x\\nPRIORITY=0[1]" in raw.partition(b"\n")[0]


def test_journal_is_told_how_many_events_it_did_not_get(
    received: Callable[[], dict[str, str]], book: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each window so many lines are written at most, and then how many were not, those that were
    lost on the way apart."""
    monkeypatch.setattr(journal, "LINES_MAX", 4)
    for _ in range(5):
        book.write(event())
    book.write(Lost(0, 10))
    assert [received()["KABPF_EVENT"] for _ in range(2)] == ["set", "set"]
    with pytest.raises(BlockingIOError):
        received()
    assert book.due is not None
    monkeypatch.setattr(journal, "WINDOW_S", 0)
    book.settle()
    lost = [received() for _ in range(2)]
    assert [(each["KABPF_EVENT"], each["KABPF_COUNT"]) for each in lost] == [
        ("lost", "3"),
        ("lost", "10"),
    ]
    assert (lost[0]["KABPF_CGROUP"], lost[0]["KABPF_POLICY"]) == (UNIT, "web")
    assert "KABPF_CGROUP" not in lost[1]
    assert book.due is None


def test_no_policy_takes_the_lines_of_another(
    received: Callable[[], dict[str, str]], book: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one covered process does, the cgroups beside it have their lines, and so have other
    policies; what is told of the rest is bounded, too."""
    monkeypatch.setattr(journal, "LINES_MAX", 8)
    monkeypatch.setattr(journal, "COUNTS_MAX", 3)
    book.policies = 2
    for number in range(1000):
        book.write(event(cgroup="/busy"))
        book.write(event(cgroup=f"/busy/{number}"))
    book.write(event(cgroup="/quiet", policy="quiet"))
    written = [(each["KABPF_POLICY"], each["KABPF_CGROUP"]) for each in _all(received)]
    assert written == [
        ("web", "/busy"), ("web", "/busy/0"),
        ("web", "/busy"), ("web", "/busy/1"), ("quiet", "/quiet"),
    ]  # fmt: skip
    monkeypatch.setattr(journal, "WINDOW_S", 0)
    book.settle()
    lost = _all(received)
    assert len(lost) <= 4
    assert sum(int(each["KABPF_COUNT"]) for each in lost) == 1996


def _all(received: Callable[[], dict[str, str]]) -> list[dict[str, str]]:
    found = []
    while True:
        try:
            found.append(received())
        except BlockingIOError:
            return found


def test_units_are_read_once_for_all_sockets(
    received: Callable[[], dict[str, str]], book: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more when systemd may have read its files again."""
    read = []

    class Services:
        def __init__(self) -> None:
            read.append(self)

        def of(self, socket: str) -> tuple[str, ...]:
            return (f"of-{socket}.service",)

    monkeypatch.setattr(journal.relations, "Services", Services)
    book.forget_units()
    for name in ("a", "b", "a"):
        book.write(event(cgroup=f"/system.slice/{name}.socket"))
        assert received()["OBJECT_SYSTEMD_UNIT"] == f"of-{name}.socket.service"
    assert len(read) == 1
    book.forget_units()
    book.write(event(cgroup="/system.slice/a.socket"))
    assert len(read) == 2


def test_journal_that_is_full_loses_events(
    received: Callable[[], dict[str, str]], book: Journal
) -> None:
    """Nobody waits for a journal that does not read."""
    for _ in range(5000):
        book.write(event())
    assert book.due is not None
    assert received()["KABPF_EVENT"] == "set"


def test_lines_go_elsewhere_without_a_journal(book: Journal, lines: list[str]) -> None:
    """On a machine without systemd the messages come out where the daemon's others do; what finds
    no room there is lost."""
    book.write(event())
    assert lines == [journal.message(event())]
    assert book.due is None
    book.write(event())
    assert book.due is not None


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        (UNIT, "web.service"),
        ("/system.slice/system-db.slice/db@1.service/worker", "db@1.service"),
        ("/machine.slice/web.scope/system.slice/sshd.service", "web.scope"),
        ("/user.slice/user-7.slice/user@7.service/app.slice/sshd.service", "user@7.service"),
        ("/system.slice", None),
        ("/other/sshd.service", None),
        (None, None),
    ],
)
def test_journal_has_the_unit_of_the_system(
    received: Callable[[], dict[str, str]], book: Journal, cgroup: str | None, unit: str | None
) -> None:
    """journalctl --unit shows nothing of a container's or a user's unit of the same name."""
    book.write(event(cgroup=cgroup))
    assert received().get("OBJECT_SYSTEMD_UNIT") == unit


def test_lost_births_have_the_tree_read_at_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has births of their cgroups lost, or has more than are remembered, makes no monitor read
    the tree for each of them."""
    now, reads = 100.0, 0

    class Tree:
        def cgroups(self) -> list[Cgroup]:
            nonlocal reads, now
            reads += 1
            now += 1
            return [Cgroup(1, 0, "/"), *(Cgroup(id, 1, f"/{id}") for id in range(2, 9))]

    monkeypatch.setattr(events, "Pace", lambda: Pace(lambda: now))
    monkeypatch.setattr(events, "PATHS_MAX", 5)
    tree: Any = Tree()
    paths = events._Paths(tree)
    assert [paths.find(id) for id in (2, 99, 100, 101)] == ["/2", None, None, None]
    assert reads == 2
    for id in range(200, 210):
        paths.born(id, 1, "x")
        assert paths.find(id) in (None, "/x")
    assert reads == 2
    now += 1
    assert [paths.find(id) for id in (8, 99)] == ["/8", None]
    assert reads == 3
