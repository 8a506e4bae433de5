"""What it is all for: a peer that is gone is noticed."""

import subprocess
import time

import pytest
from harness import PATIENCE

DROP = """
table inet kabpf_test {
    chain input { type filter hook input priority 0; tcp dport 9000 drop; }
}
"""


@pytest.mark.loaders
def test_dead_peer_is_detected_in_idle_plus_interval_times_probes(
    cgroup, other_cgroup, peer, kabpfctl, namespace
):
    """With idle 2 s, interval 1 s and 3 probes a reader sees ETIMEDOUT after about 5 s, while one
    without kabpf waits on."""
    server = peer(None, namespace)
    listener = server.open_socket(2)
    address = server.listen(listener, ["127.0.0.1", 9000])
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 2, "--interval", 1, "--probes", 3)
    covered, plain = peer(cgroup, namespace), peer(other_cgroup, namespace)
    begun = time.monotonic()
    numbers = [one.connection(address) for one in (covered, plain)]
    command = ["ip", "netns", "exec", namespace, "nft", "-f", "-"]
    subprocess.run(command, input=DROP, text=True, check=True)
    covered.tell("receive", numbers[0], 15)
    plain.tell("receive", numbers[1], 8)
    assert covered.answer() == "ETIMEDOUT"
    assert 5 <= time.monotonic() - begun <= 5 + 2 * PATIENCE
    assert plain.answer() == "waiting"
