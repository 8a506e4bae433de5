"""The language of policy files: what is refused and in which words, and what is taken as what."""

from __future__ import annotations

import contextlib
import gc
import re
import subprocess
import sys
from ipaddress import IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import CGROUPS, LONG, MALFORMED, NO_SELECT, SELECTORS, UNITS

from kabpf.errors import PolicyError
from kabpf.policy import parser
from kabpf.policy.model import (
    Destination,
    Direction,
    Mode,
    Options,
    Policy,
    Range,
    Rules,
    Selector,
    warnings,
)
from kabpf.policy.yaml import Source

FILE = "/etc/kabpf/policy.d/app.service.yaml"


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=lambda value: ascii(value[:70]))
def test_malformed_file_is_refused_with_its_message(text: str | bytes, message: str) -> None:
    """What is wrong in a file is said in one line: file, line, key, value, what was expected."""
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(PolicyError) as raised:
        parser.combine([parser.parse(content, FILE)])
    assert str(raised.value) == f"{FILE}:{message}"


@pytest.mark.parametrize(
    ("text", "message"), [*SELECTORS, *UNITS, *CGROUPS], ids=lambda value: ascii(value[:60])
)
def test_malformed_selector_is_refused_with_its_message(text: str, message: str) -> None:
    """What a selector may not be is said in one line, with its place in the list."""
    with pytest.raises(PolicyError) as raised:
        parser.parse(f"select: {text}\nkeepalive: on".encode(), FILE)
    assert str(raised.value) == f"{FILE}:{message}"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("app", f"{NO_SELECT} (nginx.service.yaml)"),
        ("10-nginx.service", f"{NO_SELECT} (nginx.service.yaml)"),
        ("a b.service", f"{NO_SELECT} (nginx.service.yaml)"),
        (LONG, f"'{LONG}', expected a name of 1 to 255 printable bytes"),
        ("a\x1bb", "'a\\x1bb', expected a name of 1 to 255 printable bytes"),
    ],
)
def test_drop_in_with_an_unusable_name_is_refused(name: str, problem: str) -> None:
    """A file of one policy is named as a policy may be, and without select after a unit."""
    with pytest.raises(PolicyError) as raised:
        parser.parse(b"keepalive: on", f"{name}.yaml")
    assert str(raised.value) == f"{name}.yaml:1: {problem}"


def test_every_policy_whose_auto_lacks_numbers_is_reported() -> None:
    """Two files that each lack a number for user_timeout auto give one finding each."""
    text = b"select: [{cgroup: /a}]\nkeepalive: {idle: 5, probes: 6, user_timeout: auto}"
    with pytest.raises(PolicyError) as raised:
        parser.combine([parser.parse(text, name) for name in ("a.yaml", "b.yaml")])
    assert [finding.partition(":")[0] for finding in raised.value.findings] == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", 1), ("60", 60), ("32767", 32767), ("1s", 1), ("90s", 90), ("32767s", 32767),
        ("5m", 300), ("1h", 3600), ("9h", 32400), ('"60"', 60), ("'5m'", 300), ("017", 17),
        ("0060", 60),
    ],
)  # fmt: skip
def test_time_is_read_in_seconds(text: str, seconds: int) -> None:
    """A plain number is seconds, s, m and h are units, and a leading zero is not octal."""
    found = options(f"keepalive: {{idle: {text}, interval: {text}}}")
    assert found == Options(idle_s=Range.exactly(seconds), interval_s=Range.exactly(seconds))


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1ms", 1), ("1500ms", 1500), ("30", 30_000), ("30s", 30_000), ("5m", 300_000),
        ("2h", 7_200_000), ("24d", 2_073_600_000), ("2147483647ms", 2_147_483_647),
        ("2147483", 2_147_483_000), ("off", None),
    ],
)  # fmt: skip
def test_user_timeout_is_read_in_milliseconds(text: str, milliseconds: int | None) -> None:
    """A plain number is seconds, ms to d are units, and off leaves the option alone."""
    found = options(f"keepalive: {{user_timeout: {text}}}")
    assert found == Options(user_timeout_ms=milliseconds and Range.exactly(milliseconds))


@pytest.mark.parametrize(("text", "probes"), [("1", 1), ("127", 127), ("'6'", 6), ("017", 17)])
def test_probes_are_a_decimal_number(text: str, probes: int) -> None:
    """Probes are a number from 1 to 127, quoted or not, never octal."""
    assert options(f"keepalive: {{probes: {text}}}") == Options(probes=Range.exactly(probes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "keepalive: on",
            Options(
                idle_s=Range.exactly(9),
                probes=Range.exactly(3),
                user_timeout_ms=Range.exactly(1000),
            ),
        ),
        (
            "keepalive: {}",
            Options(
                idle_s=Range.exactly(9),
                probes=Range.exactly(3),
                user_timeout_ms=Range.exactly(1000),
            ),
        ),
        (
            '"keepalive": "on"',
            Options(
                idle_s=Range.exactly(9),
                probes=Range.exactly(3),
                user_timeout_ms=Range.exactly(1000),
            ),
        ),
        ("keepalive: off", Options(keepalive=False)),
        (
            "keepalive: {idle: 1}",
            Options(
                idle_s=Range.exactly(1),
                probes=Range.exactly(3),
                user_timeout_ms=Range.exactly(1000),
            ),
        ),
        (
            "keepalive: {user_timeout: off}",
            Options(idle_s=Range.exactly(9), probes=Range.exactly(3)),
        ),
        (
            "keepalive: {interval: 2, user_timeout: auto}",
            Options(
                idle_s=Range.exactly(9),
                interval_s=Range.exactly(2),
                probes=Range.exactly(3),
                user_timeout_ms=Range.exactly(15_000),
            ),
        ),
    ],
)
def test_defaults_fill_what_a_policy_leaves_out(text: str, expected: Options) -> None:
    """What a policy says, off included, beats the defaults; keepalive off has no options at all."""
    assert options(text, "{idle: 9, probes: 3, user_timeout: 1}") == expected


def test_auto_in_defaults_is_computed_for_each_policy() -> None:
    """The defaults' user_timeout auto is idle + interval * probes of the policy it fills in."""
    found = options("keepalive: {idle: 5m}", "{interval: 10, probes: 6, user_timeout: auto}")
    assert found == Options(True, *map(Range.exactly, (300, 10, 6, 360_000)))


def test_later_defaults_win_key_by_key() -> None:
    """Defaults of all files are merged before they fill policies in, also those read before."""
    found = combined(
        ("policy.yaml", "defaults: {idle: 1, interval: 1}"),
        ("a.service.yaml", "keepalive: {probes: 9}"),
        ("b.yaml", "defaults: {interval: 2, probes: 2}"),
    )
    assert [each.rules.options for each in found] == [Options(True, *map(Range.exactly, (1, 2, 9)))]


def test_later_policy_of_the_same_name_replaces_the_earlier() -> None:
    """A policy of a later file takes the place of its namesake, whole, and counts as read there."""
    found = combined(
        (
            "policy.yaml",
            "policies:\n"
            "  a: {select: [{cgroup: /one}], keepalive: {idle: 1}}\n"
            "  b: {select: [{cgroup: /b}], keepalive: {idle: 2}}\n",
        ),
        ("zz.yaml", "policies: {a: {select: [{cgroup: /two}], keepalive: {probes: 3}}}"),
    )
    assert [each.name for each in found] == ["b", "a"]
    assert found[1].rules.options == Options(probes=Range.exactly(3))
    assert [selector.text for selector in found[1].selectors] == ["/two"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Rules(Options())),
        ("mode: fill\ndirection: both\nloopback: true", Rules(Options())),
        ("mode: override", Rules(Options(), Mode.OVERRIDE)),
        ("mode: enforce\ndirection: in", Rules(Options(), Mode.ENFORCE, Direction.IN)),
        ("direction: out", Rules(Options(), direction=Direction.OUT)),
        ("loopback: false", Rules(Options(), loopback=False)),
        ("'loopback': \"false\"", Rules(Options(), loopback=False)),
    ],
)
def test_rules_of_a_policy(text: str, expected: Rules) -> None:
    """What is not given is fill, both directions, loopback too; words may be quoted."""
    (found,) = combined((FILE, f"keepalive: on\n{text}"))
    assert found.rules == expected


@pytest.mark.parametrize(("text", "existing"), [("", True), ("true", True), ("false", False)])
def test_policy_may_leave_existing_connections(text: str, existing: bool) -> None:
    """Open connections are given what is new unless the policy says not to."""
    (found,) = combined((FILE, f"keepalive: on\n{text and f'existing: {text}'}"))
    assert found.existing is existing


@pytest.mark.parametrize(("text", "log"), [("", False), ("off", False), ("sockets", True)])
def test_policy_may_have_its_sockets_logged(text: str, log: bool) -> None:
    """Nothing is logged unless the policy says so."""
    (found,) = combined((FILE, f"keepalive: on\n{text and f'log: {text}'}"))
    assert found.log is log


@pytest.mark.parametrize(
    ("to", "network"),
    [
        ("10.0.0.0/8", "::ffff:10.0.0.0/104"),
        ("10.1.2.3", "::ffff:10.1.2.3/128"),
        ("10.1.2.3/32", "::ffff:10.1.2.3/128"),
        ("0.0.0.0/0", "::ffff:0:0/96"),
        ("'::ffff:10.0.0.0/104'", "::ffff:10.0.0.0/104"),
        ("'::ffff:10.1.2.3'", "::ffff:10.1.2.3/128"),
        ("'::/0'", "::/0"),
        ("'::1'", "::1/128"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("2001:db8:0:0::1", "2001:db8::1/128"),
    ],
)
def test_destination_is_an_ipv6_network(to: str, network: str) -> None:
    """IPv4 is v4-mapped, however it is written, and an address is one host."""
    (found,) = destinations(f"[{{to: {to}, idle: 5}}]")
    assert found.network == IPv6Network(network)


def test_ports_are_sorted() -> None:
    """Ports are numbers in order; without any, every port is meant."""
    found = destinations(
        "[{to: fd00::1, ports: [6432, '80', 5432], idle: 5}, {to: fd00::2, idle: 5}]"
    )
    assert [each.ports for each in found] == [(80, 5432, 6432), ()]


@pytest.mark.parametrize(
    ("keepalive", "destination", "expected"),
    [
        ("{idle: 60, probes: 6}", "idle: 5", "5 10 6 -"),
        ("{idle: 60, probes: 6}", "keepalive: on", "60 10 6 -"),
        ("{idle: 60, probes: 6}", "keepalive: off", "off"),
        ("{idle: 60, user_timeout: auto, probes: 6}", "idle: 5", "5 10 6 65000"),
        ("{idle: 60, user_timeout: auto, probes: 6}", "user_timeout: off", "60 10 6 -"),
        ("{idle: 60, user_timeout: auto, probes: 6}", "user_timeout: 1..9", "60 10 6 1000..9000"),
        ("{idle: 60, probes: 6}", "preset: aws-nlb", "175 29 5 -"),
        ("{preset: aws-nlb}", "idle: 60", "60 29 5 -"),
        ("off", "idle: 5", "5 10 - -"),
        ("off", "keepalive: on", "- 10 - -"),
        ("off", "keepalive: off", "off"),
    ],
)
def test_options_of_a_destination_start_from_its_policy(
    keepalive: str, destination: str, expected: str
) -> None:
    """What a destination leaves out is its policy's, or where that is off the defaults'; auto is
    computed from what the destination has in the end."""
    (found,) = destinations(f"[{{to: 10.0.0.0/8, {destination}}}]", keepalive)
    given = found.options
    numbers = (given.idle_s, given.interval_s, given.probes, given.user_timeout_ms)
    shown = " ".join(str(number or "-") for number in numbers) if given.keepalive else "off"
    assert shown == expected


def test_destinations_keep_their_order() -> None:
    """Two destinations may name the same network: the later one counts, so their order is kept."""
    found = destinations(
        "[{to: fd00::1, idle: 9}, {to: 10.0.0.1, idle: 8}, {to: fd00::1, idle: 7}]"
    )
    assert [each.options.idle_s for each in found] == [Range(n, n) for n in (9, 8, 7)]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("nginx.service", "nginx.service"),
        ("sshd.socket", "sshd.socket"),
        ("system.slice", "system.slice"),
        ("session-1.scope", "session-1.scope"),
        ("postgresql@.service", "postgresql@*.service"),
        ("postgresql@15-main.service", "postgresql@15-main.service"),
        ("dev-sda\\x2d1.mount", "dev-sda\\x2d1.mount"),
        ("php*-fpm.service", "php*-fpm.service"),
    ],
)
def test_drop_in_named_after_a_unit_selects_it(name: str, unit: str) -> None:
    """A drop-in without select speaks of the unit that it is named after; a template stands for
    its instances."""
    (found,) = combined((f"/etc/kabpf/policy.d/{name}.yaml", "keepalive: on"))
    assert found.name == name
    assert found.selectors == (
        Selector("unit", unit, Source(f"/etc/kabpf/policy.d/{name}.yaml", 1)),
    )


def test_drop_in_with_select_speaks_of_that_alone() -> None:
    """With select the file's name names the policy only."""
    (found,) = combined(("nginx.service.yaml", "select: [{cgroup: /a}]\nkeepalive: on"))
    assert (found.name, [selector.text for selector in found.selectors]) == (
        "nginx.service",
        ["/a"],
    )


@pytest.mark.parametrize(
    ("selector", "kind", "text", "is_glob"),
    [
        ("unit: a.service", "unit", "a.service", False),
        ("user_unit: a@.service", "user_unit", "a@*.service", True),
        ("unit: a@.service", "unit", "a@*.service", True),
        ("unit: '[ab]?.socket'", "unit", "[ab]?.socket", True),
        ("cgroup: /", "cgroup", "/", False),
        ("cgroup: /a/b", "cgroup", "/a/b", False),
        ("cgroup: /a/b/", "cgroup", "/a/b", False),
        ("cgroup: /**", "cgroup", "/**", True),
        ("cgroup: /a/**/b*", "cgroup", "/a/**/b*", True),
        ("cgroup: /a b/é", "cgroup", "/a b/é", False),
        ("cgroup: /...", "cgroup", "/...", False),
        (f"cgroup: /{'x' * 255}", "cgroup", f"/{'x' * 255}", False),
    ],
)
def test_selector_is_taken_as_written(selector: str, kind: str, text: str, is_glob: bool) -> None:
    """A selector keeps its text but for a template's instances and a slash at the end."""
    (found,) = combined(("a.yaml", f"select:\n  - {selector}\nkeepalive: on"))
    (got,) = found.selectors
    assert (got.kind, got.text, got.is_glob, got.source.line) == (kind, text, is_glob, 2)


def test_offered_policy_needs_no_selector() -> None:
    """Containers choose it; and one that is not offered has to select something."""
    (found,) = combined(("a.yaml", "offered: true\nkeepalive: {idle: 61}\n"))
    assert found.offered and found.selectors == () and found.is_of_containers
    (found,) = combined(("a.yaml", "offered: false\nselect: [{cgroup: /a}]\nkeepalive: on\n"))
    assert not found.offered and not found.is_of_containers
    with pytest.raises(PolicyError, match=r"no select, expected .*"):
        combined(("a.yaml", "offered: false\nkeepalive: on\n"))


def test_sources_name_the_lines_of_policies() -> None:
    """A policy's source is the line of its name."""
    text = "# comment\npolicies:\n\n  a:\n    select: [{cgroup: /a}]\n    keepalive: on\n"
    (found,) = combined(("policy.yaml", text))
    assert str(found.source) == "policy.yaml:4"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# a comment\n",
        "---\n",
        "{}",
        "policies: {}",
        "defaults: {}",
        "%YAML 1.2\n---\n{}\n...\n",
    ],
)
def test_file_without_policies_is_taken(text: str) -> None:
    """A file may say nothing."""
    assert combined(("a.yaml", text)) == ()


def test_byte_order_mark_is_passed_over() -> None:
    """A file that an editor marked as UTF-8 reads as if it were not."""
    assert (
        parser.parse(b"\xef\xbb\xbfkeepalive: off", FILE).policies[0].policy.name == "app.service"
    )


def test_name_of_255_bytes_is_taken() -> None:
    """A policy's name may be as long as a file's."""
    name = "é" * 127 + "x"
    text = f"policies: {{{name}: {{select: [{{cgroup: /a}}], keepalive: on}}}}"
    assert [each.name for each in combined(("a.yaml", text))] == [name]


def test_yaml_is_imported_when_a_file_is_read() -> None:
    """What only asks the kernel, as kabpfctl status, does not pay for it."""
    program = "import sys, kabpf.plan.automaton, kabpf.policy.files;"
    program += " sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_nothing_of_the_parser_stays_in_memory() -> None:
    """The parser of libyaml, of 20 KiB, goes with the file that it has read."""
    gc.collect()
    gc.disable()
    try:
        for text in (b"policies: {a: {select: [{unit: a.service}], keepalive: on}}", b"{", b""):
            with contextlib.suppress(PolicyError):
                parser.parse(text, "a.yaml")
        names = {type(each).__name__ for each in gc.get_objects()}
    finally:
        gc.enable()
    assert not names & {"_Tree", "CSafeLoader", "SafeLoader"}


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_policies_or_a_policy_error(content: bytes) -> None:
    """Whatever bytes a file holds, reading it ends in policies or in a PolicyError of one line."""
    check_refusal_or_policies(content)


GOOD = (
    """\
defaults:
  interval: 10s
  user_timeout: auto
policies:
  a: {select: [{unit: a@.service}, {cgroup: /a/**/b*}], keepalive: {idle: 5m, probes: 6}}
  b:
    select:
      - cgroup: '/b'
    keepalive: off
    mode: enforce
    direction: out
    existing: false
    destinations:
      - {to: 10.0.0.0/8, ports: [5432, 80], idle: 9..1m, jitter: 10%}
      - {to: 'fe80::/10', keepalive: on}
""",
    """\
select: [{unit: a.socket}, {user_unit: a.service}]
loopback: false
keepalive:
  idle: 60..90
  syn_retries: 3
  connect_timeout: 10s
  preset: aws-nlb
  interval: 10
  probes: "6"
  user_timeout: 1500ms
""",
)
WORDS = [
    *("defaults", "policies", "select", "keepalive", "idle", "interval", "probes", "user_timeout"),
    *("jitter", "syn_retries", "preset", "mode", "direction", "destinations", "loopback", "to"),
    *("connect_timeout", "timeout"),
    *("existing", "ports", "ipvs", "fill", "both", "true", "30s..5m", "..", "5..3", "10%", "99%"),
    *("::", "::1", "10.0.0.1", "10.0.0.0/8", "fe80::1/10", "/33", "65536", "[1, 1]", "user_unit"),
    *("unit", "cgroup", "service", "a", "/", "//", "..", "**", "on", "off", "auto", "no", "~", "."),
    *("0", "-1", "017", "0x10", "1e3", ".inf", "128", "32768", "25d", "9" * 20, "5m", "ms", "\n"),
    *("'", '"', '"\\x1b"', "*a", "&a ", "!!str ", "!!map ", "<<", ": ", "- ", "? ", ", ", "#", " "),
    *("[", "]", "{", "}", "|", ">-\n", "@", "%", "---\n", "\\", "\t", "\r", "\0", "\x1b", "\x7f"),
    *("\x85", "\xa0", "\xad", "e\u0301", "\u0663", "\u202e", "\u2028", "\ufeff", "\uffff", "😀"),
]


@settings(max_examples=500)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 250), st.lists(st.sampled_from(WORDS), max_size=2))),
)
def test_any_text_of_keys_and_scalars_is_policies_or_a_policy_error(
    good: str, replaced: list[tuple[int, list[str]]]
) -> None:
    """However the words of policy files are put together, reading ends in policies, whose options
    the kernel takes, or in a PolicyError of one line."""
    tokens = re.findall(r"\w+|\W", good)
    for index, words in replaced:
        tokens[index % len(tokens)] = "".join(words)
    check_refusal_or_policies("".join(tokens).encode())


SECONDS_OR_NOT = st.integers(-2, 40_000).map(str) | st.sampled_from(["1s", "5m", "9h", "10h"])


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["idle", "interval"]), SECONDS_OR_NOT),
    st.dictionaries(st.just("probes"), st.integers(-1, 130).map(str)),
    st.dictionaries(st.just("user_timeout"), st.sampled_from(["auto", "off", "1ms", "25d", "24d"])),
)
def test_options_that_are_taken_are_in_the_ranges_of_the_kernel(
    times: dict[str, str], probes: dict[str, str], timeout: dict[str, str]
) -> None:
    """No policy file brings about a number that the kernel would refuse."""
    pairs = ", ".join(f"{key}: {value}" for key, value in (times | probes | timeout).items())
    check_refusal_or_policies(f"keepalive: {{{pairs}}}".encode())


def check_refusal_or_policies(content: bytes) -> None:
    try:
        found = parser.combine([parser.parse(content, FILE)])
    except PolicyError as error:
        assert error.findings
        for finding in error.findings:
            assert finding.startswith(f"{FILE}:")
            assert finding.isprintable()
            line = int(finding.removeprefix(f"{FILE}:").partition(":")[0])
            assert 1 <= line <= max(1, len(content.decode(errors="replace").splitlines()))
        return
    for each in found:
        assert each.selectors or each.offered
        check_options(each.rules.options)
        for destination in each.rules.destinations:
            check_options(destination.options)
            assert all(1 <= port <= 65535 for port in destination.ports)
        for warning in warnings([each]):
            assert warning.startswith(f"{FILE}:")
            assert warning.isprintable()


def check_options(given: Options) -> None:
    for range_, limit in (
        (given.idle_s, 32767),
        (given.interval_s, 32767),
        (given.probes, 127),
        (given.user_timeout_ms, 2**31 - 1),
        (given.syn_retries and Range.exactly(given.syn_retries), 127),
        (given.connect_timeout_ms and Range.exactly(given.connect_timeout_ms), 2**31 - 1),
    ):
        assert range_ is None or 1 <= range_.low <= range_.high <= limit
    assert 0 <= given.jitter_percent <= 50


def combined(*files: tuple[str, str]) -> tuple[Policy, ...]:
    """Policies of (path, text), in the order in which they are read."""
    return parser.combine([parser.parse(text.encode(), path) for path, text in files])


def destinations(text: str, keepalive: str = "on") -> tuple[Destination, ...]:
    """The destinations of a one-policy file under defaults that give the interval alone."""
    text = f"keepalive: {keepalive}\ndestinations: {text}"
    (found,) = combined(("policy.yaml", "defaults: {interval: 10}"), (FILE, text))
    return found.rules.destinations


def options(text: str, defaults: str = "{}") -> Options:
    """The options of a one-policy file under defaults."""
    (found,) = combined(("policy.yaml", f"defaults: {defaults}"), (FILE, text))
    return found.rules.options


def test_destinations_beyond_the_kernels_tables_are_refused() -> None:
    """Rows of all policies together are bounded, and the policy that goes beyond is named."""
    ports = ", ".join(map(str, range(1, 201)))
    hosts = ", ".join(f"{{to: 10.0.{n}.0/24, ports: [999], idle: 5}}" for n in range(163))
    text = f"destinations: [{{to: 10.0.0.0/8, ports: [{ports}], idle: 6}}, {hosts}]\nkeepalive: on"
    with pytest.raises(PolicyError) as raised:
        parser.combine([parser.parse(text.encode(), FILE)])
    assert str(raised.value) == (
        f"{FILE}:1: the destinations of policy app.service and of those read before make 32963"
        " rows, expected at most 32768"
    )
