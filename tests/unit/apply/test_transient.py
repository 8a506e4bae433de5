"""The drop-ins of `kabpfctl run`: how they are spelled, and which policy they make."""

from __future__ import annotations

from ipaddress import IPv6Network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as any_

from kabpf.apply import transient
from kabpf.commands import explain
from kabpf.errors import RefusedError
from kabpf.plan.automaton import Automaton
from kabpf.plan.resolve import resolve
from kabpf.plan.state import Cgroup, record
from kabpf.policy import parser
from kabpf.policy.files import FILE_SIZE_MAX
from kabpf.policy.model import (
    Destination,
    Direction,
    Mode,
    Options,
    Policy,
    Range,
    Rules,
    Selector,
    Until,
)
from kabpf.policy.yaml import Source

MAIN = "/etc/kabpf/policy.yaml"
NAME = "kabpf-run-12-0123abcd"
PATH = f"/system.slice/{NAME}.scope"
FILE = str(transient.drop_in(NAME))
TREE = (
    Cgroup(1, 0, "/"),
    Cgroup(2, 1, "/system.slice"),
    Cgroup(7, 2, PATH),
    Cgroup(8, 7, f"{PATH}/inner"),
)

seconds = any_.integers(1, 32767)
ranges = any_.tuples(seconds, seconds).map(lambda pair: Range(*sorted(pair)))
options = any_.builds(
    Options,
    any_.just(True),
    *(any_.none() | bounds for bounds in (ranges, ranges)),
    any_.none() | any_.integers(1, 127).map(Range.exactly),
    any_.none() | ranges,
    any_.integers(0, 50),
    any_.none() | any_.integers(1, 127),
    any_.none(),
)


def made(rules: Rules, path: str = PATH, *, log: bool = False) -> Policy:
    """The policy that `run` activates."""
    source = Source(FILE, 1)
    select = (Selector("cgroup", path, source),)
    return Policy(NAME, select, rules, source, existing=False, log=log, until=Until(path, 7))


def read(policy: Policy, *files: tuple[str, bytes]) -> Policy:
    """The policy of its drop-in beside other files."""
    parsed = [parser.parse(text, path) for path, text in (*files, (FILE, transient.text(policy)))]
    (found,) = (each for each in parser.combine(parsed) if each.name == NAME)
    return found


@given(
    options,
    any_.sampled_from(Mode),
    any_.sampled_from(Direction),
    any_.booleans(),
    any_.booleans(),
)
def test_drop_in_says_what_is_active(
    options: Options, mode: Mode, direction: Direction, loopback: bool, log: bool
) -> None:
    """The next look at the policy files finds the policy that `run` has activated, and so has
    nothing to change."""
    policy = made(Rules(options, mode, direction, loopback), log=log)
    found = read(policy)
    assert (found.until, found.owner) == (policy.until, None)
    assert record(found) == record(policy)


@given(options, any_.lists(any_.just(Options(keepalive=False)) | options, min_size=1, max_size=3))
def test_drop_in_says_what_destinations_have(own: Options, others: list[Options]) -> None:
    """Destinations have what they have in the policy that was named."""
    for each in others:
        # A destination has all that its policy has, as parser.combine() made it.
        for key in ("idle_s", "interval_s", "probes", "syn_retries"):
            assume(getattr(each, key) or not getattr(own, key) or not each.keepalive)
    destinations = tuple(
        Destination(IPv6Network((f"2001:db8:{number:x}::", 48)), (5432,) * (number % 2), each)
        for number, each in enumerate(others)
    )
    policy = made(Rules(own, destinations=destinations))
    assert read(policy).rules.destinations == destinations


def test_policy_files_defaults_have_no_part() -> None:
    """What `run` leaves out is the system's, whatever the administrator's defaults are."""
    defaults = b"defaults: {idle: 10, interval: 5, user_timeout: auto, probes: 3, jitter: 5%}"
    policy = made(Rules(Options(idle_s=Range.exactly(60))))
    assert read(policy, (MAIN, defaults)).rules == policy.rules


def test_policy_of_run_is_the_strongest() -> None:
    """It beats a selector that names its very path, and holds for what is below."""
    source = Source(MAIN, 1)
    named = Policy("named", (Selector("cgroup", PATH, source),), Rules(Options()), source)
    policies = (named, made(Rules(Options(keepalive=False))))
    resolved = resolve(policies, Automaton(policies), TREE, 1 << 16).cgroups
    assert [found.policy and found.policy.name for found in resolved.values()] == [
        None, None, NAME, NAME,
    ]  # fmt: skip
    (found,) = explain.decided(policies, [TREE[3]])
    assert found.policy and (found.policy.name, found.decided_at) == (NAME, PATH)
    assert [policy.name for policy, _ in found.beaten] == ["named"]


def test_policy_of_run_makes_no_rule_for_new_cgroups() -> None:
    """However many commands run, the rules for new cgroups stay the same."""
    policies = (made(Rules(Options())),)
    assert Automaton(policies).table(1 << 16) == Automaton(()).table(1 << 16)


def test_path_that_can_not_be_printed_is_refused() -> None:
    """What a policy file can't say is refused before anything is written."""
    with pytest.raises(RefusedError, match="expected a path that can be printed"):
        transient.text(made(Rules(Options()), "/a\nb"))


def test_drop_in_is_never_too_large_to_be_read() -> None:
    """A policy that makes too large a file is refused, as the file would be."""
    destination = Destination(IPv6Network("::/0"), (), Options())
    with pytest.raises(RefusedError, match=f"expected at most {FILE_SIZE_MAX}"):
        transient.text(made(Rules(Options(), destinations=(destination,) * 4096)))
