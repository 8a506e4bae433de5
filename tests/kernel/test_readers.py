"""Commands that only read, beside commands that change what they read."""

import itertools
import os
import subprocess
import threading
import time
from collections import Counter

import pytest
from harness import BIN, PATIENCE, path_of, wait_until

from kabpf.apply.transient import TRANSIENT

SECONDS = float(os.environ.get("KABPF_STRESS_SECONDS", "8"))
POLICY = "select: [{{cgroup: {}}}]\nkeepalive: {{idle: 61}}\n"


@pytest.fixture
def beside(make_cgroup, write_policy, kabpfctl):
    """Starts commands in a loop that run others, attach and detach, until the test is over; the
    failures of those."""
    done = threading.Event()
    failures = Counter()

    def loop(*commands):
        for command in itertools.cycle(commands):
            if done.is_set():
                return
            ended = subprocess.run([BIN / "kabpfctl", *command], capture_output=True, text=True)
            if ended.returncode:
                failures[command[0], ended.stderr] += 1

    attached = ["--cgroup", make_cgroup("attached")]
    write_policy("a.yaml", POLICY.format(path_of(make_cgroup("covered"))))
    kabpfctl("apply")
    threads = [
        threading.Thread(target=loop, args=commands)
        for commands in (
            [["run", "--idle", "5", "true"]],
            [["run", "--idle", "6", "true"]],
            [["attach", *attached, "--idle", "7"], ["detach", *attached]],
        )
    ]
    for thread in threads:
        thread.start()
    yield failures
    done.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: not list(TRANSIENT.glob("*")), "the end of the commands' policies")


READERS = (
    ("plan",),
    ("status",),
    ("check",),
    ("explain", "kabpf-*"),
    ("run", "--policy", "a", "true"),
    ("doctor",),
    ("sockets",),
    ("apply",),  # which a reload is, and reads all of it first
)


def test_readers_see_one_consistent_state(beside, make_cgroup, run_kabpfctl):
    """None of them fails, and status finds the files active, as each command has made them so."""
    deadline = time.monotonic() + SECONDS * PATIENCE
    ended = Counter()
    for command in itertools.cycle(READERS):
        if time.monotonic() > deadline and len(ended) >= len(READERS):
            break
        done = run_kabpfctl(*command)
        is_wrong = "changed since" in done.stdout if command == ("status",) else False
        said = done.stderr or "changed since" if done.returncode or is_wrong else ""
        ended[command[0], done.returncode, said] += 1
    assert {status for _, status, _ in ended} == {0}
    assert not [said for _, _, said in ended if said]
    assert not beside
