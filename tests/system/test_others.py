"""Other people's tests come to the same under every kind of policy as without kabpf.

tests/others/run runs them, each night and before a release: hours."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import machine as machines
import pytest
import suites
import trees
from harness import beside_others
from machine import Machine

pytestmark = pytest.mark.others

SELECT = f"select: [{{unit: {suites.UNIT}}}]\n"
VALUES = (
    "keepalive: {idle: 61, interval: 7, probes: 5, user_timeout: auto, jitter: 10%,"
    " syn_retries: 3, connect_timeout: 30s}\n"
)
RANGES = (
    "keepalive: {idle: 30s..5m, interval: 5s..75s, probes: 3..9, user_timeout: 60s..5m,"
    " syn_retries: 3, connect_timeout: 30s}\n"
)
POLICIES = {
    "fill": f"{VALUES}mode: fill\n",
    "override": f"{VALUES}mode: override\n",
    "enforce": f"{VALUES}mode: enforce\n",
    "range": RANGES,
    "out": f"{VALUES}mode: enforce\ndirection: out\n",
    "in": f"{VALUES}mode: enforce\ndirection: in\n",
    # Open sockets are updated all the time.
    "updated": f"{VALUES}mode: override\n",
}
# What has to be counted, at least once, for the sockets to have been covered. With jitter and by
# direction listeners get nothing, as what they accept would be alike.
COUNTED = {
    "range": ("established", "listening"),
    "updated": ("established", "updated"),
}
# Tests that set keepalive options and read them back (Go 1.23 and later): where a policy has the
# last word they have to fail, by the direction of the connection whose options they read.
READ_BACK = {
    "net:TestTCPConnKeepAliveConfig": ("enforce", "range", "out"),
    "net:TestTCPConnKeepAliveConfigDialer": ("enforce", "range", "out"),
    "net:TestTCPConnKeepAliveConfigListener": ("enforce", "range", "in"),
}
Boot = Callable[[], AbstractContextManager[Machine]]
AGAIN = 3  # times that a test runs which came to something else
REPORT = Path(os.environ.get("KABPF_OTHERS", "build/others.jsonl"))


@pytest.fixture(scope="session")
def without(suite: str, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """Boots a machine without kabpf, which nobody has to mind."""

    @contextmanager
    def boot() -> Iterator[Machine]:
        directory = tmp_path_factory.mktemp("machine") / "machine"
        with Machine([trees.others(suite)], directory) as machine:
            yield machine

    return boot


@pytest.fixture(scope="session")
def covered(suite: str, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """Boots a machine with kabpf."""
    tree = trees.others(suite)
    install = ("apt-get", "--yes", "--no-install-recommends", "install", f"/mnt/{package.name}")
    with beside_others():
        layer = machines.layer([tree], tmp_path_factory.mktemp("layer"), [package], *install)

    @contextmanager
    def boot() -> Iterator[Machine]:
        directory = tmp_path_factory.mktemp("machine") / "machine"
        with beside_others(), Machine([layer, tree], directory) as machine:
            yield machine

    return boot


@pytest.fixture(scope="session", params=[*suites.SUITES])
def expected(
    request: pytest.FixtureRequest, suite: str, without: Boot
) -> tuple[str, suites.Results]:
    """A test suite, and what its tests come to without kabpf."""
    with without() as machine:
        results = suites.SUITES[request.param](machine)
    assert Counter(results.values())["passed"] > 100, results
    _report(suite, request.param, "without", results)
    return request.param, results


@pytest.mark.parametrize("policy", [*POLICIES])
def test_results_are_the_same(
    suite: str,
    expected: tuple[str, suites.Results],
    without: Boot,
    covered: Boot,
    policy: str,
) -> None:
    """The same tests pass, fail and are skipped, but for those of READ_BACK; and the policy covered
    their sockets. A test that comes to something else runs again, with kabpf and without; it is
    unsteady, and reported, where that comes to both."""
    name, without_kabpf = expected
    fail = {one for one, policies in READ_BACK.items() if policy in policies} & without_kabpf.keys()
    before = {**without_kabpf, **dict.fromkeys(fail, "failed")}
    run = suites.SUITES[name]
    with covered() as machine:
        machine.drop_in("others.yaml", SELECT + POLICIES[policy])
        counted: Counter[str] = Counter()
        with _updates(machine, counted) if policy == "updated" else nullcontext():
            found = run(machine)
        counted.update(_counters(machine))
        different = [
            one for one in before.keys() | found.keys() if before.get(one) != found.get(one)
        ]
        unsteady = _coming_to(run, machine, {one: before.get(one) for one in different})
    if left := {one: found.get(one) for one in different if one not in unsteady}:
        with without() as machine:
            unsteady |= _coming_to(run, machine, left)
    _report(suite, name, policy, found, unsteady=sorted(unsteady), counters=counted)
    for counter in COUNTED.get(policy, ("established",)):
        assert counted[counter] > 0, counted
    differ = {one: (before.get(one), found.get(one)) for one in different if one not in unsteady}
    assert differ == {}


def _coming_to(
    run: Callable[..., suites.Results], machine: Machine, wanted: dict[str, str | None]
) -> set[str]:
    """Those of some tests that come to what is wanted, all run together again and again."""
    found: set[str] = set()
    for _ in range(AGAIN):
        if left := wanted.keys() - found:
            results = run(machine, sorted(left))
            found |= {one for one in left if results.get(one) == wanted[one]}
    return found


def _counters(machine: Machine) -> dict[str, int]:
    (policy,) = json.loads(machine.run("kabpfctl", "status", "--json"))["policies"]
    return {name: count for name, count in policy["counters"].items() if name != "failed"}


@contextmanager
def _updates(machine: Machine, counted: Counter[str]) -> Iterator[None]:
    """While the block runs, open sockets get other values, again and again. Counters begin anew
    with each, and `counted` has their sums."""
    over = threading.Event()

    def update() -> None:
        idle = 61
        while not over.wait(0.5):
            idle = 123 - idle
            counted.update(_counters(machine))
            machine.write(
                "/etc/kabpf/policy.d/others.yaml",
                SELECT + POLICIES["updated"].replace("idle: 61", f"idle: {idle}"),
            )
            machine.run("kabpfctl", "apply")

    thread = threading.Thread(target=update)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report(suite: str, name: str, policy: str, results: suites.Results, **more: object) -> None:
    counts = Counter(results.values())
    line = {"debian": suite, "tests": name, "policy": policy, **counts, **more}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with REPORT.open("a") as file:
        file.write(json.dumps(line) + "\n")
