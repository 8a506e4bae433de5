"""Cgroups that are made at full speed, while kabpfd is killed, reloaded and replaced by another
version: each first connection has the right options."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import time

from harness import PATIENCE, path_of, wait_until

SECONDS = float(os.environ.get("KABPF_STORM_SECONDS", 8 * PATIENCE))

# The idle time of cgroups by their names; None has keepalive off.
EXPECTED = {
    "literal": 61,
    "storm-unit.service": 62,
    "storm@1-main.service": 63,
    "worker-1": 64,
    "worker-a1.scope": 65,
    f"docker-{'0123456789abcdef' * 4}.scope": 66,
    "worker": None,
    "docker-1.slice": None,
}


def _policies(top, turn):
    """What stays as it is, and beside it what changes with each turn: rules that name nothing here,
    globs among them in two turns of three."""
    selectors = {
        61: {"cgroup": f"{top}/literal"},
        62: {"unit": "storm-unit.service"},
        63: {"unit": "storm@.service"},
        64: {"cgroup": f"{top}/worker-*"},
        65: {"cgroup": f"{top}/worker-a*.scope"},
        66: {"cgroup": f"{top}/**/docker-*.scope"},
        100 + turn: {"unit": f"other-{turn}.service"},
    }
    if turn % 3:
        selectors[99] = {"cgroup": f"{top}/{'x' * (turn % 7)}*-{turn}"}
    return json.dumps(
        {
            "policies": {
                f"p{idle}": {"select": [selector], "keepalive": {"idle": idle}}
                for idle, selector in selectors.items()
            }
        }
    )


def _make(top, address, stopped, found):
    """Makes one cgroup after the other, enters it and connects."""
    home, wrong = top / "home", collections.Counter()
    for done, (name, expected) in enumerate(itertools.cycle(EXPECTED.items())):
        if stopped.is_set():
            found.put((done, dict(wrong)))
            return
        (top / name).mkdir()
        (top / name / "cgroup.procs").write_text(str(os.getpid()))
        with socket.create_connection(address) as connection:
            is_on = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = connection.getsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE) if is_on else None
        (home / "cgroup.procs").write_text(str(os.getpid()))
        wait_until(lambda: _is_removed(top / name), "an empty cgroup")  # noqa: B023
        if idle != expected:
            wrong[f"{name}: {idle}"] += 1


def _is_removed(directory):
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def storm(top):
    """While the block runs, cgroups are made below `top` at full speed; given is how many, and the
    options of first connections that were wrong, once it has ended."""
    stopped, found = multiprocessing.Event(), multiprocessing.Queue()
    outcome = {}
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        maker = multiprocessing.Process(
            target=_make, args=(top, server.getsockname(), stopped, found)
        )
        drain = multiprocessing.Process(target=_accept, args=(server,))
        maker.start()
        drain.start()
        try:
            yield outcome
            stopped.set()
            outcome["done"], outcome["wrong"] = found.get(timeout=30 * PATIENCE)
        finally:
            maker.kill()
            drain.kill()
            maker.join()
            drain.join()


def test_births_in_a_storm_are_covered_from_their_first_connection(
    make_cgroup, write_policy, kabpfctl, kabpfd, version
):
    """Whatever kabpfd goes through meanwhile, none is late and none has others' options."""
    top = make_cgroup()
    make_cgroup("home")
    write_policy("p.yaml", _policies(path_of(top), 0))
    kabpfctl("apply")
    versions = [version(kind) for kind in ("this", "rebuilt", "relaid")]
    turns = 0
    with storm(top) as outcome:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline or turns < 6:
            turns += 1
            daemon = kabpfd(*versions[turns // 2 % 3].command("daemon"))
            write_policy("p.yaml", _policies(path_of(top), turns))
            if turns % 2:
                assert "error" not in daemon.reload()
            else:
                daemon.process.send_signal(signal.SIGHUP)
                time.sleep(turns % 8 / 20)
            daemon.stop(signal.SIGKILL)
    assert outcome["wrong"] == {}
    assert outcome["done"] > 100


def test_upgrade_from_the_former_layout_misses_no_birth(make_cgroup, write_policy, kabpfd, version):
    """While this version takes over from the last one with other maps, and that one from this,
    each new cgroup has its policy on its first connection."""
    top = make_cgroup()
    make_cgroup("home")
    write_policy("p.yaml", _policies(path_of(top), 0))
    versions = [version("former"), version("this")]
    versions[0].kabpfctl("apply")
    with storm(top) as outcome:
        for turn in range(1, 5):
            daemon = kabpfd(*versions[turn % 2].command("daemon"))
            write_policy("p.yaml", _policies(path_of(top), turn))
            assert "error" not in daemon.reload()
            daemon.stop(signal.SIGKILL)
    assert outcome["wrong"] == {}
    assert outcome["done"] > 100


def _accept(server):
    while True:
        server.accept()[0].close()
