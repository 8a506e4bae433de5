"""Values that are longer than the page that a program sees, from memory that changes meanwhile.

What the policy looked at is what the kernel takes, whatever a second thread writes there and
whatever a program of others on the same hook has said before.
"""

import json
import socket
import subprocess

import pytest
from harness import entering

PAGE = 4096  # bytes
LONG = (PAGE + 1, 3 * PAGE)  # lengths that the kernel does not lend whole
FLIPS_MS = 300  # without the copy the second value is found within some of them

RANGES = "{idle: 30s..5m, interval: 5s..60s, probes: 2..5, user_timeout: 10s..120s}"
EXACT = "{idle: 61s, interval: 7s, probes: 4, user_timeout: 90s}"
# By the policy: an option, the two values that alternate, and those that may be found.
FLIPS = {
    "enforced idle": ("enforce", EXACT, socket.TCP_KEEPIDLE, (61, 9999), {61}),
    "enforced timeout": ("enforce", EXACT, socket.TCP_USER_TIMEOUT, (90_000, 0), {90_000}),
    "idle in a range": ("fill", RANGES, socket.TCP_KEEPIDLE, (40, 9999), {40, 300}),
    "probes in a range": ("fill", RANGES, socket.TCP_KEEPCNT, (3, 100), {3, 5}),
    # The first is no number of the kernel's, which says so of the copy.
    "invalid idle": ("fill", RANGES, socket.TCP_KEEPIDLE, (0, 9999), {300}),
}
QUICK = ("enforced idle", "idle in a range")


@pytest.fixture(params=["alone", "behind another program"])
def beside(request, make_cgroup, others_program):
    """Somebody else's program runs before, in half of the cases."""
    child = make_cgroup("covered/child")
    if request.param != "alone":
        others_program("passer.bpf.c", child, "setsockopt")
    return child


@pytest.mark.core
@pytest.mark.parametrize("length", [LONG[0], pytest.param(LONG[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FLIPS],
)
def test_value_that_was_looked_at_is_the_one_taken(policy, beside, peer, compiled, case, length):
    """A second thread changes the memory, time and again; the bounds hold."""
    mode, keepalive, option, values, allowed = FLIPS[case]
    policy(keepalive, f"mode: {mode}")
    _, (_, port) = peer().listener()
    command = [compiled("flipper.c", "-pthread"), port, socket.SOL_TCP, option, *values, length]
    done = subprocess.run(
        [str(word) for word in (*command, FLIPS_MS)],
        preexec_fn=entering(beside),
        capture_output=True,
        text=True,
        check=True,
    )
    # The range's upper bound is what an option has that nobody set.
    assert {int(word) for word in done.stdout.split()} <= allowed
    assert done.stdout


@pytest.mark.parametrize("length", LONG)
def test_long_value_is_seen_behind_another_program(policy, beside, peer, kabpfctl, length):
    """Ours judges the value, and counts it, also where the other one passed it on unseen."""
    policy(RANGES)
    _, address = peer().listener()
    client = peer(beside)
    number = client.connection(address)
    value = (15).to_bytes(4, "little") + bytes(length - 4)
    where = (socket.SOL_TCP, socket.TCP_KEEPIDLE)
    assert client.set_bytes(number, *where, value.hex()) == ""
    assert client.options(number)["idle"] == 30
    (status,) = json.loads(kabpfctl("status", "--json").stdout)["policies"]
    assert status["counters"]["clamped"] == 1
    invalid = bytes(length)
    assert client.set_bytes(number, *where, invalid.hex()) == "EINVAL"
