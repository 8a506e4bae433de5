"""What an application asks for, under each mode and under ranges."""

import json
import subprocess

import pytest
from harness import entering, path_of

EXACT = "idle: 61s, interval: 11s, probes: 5, user_timeout: 90s"
RANGES = "idle: 30s..5m, interval: 10s..20s, probes: 3..6, user_timeout: 30s..2m"
MODES = ("fill", "override", "enforce")
POLICIES = {
    **{mode: (mode, EXACT) for mode in MODES},
    **{f"{mode} a range": (mode, RANGES) for mode in MODES},
}

# keepalive, idle, interval, probes, user timeout in ms
GIVEN = (1, 61, 11, 5, 90_000)  # what a policy gives where nobody asks
UPPER = (1, 300, 20, 6, 120_000)
OWN = (1, 15, 15, 9, 90_000)
LIMITED = (1, 30, 15, 6, 120_000)
HOURS = (1, 7200, 11, 5, 90_000)
OFF, UPPER_OFF = (0, *GIVEN[1:]), (0, *UPPER[1:])

# By what an application asks for, and whether before the connection or after: what it has then
# under each of POLICIES, in their order.
OUTCOMES = {
    # SO_KEEPALIVE, 15 s of idle and interval, 9 probes
    ("go", "after"): (OWN, OWN, GIVEN, LIMITED, LIMITED, LIMITED),
    ("go", "before"): (OWN, GIVEN, GIVEN, LIMITED, LIMITED, LIMITED),
    # SO_KEEPALIVE alone
    ("java", "after"): (GIVEN, GIVEN, GIVEN, UPPER, UPPER, UPPER),
    ("java", "before"): (GIVEN, GIVEN, GIVEN, UPPER, UPPER, UPPER),
    # SO_KEEPALIVE and two hours of idle
    ("hours", "after"): (HOURS, HOURS, GIVEN, UPPER, UPPER, UPPER),
    ("hours", "before"): (HOURS, GIVEN, GIVEN, UPPER, UPPER, UPPER),
    # SO_KEEPALIVE turned off; before the connection that is what every socket has
    ("off", "after"): (OFF, OFF, GIVEN, UPPER_OFF, UPPER_OFF, UPPER),
    ("off", "before"): (GIVEN, GIVEN, GIVEN, UPPER, UPPER, UPPER),
}

# How many of the application's calls were swallowed, how many limited to the range, and how many of
# its options were left when the connection was established.
COUNTED = {
    ("go", "after"): ((0, 0, 0), (0, 0, 0), (3, 0, 0), (0, 2, 0), (0, 2, 0), (0, 2, 0)),
    ("go", "before"): ((0, 0, 3), (0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1)),
    ("hours", "after"): ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ("hours", "before"): ((0, 0, 1), *[(0, 0, 0)] * 5),
    ("off", "after"): ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0), (0, 0, 0), (1, 0, 0)),
}


@pytest.fixture
def cgroup_under(make_cgroup, write_policy, kabpfctl):
    """Puts policies in force, each on a cgroup of its own; the cgroups by the policies' names."""

    def put(policies):
        cgroups = {name: make_cgroup(name.replace(" ", "-")) for name in policies}
        lines = ["policies:"]
        for name, (mode, options) in policies.items():
            select = f"[{{cgroup: {path_of(cgroups[name])}}}]"
            lines.append(f"  {name}: {{select: {select}, mode: {mode}, keepalive: {{{options}}}}}")
        write_policy("modes.yaml", "\n".join(lines))
        kabpfctl("apply")
        return cgroups

    return put


@pytest.fixture
def run(compiled, peer):
    """Runs programs/runtime.c at one end of a connection, peer.py at the other."""
    program = compiled("runtime.c")
    other = peer()
    _, (_, port) = other.listener()

    def options(cgroup, end, name, when):
        to = port if end == "connect" else 0
        with subprocess.Popen(
            [program, name, when, str(to)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=entering(cgroup),
        ) as process:
            if end == "accept":
                other.connection(["127.0.0.1", int(process.stdout.readline())])
            found = json.loads(process.stdout.readline())
        assert found.pop("refused") == 0
        return tuple(found.values())

    return options


@pytest.mark.parametrize(("name", "when"), OUTCOMES)
def test_what_an_application_asks_for_has_the_outcome_of_the_table(
    cgroup_under, run, kabpfctl, name, when
):
    """The calls of run-time libraries, on outgoing and on accepted connections, under each policy;
    what is done to them is counted."""
    cgroups = cgroup_under(POLICIES)
    expected = dict(zip(POLICIES, OUTCOMES[name, when], strict=True))
    assert {policy: run(cgroups[policy], "connect", name, when) for policy in POLICIES} == expected
    counted = _counted(kabpfctl)
    assert tuple(counted[policy] for policy in POLICIES) == COUNTED.get(
        (name, when), ((0, 0, 0),) * len(POLICIES)
    )
    assert {policy: run(cgroups[policy], "accept", name, when) for policy in POLICIES} == expected


def _counted(kabpfctl):
    """Swallowed, limited and left, by policy."""
    status = json.loads(kabpfctl("status", "--json").stdout)
    return {
        one["policy"]: tuple(one["counters"][name] for name in ("swallowed", "limited", "left"))
        for one in status["policies"]
    }
