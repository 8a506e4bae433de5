"""Options: ranges, presets, jitter, `user_timeout: auto`, where each value comes from, and what is
warned of."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from kabpf.errors import PolicyError
from kabpf.policy import options, parser
from kabpf.policy.model import (
    BEFORE_SYN,
    BY_KEY,
    ON_COMMAND_LINE,
    ON_SOCKETS,
    OPTIONS,
    OptionRow,
    Options,
    Origin,
    Policy,
    Range,
    options_json,
    options_of,
    warnings,
)
from kabpf.policy.yaml import Source

FILE = "a.service.yaml"
SOCKET_OPTIONS = [row for row in OPTIONS if row.socket_option]
NLB = Options(True, Range(175, 175), Range(29, 29), Range(5, 5))


def test_every_option_has_a_row() -> None:
    """The table, the options of a policy and those of a draft have the same names in one order."""
    assert ("keepalive", *(row.field for row in OPTIONS)) == Options._fields
    assert (*(row.key for row in OPTIONS), "preset") == options.Draft._fields


def test_rows_agree_with_themselves() -> None:
    """A range has a Range's field; errors name the limits that hold; what commands take, a user may
    ask for, unless each connection of the machine is looked at for it."""
    for row in OPTIONS:
        whole = Options(**{row.field: Range(row.low, row.high) if row.is_range else row.high})
        assert options_of(options_json(whole)) == whole
        assert ("Range" in str(Options.__annotations__[row.field])) == row.is_range
        assert row.unit in ("s", "ms") or row.limits in row.expected
        assert not row.none or row.none in (*row.words, "0%")
        assert not (row.for_users and row.before_syn)
    assert [row for row in ON_SOCKETS if not row.for_users] == []
    assert [row for row in ON_COMMAND_LINE if not row.for_users] == list(BEFORE_SYN)


def test_rows_are_in_the_order_of_the_programs() -> None:
    """What sockets and reports have by place is in the order of the programs' enum."""
    text = "".join(path.read_text() for path in (Path(__file__).parents[3] / "bpf").glob("*.h"))
    (places,) = re.findall(r"enum option \{(.*?)\}", text, re.DOTALL)
    assert re.findall(r"\w+", places.lower())[: len(ON_SOCKETS)] == [row.key for row in ON_SOCKETS]
    assert [row.key for row in SOCKET_OPTIONS if row.socket_option not in text] == []


@pytest.mark.parametrize("row", SOCKET_OPTIONS, ids=lambda row: row.key)
def test_limits_are_those_of_the_kernel(row: OptionRow) -> None:
    """The kernel takes both limits, and nothing beyond; 0 is none where files can say so. A connect
    timeout below a second it takes, and gives a second."""
    option = getattr(socket, row.socket_option)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        for value in (row.low, row.high):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
            assert connection.getsockopt(socket.IPPROTO_TCP, option) == value
        for value in (row.low - 1, row.high + 1):
            if (value or not row.none) and (value, row.key) != (999, "connect_timeout"):
                beyond = (value & 0xFFFFFFFF).to_bytes(4, sys.byteorder)
                with pytest.raises(OSError, match="Invalid argument"):
                    connection.setsockopt(socket.IPPROTO_TCP, option, beyond)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("idle: 30s..5m", Options(idle_s=Range(30, 300))),
        ("interval: 1..32767", Options(interval_s=Range(1, 32767))),
        ("probes: 3..9", Options(probes=Range(3, 9))),
        ("user_timeout: 1500ms..2m", Options(user_timeout_ms=Range(1500, 120_000))),
        ("user_timeout: 1ms..24d", Options(user_timeout_ms=Range(1, 2_073_600_000))),
        ("syn_retries: 1", Options(syn_retries=1)),
        ("syn_retries: '127'", Options(syn_retries=127)),
        ("connect_timeout: 1000ms", Options(connect_timeout_ms=1000)),
        ("connect_timeout: 10", Options(connect_timeout_ms=10_000)),
        ("connect_timeout: 24d", Options(connect_timeout_ms=2_073_600_000)),
        ("connect_timeout: off", Options()),
        ("jitter: 0%", Options(jitter_percent=0)),
        ("jitter: 50%", Options(jitter_percent=50)),
        ("idle: 30..60, jitter: 007%", Options(idle_s=Range(30, 60), jitter_percent=7)),
    ],
)
def test_option_is_read_in_the_units_of_the_kernel(text: str, expected: Options) -> None:
    """A range has both its bounds, and every option may stand in a policy and in defaults."""
    assert policy(f"keepalive: {{{text}}}").rules.options == expected
    assert policy("keepalive: on", f"{{{text}}}").rules.options == expected


@pytest.mark.parametrize(
    ("text", "defaults", "expected"),
    [
        ("preset: aws-nlb", "", NLB),
        ("preset: aws-nlb, idle: 60", "", Options(True, Range(60, 60), NLB.interval_s, NLB.probes)),
        ("idle: 60, preset: aws-nlb", "", Options(True, Range(60, 60), NLB.interval_s, NLB.probes)),
        ("preset: aws-nlb", "idle: 9, interval: 9, probes: 9", NLB),
        ("", "preset: aws-nlb", NLB),
        ("probes: 9", "preset: aws-nlb", Options(True, NLB.idle_s, NLB.interval_s, Range(9, 9))),
        ("preset: aws-nlb", "preset: azure-lb", NLB),
        ("timeout: 350s", "", NLB),
        ("timeout: 350", "preset: azure-lb", NLB),
        ("preset: aws-nlb", "timeout: 4m", NLB),
        ("", "timeout: 350", NLB),
        ("idle: 60, timeout: 350", "", Options(True, Range(60, 60), NLB.interval_s, NLB.probes)),
        (
            "timeout: 100m",
            "",
            Options(True, Range.exactly(3000), Range.exactly(75), Range.exactly(5)),
        ),
        (
            "preset: aws-nlb, user_timeout: auto",
            "",
            Options(True, NLB.idle_s, NLB.interval_s, NLB.probes, Range(320_000, 320_000)),
        ),
    ],
)
def test_preset_gives_what_is_not_given_beside_it(
    text: str, defaults: str, expected: Options
) -> None:
    """Single options override the preset beside them, and a policy's preset beats the defaults."""
    assert policy(f"keepalive: {{{text}}}", f"{{{defaults}}}").rules.options == expected


def test_later_defaults_beat_an_earlier_preset() -> None:
    """Defaults are merged key by key, and a preset counts as the keys that it gives."""
    found = combined(
        ("1.yaml", "defaults: {preset: aws-nlb, probes: 9}"),
        ("2.yaml", "defaults: {idle: 60}"),
        (FILE, "keepalive: on"),
        ("z.yaml", "defaults: {preset: azure-lb, idle: 25}"),
    )
    assert found[0].rules.options == Options(True, Range(25, 25), Range(20, 20), Range(5, 5))


def test_auto_takes_the_upper_bounds() -> None:
    """A user timeout of auto is idle + interval * probes of the upper bounds."""
    text = "keepalive: {idle: 30s..5m, interval: 5..10, probes: 3..6, user_timeout: auto}"
    assert policy(text).rules.options.user_timeout_ms == Range.exactly(360_000)


def test_origins_of_a_timeout_have_its_arithmetic() -> None:
    """`explain` says how each number comes from the timeout."""
    found = policy("keepalive:\n  timeout: 100m\n  probes: 9\n").origins
    assert {key: found[key] for key in ("idle", "interval", "probes")} == {
        "idle": Origin(Source(FILE, 2), "timeout: half of 6000 s"),
        "interval": Origin(Source(FILE, 2), "timeout: a twelfth of 6000 s, at most 75 s"),
        "probes": Origin(Source(FILE, 3)),
    }


def test_origins_tell_where_every_value_comes_from() -> None:
    """Each key that counts has its file and line, and what was derived its arithmetic."""
    defaults = "\ndefaults:\n  probes: 6\n  syn_retries: 4\n  user_timeout: auto\n"
    text = (
        "keepalive:\n  preset: aws-nlb\n  interval: 10s\n  jitter: 10%\nmode: override\n"
        "direction: out\nloopback: false\nexisting: true\n"
    )
    found = combined(("policy.yaml", defaults), (FILE, text))[0].origins
    preset = "preset aws-nlb: idle + interval * 5 stays below its idle timeout of 350 s"
    assert found == {
        "keepalive": Origin(Source(FILE, 1)),
        "idle": Origin(Source(FILE, 2), "preset aws-nlb: half of its idle timeout of 350 s"),
        "interval": Origin(Source(FILE, 3)),
        "probes": Origin(Source(FILE, 2), preset),
        "user_timeout": Origin(
            Source("policy.yaml", 5), "defaults, auto: 175 s + 10 s * 5"
        ),
        "jitter": Origin(Source(FILE, 4)),
        "syn_retries": Origin(Source("policy.yaml", 4), "defaults"),
        "mode": Origin(Source(FILE, 5)),
        "direction": Origin(Source(FILE, 6)),
        "loopback": Origin(Source(FILE, 7)),
        "existing": Origin(Source(FILE, 8)),
    }  # fmt: skip


def test_origin_of_a_preset_in_defaults_says_both() -> None:
    """A value of the defaults' preset is marked as the defaults', with its arithmetic."""
    found = policy("keepalive: on", "{preset: conntrack}").origins
    assert found["idle"].note == (
        "defaults, preset conntrack: half of its idle timeout of 432000 s, at most 7200 s"
    )
    assert found["interval"].note == (
        "defaults, preset conntrack: a twelfth of its idle timeout of 432000 s, at most 75 s"
    )


def test_policy_that_is_off_has_no_origins_of_numbers() -> None:
    """With keepalive off nothing comes from anywhere but that."""
    assert policy("keepalive: off", "{idle: 5}").origins == {"keepalive": Origin(Source(FILE, 1))}


NLB_LIMIT = "the idle timeout of preset aws-nlb (350 s)"
TIMEOUTS = [
    (
        "idle: 60, interval: 10, user_timeout: 69",
        "user_timeout: 69 s is below idle + interval of policy a.service (60 s + 10 s), expected at"
        " least 70 s, or auto",
    ),
    ("idle: 60, interval: 10, user_timeout: 70", ""),
    (
        "idle: 30..60, interval: 5..10, user_timeout: 1500ms..2m",
        "user_timeout: 1500 ms is below idle + interval of policy a.service (60 s + 10 s), expected"
        " at least 70 s, or auto",
    ),
    ("idle: 60, interval: 10, probes: 1, user_timeout: auto", ""),
    ("timeout: 350", ""),
    (
        "timeout: 60, idle: 60",
        "idle: 60 s of policy a.service is not below the timeout (60 s), expected at most 30 s",
    ),
    (
        "timeout: 60, interval: 15",
        "interval: idle + 2 * interval of policy a.service (30 s + 2 * 15 s) is not below the"
        " timeout (60 s), expected room for a second probe",
    ),
    ("idle: 60, user_timeout: 5", ""),
    ("interval: 60, user_timeout: 5", ""),
    ("idle: 60, interval: 10, user_timeout: off", ""),
    ("preset: aws-nlb", ""),
    (
        "preset: aws-nlb, idle: 350",
        f"idle: 350 s of policy a.service is not below {NLB_LIMIT}, expected at most 175 s",
    ),
    (
        "preset: aws-nlb, idle: 30..400, interval: 9",
        f"idle: 400 s of policy a.service is not below {NLB_LIMIT}, expected at most 175 s",
    ),
    (
        "preset: aws-nlb, idle: 292",
        "idle: idle + 2 * interval of policy a.service (292 s + 2 * 29 s) is not below"
        f" {NLB_LIMIT}, expected room for a second probe",
    ),
    ("preset: aws-nlb, idle: 291", ""),
    (
        "preset: aws-nlb, interval: 5..88",
        "interval: idle + 2 * interval of policy a.service (175 s + 2 * 88 s) is not below"
        f" {NLB_LIMIT}, expected room for a second probe",
    ),
    ("preset: aws-nlb, interval: 87", ""),
]


@pytest.mark.parametrize(("text", "warning"), TIMEOUTS)
def test_contradiction_is_warned_of(text: str, warning: str) -> None:
    """Numbers that can't be meant are taken, and said in one line with the place to change."""
    expected = [f"{FILE}:1: keepalive.{warning}"] if warning else []
    assert warnings([policy(f"keepalive: {{{text}}}")]) == expected


@pytest.mark.parametrize(
    ("text", "defaults", "expected"),
    [
        ("idle: 600", "preset: aws-nlb", []),
        (
            "interval: 100",
            "preset: aws-nlb",
            [
                f"{FILE}:1: keepalive.interval: idle + 2 * interval of policy a.service (175 s + 2"
                f" * 100 s) is not below {NLB_LIMIT}, expected room for a second probe"
            ],
        ),
        (
            "idle: 60",
            "interval: 10, user_timeout: 5",
            [
                "policy.yaml:1: defaults.user_timeout: 5 s is below idle + interval of policy"
                " a.service (60 s + 10 s), expected at least 70 s, or auto"
            ],
        ),
    ],
)
def test_defaults_are_part_of_a_contradiction(
    text: str, defaults: str, expected: list[str]
) -> None:
    """What a policy has in the end counts; an idle of its own is not measured by the preset of the
    defaults."""
    assert warnings([policy(f"keepalive: {{{text}}}", f"{{{defaults}}}")]) == expected


def test_destinations_are_warned_of_where_they_differ() -> None:
    """A destination has its warnings, but not those that its policy has already."""
    text = (
        "keepalive: {idle: 60, interval: 10, user_timeout: 30}\n"
        "destinations:\n"
        "  - {to: 10.0.0.0/8, probes: 3}\n"
        "  - {to: 10.1.0.0/16, idle: 90}\n"
        "  - {to: fd00::/8, keepalive: off}\n"
        "  - {to: fd01::/16, timeout: 60, idle: 60, user_timeout: off}\n"
    )
    timeout = f"{FILE}:1: keepalive.user_timeout: 30 s is below idle + interval of policy a.service"
    assert warnings([policy(text)]) == [
        f"{timeout} (60 s + 10 s), expected at least 70 s, or auto",
        f"{timeout} to 10.1.0.0/16 (90 s + 10 s), expected at least 100 s, or auto",
        f"{FILE}:6: destinations[3].idle: 60 s of policy a.service to fd01::/16 is not below the"
        " timeout (60 s), expected at most 30 s",
    ]


def test_warnings_come_in_the_order_of_reading() -> None:
    """The warnings of several files follow each other as the files do."""
    text = "keepalive: {idle: 60, interval: 10, user_timeout: 30}"
    found = combined(("b.service.yaml", text), ("c.service.yaml", text))
    assert [each.partition(":")[0] for each in warnings(found)] == [
        "b.service.yaml",
        "c.service.yaml",
    ]


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("idle", "30s..5m", ""),
        ("user_timeout", "auto", ""),
        ("preset", "azure-lb", ""),
        ("idle", "0", "0 is not in 1 to 32767 seconds"),
        ("idle", "40000", "40000 is not in 1 to 32767 seconds"),
        ("idle", "60..1m", "60..1m is a range of one value, expected 60"),
        ("connect_timeout", "off", ""),
        ("connect_timeout", "auto", f"auto, expected {BY_KEY['connect_timeout'].expected}"),
        ("timeout", "1h", ""),
        ("timeout", "11", "11 is not in 12 to 432000 seconds"),
        ("jitter", "60%", "60% is not in 0% to 50%"),
        ("preset", "azure-bl", "azure-bl, did you mean azure-lb?"),
    ],
)
def test_single_option_is_checked_without_a_file(key: str, text: str, message: str) -> None:
    """An option of a command line is judged as in a policy file, and named by its value alone."""
    found = ""
    try:
        options.check(key, text)
    except PolicyError as error:
        found = str(error)
    assert found == message


def combined(*files: tuple[str, str]) -> tuple[Policy, ...]:
    """Policies of (path, text), in the order in which they are read."""
    return parser.combine([parser.parse(text.encode(), path) for path, text in files])


def policy(text: str, defaults: str = "{}") -> Policy:
    """The policy of a one-policy file under defaults."""
    (found,) = combined(("policy.yaml", f"defaults: {defaults}"), (FILE, text))
    return found
