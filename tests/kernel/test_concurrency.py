"""Many commands at once, beside kabpfd, with cgroups that come and go."""

import json
import os
import random
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

from harness import BIN, PATIENCE, PINS, UNTOUCHED, cgroup_root, known_cgroups, path_of, wait_until

SECONDS = float(os.environ.get("KABPF_STRESS_SECONDS", "8"))
WORKERS = max(10, int(50 / PATIENCE))
VERBS = {"attach", "detach", "apply"}
EXPECTED = (
    "expected a directory below",  # gone before it was looked at
    "was removed while being attached",
    "is not attached",
)


class Worker(threading.Thread):
    """Attaches and detaches one cgroup, which it removes and makes again, and applies."""

    def __init__(self, number, cgroup, deadline, results):
        super().__init__()
        self.cgroup, self.deadline, self.results = cgroup, deadline, results
        self.random = random.Random(number)
        self.idle = None  # what the cgroup is attached with

    def run(self):
        while not self._is_enough():
            turn = self.random.random()
            if turn < 0.45:
                idle = self.random.randint(100, 200)
                if self._kabpfctl("attach", "--cgroup", self.cgroup, "--idle", idle):
                    self.idle = idle
            elif turn < 0.75:
                if self._kabpfctl("detach", "--cgroup", self.cgroup):
                    self.idle = None
            elif turn < 0.9:
                self._kabpfctl("apply")
            else:
                self.cgroup.rmdir()
                if self.random.random() < 0.5:  # attached by its path while it is not there
                    self._kabpfctl("attach", "--cgroup", self.cgroup, "--idle", 99)
                self.cgroup.mkdir()

    def _is_enough(self):
        """On a slow machine it takes longer until each verb was done once."""
        late_s = time.monotonic() - self.deadline
        return late_s >= 60 * PATIENCE or (late_s >= 0 and _done(self.results) == VERBS)

    def _kabpfctl(self, *arguments):
        command = [BIN / "kabpfctl", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        self.results.append((arguments[0], done.returncode, done.stderr))
        return done.returncode == 0


def _done(results):
    return {verb for verb, status, _ in results if not status}


def test_many_commands_at_once_end_as_the_files_say(make_cgroup, write_policy, kabpfd, peer):
    """Each attached cgroup has its options and each detached one has none, the runtime files are
    those of the attached ones, and kabpfd runs still; every refusal is of a cgroup that is gone."""
    top = make_cgroup()
    write_policy("g.yaml", f'select: [{{cgroup: "{path_of(top)}/g-*"}}]\nkeepalive: {{idle: 61}}\n')
    daemon = kabpfd()
    results = []
    deadline = time.monotonic() + SECONDS
    workers = [
        Worker(number, make_cgroup(f"w-{number}"), deadline, results) for number in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    unexpected = Counter(
        (verb, status, message)
        for verb, status, message in results
        if status and not (status == 1 and any(each in message for each in EXPECTED))
    )
    assert not unexpected
    assert _done(results) == VERBS
    assert "active, covering" in daemon.reload()
    applied = subprocess.run([BIN / "kabpfctl", "apply", "--json"], capture_output=True, text=True)
    assert not any(json.loads(applied.stdout)["changes"].values())

    _, address = peer().listener()
    client = peer()
    for worker in [*workers, None]:
        cgroup = worker.cgroup if worker else make_cgroup("g-1")
        idle = worker.idle if worker else 61
        (cgroup / "cgroup.procs").write_text(str(client.process.pid))
        number = client.connection(address)
        if not worker:
            assert client.wait_for_keepalive(number) is not None
        expected = UNTOUCHED | {"keepalive": 1, "idle": idle} if idle else UNTOUCHED
        assert client.options(number) == expected
    names = {f"zz-attach-{path_of(one.cgroup)[1:]}" for one in workers if one.idle}
    files = {path.stem.replace("\\x2d", "-") for path in Path("/run/kabpf/policy.d").iterdir()}
    assert files == {name.replace("/", "-") for name in names}
    ids = {os.stat(directory).st_ino for directory, _, _ in os.walk(cgroup_root())}
    assert {worker.cgroup.stat().st_ino for worker in workers} <= known_cgroups()
    wait_until(lambda: not known_cgroups() - ids, "the kernel to release the cgroups")
    subprocess.run([BIN / "kabpfctl", "detach", "--all"], check=True, capture_output=True)
    assert not PINS.exists()
    assert daemon.stop() == 0
