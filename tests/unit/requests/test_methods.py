"""What users may ask: the table, what becomes of options, and any bytes at all.

KABPF_FUZZ is how many inputs each of the last two tests makes up; tests/fuzz/run has 100,000."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kabpf.errors import RefusedError
from kabpf.kernel import cgroups, mountinfo
from kabpf.plan.state import Cgroup
from kabpf.policy import parser
from kabpf.policy.model import Mode, Policy
from kabpf.policy.parser import PolicyFile
from kabpf.requests import access, methods, varlink
from kabpf.requests.access import TABLE, Role
from kabpf.requests.interface import INTERFACES
from kabpf.requests.methods import Request
from kabpf.requests.peercred import Peer
from kabpf.requests.varlink import Call, CallError

FUZZ = settings(
    max_examples=int(os.environ.get("KABPF_FUZZ", "300")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SOMEBODY = 4_242_424  # owns nothing on this machine
OWN = Cgroup(7, 0, '/user.slice/it"s\\own')
FILE = "/run/kabpf/policy.d/user-4242424-7.yaml"
EVERYBODY = {Role.ROOT, Role.OWNER, Role.STRANGER, Role.OUTSIDER}
PUBLIC = {"org.varlink.service.GetInfo", "org.varlink.service.GetInterfaceDescription"}


def test_table_says_who_may_call_what() -> None:
    """What the service is may be asked by everybody; policies are for owners and root."""
    found = {method: set(rule.callers) for method, rule in TABLE.items()}
    assert found == {
        **dict.fromkeys(PUBLIC, EVERYBODY),
        "io.kabpf.Attach": {Role.ROOT, Role.OWNER},
        "io.kabpf.Detach": {Role.ROOT, Role.OWNER},
    }


def test_table_has_the_methods_that_are_described() -> None:
    """Methods, their parameters, and which of them may be left out, are described as they are."""
    described = {}
    for interface, text in INTERFACES.items():
        for name, inside in re.findall(r"^method (\w+)\(([^)]*?)\) ->", unfolded(text), re.M):
            described[f"{interface}.{name}"] = dict(re.findall(r"(\w+): (\??)", inside))
    assert described == {
        method: {name: "" if name in rule.required else "?" for name in rule.types}
        for method, rule in TABLE.items()
    }


def unfolded(text: str) -> str:
    """An interface's description with its enumerations as one word."""
    return re.sub(r"\((\w+), (\w+)\)", "string", text)


@pytest.mark.parametrize(
    ("peer", "owner", "role"),
    [
        (Peer(0, True), 0, Role.ROOT),
        (Peer(0, True), 1000, Role.ROOT),
        (Peer(0, True), None, Role.ROOT),
        (Peer(1000, True), 1000, Role.OWNER),
        (Peer(1000, True), 0, Role.STRANGER),
        (Peer(1000, True), 1001, Role.STRANGER),
        (Peer(1000, True), None, Role.STRANGER),
        (Peer(0, False), 0, Role.OUTSIDER),
        (Peer(1000, False), 1000, Role.OUTSIDER),
        (Peer(65534, False), 65534, Role.OUTSIDER),
    ],
)
def test_caller_is_judged_by_uid_and_namespace(peer: Peer, owner: int | None, role: Role) -> None:
    """The owner is who has the directory's uid; nobody counts from another user namespace."""
    assert access.role(peer, owner) == role


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("io.kabpf.Unload", "MethodNotFound"),
        ("io.kabpf.attach.Attach", "InterfaceNotFound"),
        ("org.varlink.service.SetInfo", "MethodNotFound"),
        ("io.systemd.Manager.Reload", "InterfaceNotFound"),
    ],
)
@pytest.mark.parametrize("uid", [0, SOMEBODY])
def test_what_is_not_in_the_table_is_denied(uid: int, method: str, error: str) -> None:
    """Not even root may call it."""
    with pytest.raises(CallError) as raised:
        access.allowed(Call(method), Peer(uid, True))
    assert raised.value.name == f"org.varlink.service.{error}"


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "a", "./a", "/..", "/a/../b", "/a/./b", "//a", "/a//b", "/a/", "/a\0", "/a\nb"),
        *("/*", "/a?", "/[a]", "/\u202eb", "/" + "x" * 4096, "/sys/fs/../../../etc"),
        "/x" * 2045,  # with the tree's mount before it, too long for the kernel
    ],
)
def test_path_that_is_none_is_refused(path: str) -> None:
    """A path has to be spelled as it is: nothing is put right in it."""
    call = Call("io.kabpf.Attach", {"cgroup": path})
    with pytest.raises(CallError) as raised:
        access.allowed(call, Peer(SOMEBODY, True))
    assert raised.value.parameters == {"parameter": "cgroup"}


ASKED: list[tuple[dict[str, Any], str]] = [
    ({}, "on"),
    ({"keepalive": "off"}, "off"),
    ({"idle": "5m"}, "{idle: 300s}"),
    ({"idle": "60", "interval": "10s", "probes": "6"}, "{idle: 60s, interval: 10s, probes: 6}"),
    ({"user_timeout": "1500ms"}, "{user_timeout: 1500ms}"),
    ({"user_timeout": "off"}, "on"),
    (
        {"idle": "60", "interval": "10", "probes": "6", "user_timeout": "auto"},
        "{idle: 60s, interval: 10s, probes: 6, user_timeout: 120000ms}",
    ),
    ({"preset": "aws-nlb"}, "{idle: 175s, interval: 29s, probes: 5}"),
    ({"preset": "aws-nlb", "idle": "9"}, "{idle: 9s, interval: 29s, probes: 5}"),
]


@pytest.mark.parametrize(("asked", "written"), ASKED)
def test_options_are_written_as_numbers(asked: dict[str, Any], written: str) -> None:
    """What is asked for in words is written in numbers, so that nothing else can change them."""
    assert f"\nkeepalive: {written}\n" in drop_in(asked).decode()


DEFAULTS = "defaults: {idle: 30s..5m, interval: 5, probes: 4, jitter: 10%, syn_retries: 3}"


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({}, "{idle: 300s, interval: 5s, probes: 4, jitter: 10%}"),
        (
            {"idle": "60", "user_timeout": "auto"},
            "{idle: 60s, interval: 5s, probes: 4, user_timeout: 80000ms, jitter: 10%}",
        ),
        ({"idle": "60", "defaults": False}, "{idle: 60s}"),
        ({"defaults": False}, "on"),
        ({"keepalive": "off"}, "off"),
    ],
)
def test_defaults_are_taken_as_they_are(asked: dict[str, Any], written: str) -> None:
    """What a user leaves out comes from the defaults of now, of a range the upper bound; but no SYN
    retries, for which each connection of the machine is looked at."""
    defaults = parser.parse(DEFAULTS.encode(), "/etc/kabpf/policy.yaml")
    assert f"\nkeepalive: {written}\n" in drop_in(asked, [defaults]).decode()


@pytest.mark.parametrize(
    ("asked", "parameter"),
    [
        ({"idle": "0"}, "idle"),
        ({"idle": "30s..5m"}, "idle"),
        ({"idle": "60..60"}, "idle"),
        ({"idle": "60, x: y"}, "idle"),
        ({"probes": "3..9"}, "probes"),
        ({"probes": "9" * 5000}, "probes"),
        ({"user_timeout": "never"}, "user_timeout"),
        ({"preset": "aws-nlb}"}, "preset"),
        ({"keepalive": "enforce"}, "keepalive"),
        ({"keepalive": "off", "idle": "60"}, "keepalive"),
        ({"mode": "enforce"}, "mode"),
        ({"mode": "fill\nowner: 0"}, "mode"),
    ],
)
def test_option_that_users_may_not_have_is_refused(asked: dict[str, Any], parameter: str) -> None:
    """Wrong values are refused, and what costs others: enforce and ranges."""
    with pytest.raises(CallError) as raised:
        drop_in(asked)
    assert raised.value.parameters == {"parameter": parameter}


def test_auto_without_its_numbers_is_refused_in_words() -> None:
    """Where auto has nothing to be computed from the answer says what is missing."""
    with pytest.raises(CallError) as raised:
        drop_in({"idle": "60", "user_timeout": "auto"})
    reason = raised.value.parameters["reason"]
    assert reason.startswith("user_timeout: auto without interval, probes in the request")


@pytest.mark.parametrize(
    ("mode", "existing"), product(("fill", "override", None), (True, False, None))
)
def test_drop_in_says_what_was_asked_for(mode: str | None, existing: bool | None) -> None:
    """Mode and existing are the request's; whose it is and for which cgroup are the service's."""
    given = {"mode": mode, "existing": existing, "idle": "61"}
    policy = only_policy(drop_in({key: word for key, word in given.items() if word is not None}))
    assert policy.rules.mode == (mode or "fill")
    assert policy.existing == (existing is not False)
    assert (policy.owner, policy.until) == (SOMEBODY, (OWN.path, OWN.id))
    assert [(each.kind, each.text) for each in policy.selectors] == [("cgroup", OWN.path)]


@pytest.mark.parametrize(
    "message",
    [
        b"[" * varlink.MESSAGE_MAX,
        b"[{}," * (varlink.MESSAGE_MAX // 4),
        b'{"method":"io.kabpf.Attach","parameters":{"cgroup":[' + b"0," * 32_000 + b"0]}}",
        b'{"method":"io.kabpf.Attach","parameters":{' + b'"":{},' * 10_000 + b'"a":1}}',
        b'{"method":"io.kabpf.Attach","parameters":{"cgroup":"' + b"\\u0000" * 10_000 + b'"}}',
        b'"' + b'\\"' * (varlink.MESSAGE_MAX // 2 - 1) + b'"',
        b'"' * varlink.MESSAGE_MAX,
        b"9" * varlink.MESSAGE_MAX,
    ],
    ids=lambda message: f"{message[:20]!r}",
)
def test_memory_for_a_message_is_bounded(message: bytes) -> None:
    """What is made of the greatest message that is taken has no more than some megabytes."""
    answered(message, Peer(SOMEBODY, True))  # what is imported once
    tracemalloc.start()
    answered(message, Peer(SOMEBODY, True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


WORDS = [*TABLE["io.kabpf.Attach"].types, "interface", "owner", "jitter", "select"]
SAID = ["on", "off", "fill", "override", "enforce", "auto", "aws-nlb", "1..5", "60s", "6", "500ms"]
LETTERS = '/.a*[0é\U0001f600\ud800\0\n"\\{}:,#'


def value(choice: Random, depth: int = 0) -> Any:
    """A value of JSON, likely or not."""
    if depth < 3 and choice.random() < 0.2:
        if choice.random() < 0.5:
            return [value(choice, depth + 1) for _ in range(choice.randrange(4))]
        return {choice.choice(WORDS): value(choice, depth + 1) for _ in range(choice.randrange(4))}
    return choice.choice(
        [
            None,
            choice.random() < 0.5,
            choice.randrange(-10, 40_000),
            choice.randrange(1 << 70),
            choice.random(),
            float("nan"),
            *(choice.choice(SAID) for _ in range(6)),
            "".join(choice.choices(LETTERS, k=choice.randrange(12))),
        ]
    )


def likely(choice: Random, name: str) -> Any:
    """What a parameter of this name may be."""
    if choice.random() < 0.1:
        return value(choice)
    return choice.random() < 0.5 if name in ("defaults", "existing") else choice.choice(SAID)


def message(choice: Random) -> bytes:
    """A call that is right, nearly right, or damaged; or any bytes."""
    if choice.random() < 0.1:
        return choice.randbytes(choice.randrange(200))
    method = choice.choice([*TABLE, *TABLE, "io.kabpf.Unload"])
    known = list(TABLE[method].types) if method in TABLE and choice.random() < 0.8 else WORDS
    names = choice.choices([*known, "cgroup"], k=choice.randrange(6))
    parameters = {name: likely(choice, name) for name in names}
    if "cgroup" in known and choice.random() < 0.9:
        parameters["cgroup"] = choice.choice(PATHS)
    content = {"method": method, "parameters": parameters}
    if choice.random() < 0.2:
        content[choice.choice([*content, "oneway", "more", "upgrade", "sudo"])] = value(choice)
    text = json.dumps(content, ensure_ascii=choice.random() < 0.5)
    made = text.encode(errors="surrogatepass")
    for _ in range(choice.choice([0, 0, 0, 1, 2])):
        place = choice.randrange(len(made) + 1)
        damage = choice.randbytes(choice.randrange(4))
        made = made[:place] + damage + made[place + choice.randrange(4) :]
    return made


PATHS = ["/", *(each.path for each in cgroups.find_tree(mountinfo.own_mounts()).cgroups()[:50])]


@FUZZ
@given(st.integers(0, 1 << 64))
def test_any_bytes_are_refused_or_allowed_to_everybody(seed: int) -> None:
    """Who owns nothing gets nowhere by any message, but to what everybody may ask; and no message
    breaks the service."""
    choice = Random(seed)
    call = answered(message(choice), Peer(SOMEBODY, choice.random() < 0.5))
    assert call is None or call.method in PUBLIC


@FUZZ
@given(st.integers(0, 1 << 64))
def test_any_parameters_make_a_policy_for_that_cgroup_or_none(seed: int) -> None:
    """Whatever an owner asks for comes to one policy of theirs for that cgroup alone, in a file
    that is right, without what costs others; or to nothing."""
    choice, rule = Random(seed), TABLE["io.kabpf.Attach"]
    asked = {
        name: likely(choice, name) for name in choice.sample([*rule.types], choice.randrange(6))
    }
    call = Call("io.kabpf.Attach", {**asked, "cgroup": OWN.path})
    try:
        content = drop_in(varlink.checked(call, rule.types, rule.required))
    except CallError:
        return
    policy = only_policy(content)
    assert (policy.owner, policy.until) == (SOMEBODY, (OWN.path, OWN.id))
    assert [(each.kind, each.text) for each in policy.selectors] == [("cgroup", OWN.path)]
    assert policy.rules.mode != Mode.ENFORCE
    assert not policy.rules.destinations
    found = policy.rules.options
    ranges = (found.idle_s, found.interval_s, found.probes, found.user_timeout_ms)
    assert all(each.low == each.high for each in ranges if each)
    assert (found.jitter_percent, found.syn_retries) == (0, None)


def answered(message: bytes, peer: Peer) -> Call | None:
    """The call, if it is one and is allowed."""
    try:
        call = varlink.parse_call(message)
        access.allowed(call, peer)
    except (varlink.MessageError, CallError, RefusedError):
        return None
    return call


def drop_in(asked: dict[str, Any], parsed: list[PolicyFile] | None = None) -> bytes:
    return methods.drop_in(Request(SOMEBODY, OWN, asked), parsed or [])


def only_policy(content: bytes) -> Policy:
    (policy,) = parser.combine([parser.parse(content, FILE)])
    return policy
