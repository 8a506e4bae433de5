"""What the bcc loader can't do is refused by name, with file and line, and nothing else is."""

from __future__ import annotations

import pytest

from kabpf.errors import PolicyError
from kabpf.policy import btf_required, parser

FILE = "/etc/kabpf/policy.d/app.yaml"
SELECT = "select: [{cgroup: /app}]\n"

# A file's text, and the messages: line, what, and what was expected.
REFUSED = [
    (
        "select: [{unit: nginx.service}]\nkeepalive: on\n",
        [(1, "unit: nginx.service", "cgroup: with the whole path")],
    ),
    (
        "select:\n  - cgroup: /a/*\n  - cgroup: /b\n  - user_unit: s.service\nkeepalive: on\n",
        [
            (2, "cgroup: /a/*", "cgroup: with the whole path"),
            (4, "user_unit: s.service", "cgroup: with the whole path"),
        ],
    ),
    (
        f"{SELECT}keepalive: on\nmode: enforce\n",
        [(3, "mode: enforce", "fill or override")],
    ),
    (
        f"{SELECT}keepalive: on\nexisting: true\n",
        [(3, "existing: true", "existing: false, or the key left out")],
    ),
    (
        f"{SELECT}keepalive: on\nlog: sockets\n",
        [(3, "log: sockets", "log: off")],
    ),
    (
        f"{SELECT}keepalive:\n  idle: 30s..5m\n  interval: 9\n  probes: 3..9\n"
        "  user_timeout: auto\n",
        [(3, "idle: the range 30..300", "one value"), (5, "probes: the range 3..9", "one value")],
    ),
    (
        f"{SELECT}keepalive: on\ndestinations: [{{to: 10.0.0.0/8, idle: 1..2}}]\n",
        [(1, "idle: the range 1..2 to 10.0.0.0/8", "one value")],
    ),
    (
        f"{SELECT}keepalive:\n  idle: 30\n  connect_timeout: 10s\n"
        "destinations: [{to: 10.0.0.0/8, idle: 9}, {to: '::1', connect_timeout: off}]\n",
        [(4, "connect_timeout", "syn_retries in its place")],
    ),
    (
        f"{SELECT}keepalive: on\ndestinations: [{{to: 10.0.0.0/8, connect_timeout: 9}}]\n",
        [(1, "connect_timeout to 10.0.0.0/8", "syn_retries in its place")],
    ),
    (
        f"{SELECT}keepalive: {{idle: 30..60}}\ndestinations: [{{to: 10.0.0.0/8, probes: 3}}]\n",
        [(2, "idle: the range 30..60", "one value")],
    ),
]

TAKEN = [
    "keepalive: on\n",
    "keepalive: off\nmode: override\nexisting: false\n",
    "keepalive: {idle: 60, interval: 10, probes: 6, user_timeout: auto, jitter: 10%}\n",
    "keepalive: {preset: aws-nlb, syn_retries: 3}\ndirection: out\nloopback: false\nlog: off\n",
    "keepalive: on\ndestinations: [{to: 10.0.0.0/8, ports: [5432], idle: 60s}]\n",
]


def policies(text, file=FILE):
    return parser.combine([parser.parse(text.encode(), file)])


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_what_takes_btf_is_refused_by_name(text, expected):
    """Each thing that needs BTF is one message: where, what, and what was expected."""
    with pytest.raises(PolicyError) as refused:
        btf_required.require(policies(text))
    assert refused.value.findings == tuple(
        f"{FILE}:{line}: {what} needs BTF, which the bcc loader does without, expected {instead}"
        for line, what, instead in expected
    )


def test_policy_of_a_user_is_refused_as_such():
    """What the service that wrote it has put into it is not the user's, nor what to mend."""
    file = "/run/kabpf/policy.d/user-1000-7.yaml"
    text = f"{SELECT}keepalive: on\nexisting: true\nuntil: {{cgroup: /app, id: 7}}\nowner: 1000\n"
    with pytest.raises(PolicyError) as refused:
        btf_required.require(policies(text, file))
    assert str(refused.value) == (
        f"{file}:1: a policy of uid 1000 needs BTF, which the bcc loader does without,"
        " expected policies of root alone (kabpfctl detach)"
    )


@pytest.mark.parametrize("text", TAKEN)
def test_the_rest_is_taken(text):
    """What the bcc loader can do is not refused."""
    btf_required.require(policies(f"{SELECT}{text}"))
