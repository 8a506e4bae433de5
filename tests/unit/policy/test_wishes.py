"""Options that a container asks for: what may be asked, and which policy that makes."""

from __future__ import annotations

import pytest

from kabpf.errors import PolicyError
from kabpf.policy import parser, wishes
from kabpf.policy.model import Mode, Options, Policy, Range, is_asked

MAIN = "/etc/kabpf/policy.yaml"


def combined(text: str, *later: str) -> tuple[Policy, ...]:
    files = [text, *later]
    return parser.combine([parser.parse(each.encode(), MAIN) for each in files])


def template(bounds: str) -> Policy:
    (found,) = combined(f"containers: {bounds}\n")
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("idle=60s,interval=10s,probes=6", "idle=60s,interval=10s,probes=6"),
        ("probes=6,idle=1m , interval = 10", "idle=60s,interval=10s,probes=6"),
        ("idle=32767", "idle=32767s"),
        ("user_timeout=1500ms", "user_timeout=1500ms"),
    ],
)
def test_same_values_make_the_same_policy(text: str, name: str) -> None:
    """However they are spelled; and the name says where it comes from, and what it is."""
    made = wishes.policy(text, template("on"))
    assert made.name == f"container:{name}"
    assert is_asked(made.name)
    assert made == wishes.policy(name, template("on"))


def test_wish_is_all_that_the_policy_gives() -> None:
    """What it leaves out stays as it is, whatever the defaults are; and applications' own values
    are kept."""
    (found,) = combined("defaults: {idle: 30s..1m, probes: 3}\ncontainers: on\n")
    made = wishes.policy("interval=10s", found)
    assert made.rules.options == Options(interval_s=Range.exactly(10))
    assert made.rules.mode == Mode.FILL
    assert made.origins["interval"].note == "the container asks for it"
    assert str(made.origins["interval"].source) == f"{MAIN}:2"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing, expected options such as idle=60s,interval=10s,probes=6"),
        ("60s", "60s, expected options such as idle=60s,interval=10s,probes=6"),
        ("idle=60s,", "idle=60s,, expected options such as idle=60s,interval=10s,probes=6"),
        ("jitter=10%", "jitter=10%, expected options such as idle=60s,interval=10s,probes=6"),
        ("idle=60s,idle=61s", "idle: given twice, expected each option once"),
        ("idle=", "idle: nothing, expected a time in seconds (60, 90s, 5m, 1h) or a range"),
        ("idle=10s..20s", "idle: 10s..20s, expected one value"),
        ("user_timeout=off", "user_timeout: off, expected one value"),
        ("idle=60..60", "idle: 60..60 is a range of one value, expected 60"),
        ("idle=\u0666\u0660", "idle: \u0666\u0660, expected a time in seconds"),
        ("IDLE=60", "IDLE=60, expected options such as"),
        ("idle=60;probes=6", "idle: 60;probes=6, expected a time in seconds"),
        ("idle=" + "9" * 200, f"idle: {'9' * 200}, expected a time in seconds"),
        ("idle=0", "idle: 0 is not in 1 to 32767 seconds"),
        ("idle=60\0", "idle: 60\0, expected a time in seconds"),
        ("idle=\udcff", "idle: \udcff, expected a time in seconds"),
        ("idle=" + "6" * 300, "305 characters, expected at most 256"),
        ("idle=10", f"idle: 10 s is not in 30..3600 s ({MAIN}:1)"),
        ("probes=21", f"probes: 21 is not in 2..20 ({MAIN}:1)"),
    ],
)
def test_what_is_no_wish_says_why(text: str, why: str) -> None:
    """A text that a stranger wrote, and one that asks for more than is allowed."""
    with pytest.raises(PolicyError) as raised:
        wishes.policy(text, template("{idle: 30s..1h, probes: 2..20}"))
    assert str(raised.value).startswith(why)
    assert "policy file" not in str(raised.value)  # which its author has none of


def test_containers_may_ask_only_where_a_file_says_so() -> None:
    """By default they may not, and the last file has the last word."""
    assert combined("defaults: {idle: 60}\n") == ()
    assert combined("containers: off\n") == ()
    assert combined("containers: on\n", "containers: off\n") == ()
    (found,) = combined("containers: off\n", "containers: {idle: 1m..2m}\n")
    assert found.wishes and found.wishes.bounds == {"idle": Range(60, 120)}
    assert found.is_of_containers and not found.selectors


@pytest.mark.parametrize("bounds", ["maybe", "{jitter: 10%}", "[]", '""', "{}"])
def test_bounds_are_checked_as_those_of_users_are(bounds: str) -> None:
    """Both have the same language."""
    found = []
    for key in ("users", "containers"):
        with pytest.raises(PolicyError) as raised:
            combined(f"{key}: {bounds}\n")
        found.append(str(raised.value).replace(key, "KEY"))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["container:", "container:idle=60s"])
def test_policy_of_a_file_has_no_name_of_theirs(name: str) -> None:
    """So that nobody takes one for the other."""
    with pytest.raises(PolicyError, match="begins with container:, expected another name"):
        combined(f'policies: {{"{name}": {{select: [{{unit: a.service}}], keepalive: on}}}}\n')
