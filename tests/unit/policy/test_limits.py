"""What users may have: the key `users`, and policies that have an owner."""

from __future__ import annotations

import pytest

from kabpf.errors import PolicyError
from kabpf.plan.automaton import Automaton
from kabpf.plan.resolve import resolve
from kabpf.plan.state import Cgroup
from kabpf.policy import parser
from kabpf.policy.model import Options, Policy, Range, Until

MAIN = "/etc/kabpf/policy.yaml"
THEIRS = "/run/kabpf/policy.d/user-1000-7.yaml"
DELEGATED = "/user.slice/app"
TREE = (
    Cgroup(1, 0, "/"),
    Cgroup(2, 1, "/user.slice"),
    Cgroup(7, 2, DELEGATED),
    Cgroup(8, 7, f"{DELEGATED}/inner"),
)


def owned(keepalive: str, id: int = 7) -> str:
    """What kabpf-request writes for user 1000."""
    return (
        f"select: [{{cgroup: {DELEGATED}}}]\nkeepalive: {keepalive}\n"
        f"until: {{cgroup: {DELEGATED}, id: {id}}}\nowner: 1000\n"
    )


def combined(*files: tuple[str, str]) -> tuple[Policy, ...]:
    return parser.combine([parser.parse(text.encode(), path) for path, text in files])


def names(policies: tuple[Policy, ...]) -> dict[str, str]:
    """The name of each cgroup's policy, of those that have one."""
    resolved = resolve(policies, Automaton(policies), TREE, 1 << 16).cgroups
    found = {each.path: resolved[each.id].policy for each in TREE}
    return {path: policy.name for path, policy in found.items() if policy}


def test_owned_policy_says_whose_it_is() -> None:
    """The cgroup with which a policy ends, and its owner, are read as they are written."""
    (policy,) = combined((THEIRS, owned("{idle: 60}")))
    assert (policy.until, policy.owner) == (Until(DELEGATED, 7), 1000)


def test_owned_policy_is_for_its_cgroup_and_below() -> None:
    """It holds for the cgroup that it names, and for what is below."""
    policies = combined((THEIRS, owned("{idle: 60}")))
    assert names(policies) == dict.fromkeys((DELEGATED, f"{DELEGATED}/inner"), "user-1000-7")


def test_owned_policy_is_not_for_another_cgroup_at_its_path() -> None:
    """A cgroup that was made at the path after the other was gone has nothing of it."""
    assert names(combined((THEIRS, owned("{idle: 60}", id=6)))) == {}


def test_owned_policy_makes_no_rule_for_new_cgroups() -> None:
    """Its path takes no room among the rules for new cgroups, however deep it is."""
    policies = combined((THEIRS, owned("{idle: 60}")))
    assert Automaton(policies).table(1 << 16) == Automaton(()).table(1 << 16)


@pytest.mark.parametrize(
    "selector",
    [
        "cgroup: /user.slice/app",
        'cgroup: "/user.slice/*"',
        'cgroup: "/**"',
        "cgroup: /user.slice/a*",
    ],
)
def test_administrators_selector_of_any_kind_beats_an_owned_policy(selector: str) -> None:
    """Where a file of the administrator names the cgroup, the owner's policy does not count."""
    theirs = (THEIRS, owned("{idle: 60}"))
    own = (MAIN, f"policies: {{ours: {{select: [{{{selector}}}], keepalive: on}}}}")
    assert names(combined(own, theirs))[DELEGATED] == "ours"
    assert names(combined(theirs, own))[DELEGATED] == "ours"


def test_administrators_policy_holds_below_an_owned_one() -> None:
    """A cgroup below that the administrator names has the administrator's policy."""
    own = f"policies: {{ours: {{select: [{{cgroup: {DELEGATED}/inner}}], keepalive: on}}}}"
    found = names(combined((MAIN, own), (THEIRS, owned("{idle: 60}"))))
    assert found == {DELEGATED: "user-1000-7", f"{DELEGATED}/inner": "ours"}


def test_owned_policy_beats_what_is_inherited() -> None:
    """A policy of the administrator for a cgroup above does not reach the owner's."""
    own = "policies: {ours: {select: [{cgroup: /user.slice}], keepalive: on}}"
    found = names(combined((MAIN, own), (THEIRS, owned("off"))))
    assert found["/user.slice"] == "ours"
    assert found[DELEGATED] == "user-1000-7"


@pytest.mark.parametrize(
    ("users", "keepalive", "counts"),
    [
        ("on", "{idle: 1, interval: 1, probes: 1, user_timeout: 1ms}", True),
        ("off", "{idle: 60}", False),
        ("off", "off", False),
        ("{idle: 10s..2h}", "{idle: 10}", True),
        ("{idle: 10s..2h}", "{idle: 7200}", True),
        ("{idle: 10s..2h}", "{idle: 9}", False),
        ("{idle: 10s..2h}", "{idle: 7201}", False),
        ("{idle: 10s..2h}", "{interval: 1}", True),
        ("{idle: 10s..2h}", "off", True),
        ("{probes: 3..9}", "{probes: 2}", False),
        ("{user_timeout: 10s..1h}", "{user_timeout: 9999ms}", False),
        ("{user_timeout: 10s..1h}", "{user_timeout: off}", True),
        ("{interval: 5}", "{interval: 5}", True),
        ("{interval: 5}", "{interval: 6}", False),
    ],
)
def test_bounds_decide_which_owned_policies_count(users: str, keepalive: str, counts: bool) -> None:
    """An owned policy that `users` does not let its owner have is as if it were not there."""
    found = combined((MAIN, f"users: {users}"), (THEIRS, owned(keepalive)))
    assert bool(found) == counts


def test_bounds_are_not_for_the_administrator() -> None:
    """The administrator's own policies are not measured by them, nor are defaults by themselves."""
    main = "users: {idle: 10s..2h}\ndefaults: {idle: 5s}\npolicies: {a: {select: [{cgroup: /a}], "
    found = combined((MAIN, f"{main}keepalive: {{idle: 3}}}}}}"), (THEIRS, owned("on")))
    assert [policy.name for policy in found] == ["a", "user-1000-7"]


def test_last_word_on_users_counts() -> None:
    """Of several files that say what users may have the one read last counts, whole."""
    files = ((MAIN, "users: {idle: 10s..2h}"), ("/etc/kabpf/policy.d/a.yaml", "users: on"))
    assert len(combined(*files, (THEIRS, owned("{idle: 5}")))) == 1


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (MAIN, "users: yes", "1: users: yes, expected on, off, or bounds (idle: 10s..2h)"),
        (MAIN, "users: [a]", "1: users: a list, expected on, off, or bounds (idle: 10s..2h)"),
        (MAIN, "users: {jitter: 5%}", "1: users.jitter: unknown key, expected one of idle"),
        (MAIN, "users: {user_timeout: auto}", "1: users.user_timeout: auto, expected bounds"),
        (MAIN, "users: {idle: 2h..10s}", "1: users.idle: 2h..10s, expected the lower bound first"),
        (MAIN, "users: on\nkeepalive: on", "1: users: beside keepalive, expected a file of"),
        ("/etc/kabpf/policy.d/a.yaml", owned("on"), "3: until: unknown key"),
        (MAIN, "policies: {a: {owner: 1, keepalive: on}}", "1: policies.a.owner: unknown key"),
        (THEIRS, "select: [{cgroup: /a}]\nkeepalive: on\nowner: 1", "3: owner: without until"),
        (THEIRS, owned("on", id=1 << 64), "3: until.id: 18446744073709551616, expected a cgroup's"),
        (THEIRS, owned("on").replace(", id: 7", ""), "3: until: no id, expected cgroup and id"),
        (THEIRS, owned("on").replace("1000", "-1"), "4: owner: -1, expected a user's id"),
        (THEIRS, owned("on").replace("1000", "4294967295"), "4: owner: 4294967295, expected"),
    ],
)  # fmt: skip
def test_wrong_word_on_users_is_refused(path: str, text: str, message: str) -> None:
    """What is wrong is said with its place; who owns a policy is said in /run/kabpf alone."""
    with pytest.raises(PolicyError) as raised:
        combined((path, text))
    assert str(raised.value).startswith(f"{path}:{message}")


def test_owned_policy_says_all_of_it() -> None:
    """Defaults that are written later do not change what a user has, nor make it wrong."""
    (policy,) = combined((MAIN, "defaults: {idle: 30s..5m}"), (THEIRS, owned("{interval: 10}")))
    assert policy.rules.options == Options(interval_s=Range(10, 10))
