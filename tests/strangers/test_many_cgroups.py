"""Cgroups by the thousand, with paths of 4 KB, which a user makes in a cgroup of theirs.

KABPF_STRANGERS_CGROUPS is how many."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import BIN, PATIENCE, PINS, UNTOUCHED, WATCHED, Peer, options_of_new, path_of
from measured import measured

from kabpf.apply.owned import BELOW_MAX
from kabpf.requests import varlink

POLICY_D = Path("/run/kabpf/policy.d")
COUNT = int(os.environ.get("KABPF_STRANGERS_CGROUPS", "5000"))

MAKE = """\
import os, sys
inside = os.open(sys.argv[1], os.O_RDONLY)
for _ in range(int(sys.argv[3])):
    os.mkdir("d" * 255, dir_fd=inside)
    inside = os.open("d" * 255, os.O_RDONLY, dir_fd=inside)
for number in range(int(sys.argv[2])):
    os.mkdir(f"{number}-".ljust(230, "x"), dir_fd=inside)
print("made", flush=True)
"""


@pytest.fixture
def make_many(python: Callable[..., Any]) -> Callable[..., None]:
    """Has the user make cgroups, `depth` names of 255 bytes below one."""

    def make(cgroup: Path, count: int, depth: int = 14) -> None:
        assert python(MAKE, cgroup, count, depth).stdout.readline() == b"made\n"

    return make


def taken(*command: object, **how: Any) -> tuple[float, int]:
    """What a command of root's takes: seconds of a processor, and MB."""
    status, seconds, memory = measured(*command, **how)
    assert status == 0
    return seconds, memory


def ask(method: str, cgroup: Path, **options: Any) -> tuple[dict[str, Any], float, int]:
    """What is answered to a request, and what that takes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(varlink.call(f"io.kabpf.{method}", {"cgroup": path_of(cgroup), **options}))
        ours.shutdown(socket.SHUT_WR)
        seconds, memory = taken(BIN / "kabpfd", "--request", stdin=theirs)
        answer: dict[str, Any] = json.loads(ours.recv(1 << 17).removesuffix(b"\0"))
    return answer, seconds, memory


def changed_by(kabpfctl: Any) -> set[int]:
    """How many policies, cgroups and others root's apply changes."""
    return {*json.loads(kabpfctl("apply", "--json").stdout)["changes"].values()}


def least(method: str, cgroup: Path, **options: Any) -> float:
    """The processor time of a request, of which other tests may disturb one or two."""
    found = []
    for number in range(3):
        if method == "Detach":
            ask("Attach", cgroup)
        else:
            options = {"idle": str(60 + number)}
        answer, seconds, _ = ask(method, cgroup, **options)
        assert "error" not in answer
        found.append(seconds)
    return min(found)


def test_request_does_not_look_at_others_cgroups(
    own: Path, make_cgroup: Callable[[str], Path], make_many: Callable[..., None], kabpfctl: Any
) -> None:
    """What a request takes does not grow with what others have made, in time or memory."""
    mine = make_cgroup("mine")
    kabpfctl("apply")
    before = {method: least(method, mine) for method in ("Attach", "Detach")}
    make_many(own, COUNT)
    after = {method: least(method, mine) for method in ("Attach", "Detach")}
    allowed = 0.05 + 10e-6 * COUNT  # to look at their entries; at their directories it were 100e-6
    for method in before:
        assert after[method] < before[method] + allowed * PATIENCE, (before, after)
    answer, _, memory = ask("Attach", mine)
    assert "error" not in answer
    assert memory < 60 * PATIENCE


def test_daemon_does_not_look_again_for_a_request(
    own: Path,
    make_cgroup: Callable[[str], Path],
    make_many: Callable[..., None],
    kabpfctl: Any,
    kabpfd: Any,
    peer: Callable[..., Peer],
) -> None:
    """kabpfd knows what a request has put in force, and looks at no cgroup for it."""
    mine = make_cgroup("mine")
    kabpfctl("apply")
    daemon = kabpfd()
    make_many(own, COUNT)
    before = _seconds(daemon.process.pid)
    for number in range(10):
        assert "error" not in ask("Attach", mine, idle=str(61 + number))[0]
        daemon.wait_for("1 policy active")
    took = _seconds(daemon.process.pid) - before
    assert took < 10 * (0.03 + 10e-6 * COUNT) * PATIENCE
    assert options_of_new(peer, mine)["idle"] == 70


def _seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_too_many_below_are_attached_before_they_are_made(
    own: Path, make_many: Callable[..., None], kabpfctl: Any, peer: Callable[..., Peer]
) -> None:
    """A cgroup with too many inside is not attached; one that is attached may have them, and its
    policy is changed and taken back all the same."""
    kabpfctl("apply")
    covered = own / "covered"
    covered.mkdir()
    for each in (own, covered):
        os.chown(each, 4242, 4242)
    answer, _, _ = ask("Attach", covered, idle="61")
    assert "error" not in answer
    make_many(covered, BELOW_MAX + 10, 1)
    inner = covered / ("d" * 255) / "7-".ljust(230, "x")
    assert options_of_new(peer, inner)["idle"] == 61
    answer, _, _ = ask("Attach", own, idle="63")
    assert answer["parameters"]["reason"] == (
        f"{path_of(own)} has more than {BELOW_MAX} cgroups inside;"
        " attach it before they are made, or ask an administrator"
    )
    assert options_of_new(peer, own) == UNTOUCHED
    assert "error" not in ask("Attach", covered, idle="62")[0]
    assert options_of_new(peer, inner)["idle"] == 62
    assert "error" not in ask("Detach", covered)[0]
    assert options_of_new(peer, inner) == UNTOUCHED


def test_inner_policy_gives_way_to_the_outer_one(
    own: Path, kabpfctl: Any, peer: Callable[..., Peer], write_policy: Any
) -> None:
    """Users' policies below one another: each is inherited as far as the next, and root's by a
    selector keep theirs."""
    inner = own / "inner"
    roots = inner / "roots"
    below = roots / "below"
    leaf = inner / "leaf"
    for each in (inner, roots, below, leaf):
        each.mkdir()
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(roots)}}}]\nkeepalive: {{idle: 99}}\n")
    kabpfctl("apply")

    def idles() -> list[int]:
        found = [options_of_new(peer, each) for each in (own, inner, leaf, roots, below)]
        return [each["idle"] if each["keepalive"] else 0 for each in found]

    assert idles() == [0, 0, 0, 99, 99]
    assert "error" not in ask("Attach", own, idle="61")[0]
    assert idles() == [61, 61, 61, 99, 99]
    assert "error" not in ask("Attach", inner, idle="62")[0]
    assert idles() == [61, 62, 62, 99, 99]
    assert "error" not in ask("Attach", own, idle="63")[0]
    assert idles() == [63, 62, 62, 99, 99]
    assert "error" not in ask("Detach", inner)[0]
    assert idles() == [63, 63, 63, 99, 99]
    assert "error" not in ask("Attach", inner, keepalive="off")[0]
    assert idles() == [63, 0, 0, 99, 99]
    assert "error" not in ask("Detach", own)[0]
    assert idles() == [0, 0, 0, 99, 99]
    assert "error" not in ask("Detach", inner)[0]
    # Nothing else is left for root to do.
    assert changed_by(kabpfctl) == {0}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("change", ["first", "again", "detach"])
def test_request_killed_at_each_step_is_finished_by_the_next(
    own: Path,
    make_cgroup: Callable[[str], Path],
    kabpfctl: Any,
    peer: Callable[..., Peer],
    change: str,
    count: int,
) -> None:
    """Whatever entries it had written, those of the whole subtree are right after the next request,
    of another cgroup, and there is nothing else for root's apply to do."""
    inside = [own, *(own / name for name in ("a", "b", "c"))]
    for each in inside[1:]:
        each.mkdir()
    kabpfctl("apply")
    if change != "first":
        assert "error" not in ask("Attach", own, idle="61")[0]
    method, options = ("Detach", {}) if change == "detach" else ("Attach", {"idle": "62"})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(varlink.call(f"io.kabpf.{method}", {"cgroup": path_of(own), **options}))
        ours.shutdown(socket.SHUT_WR)
        fault = {"KABPF_FAULT": f"write kabpf_cgroups, {count}"}
        command = [BIN / "kabpfd", "--request"]
        subprocess.run(command, stdin=theirs, env={**os.environ, **fault})
    assert "error" not in ask("Attach", make_cgroup("other"), idle="99")[0]
    expected = UNTOUCHED if change == "detach" else UNTOUCHED | {"keepalive": 1, "idle": 62}
    assert [options_of_new(peer, each) for each in inside] == [expected] * 4
    assert changed_by(kabpfctl) == {0}


def test_request_that_can_not_be_finished_is_taken_back(
    own: Path, make_cgroup: Callable[[str], Path], kabpfctl: Any, peer: Callable[..., Peer]
) -> None:
    """As where the kernel has no room for the cgroup of the one that was killed: others' requests
    go on, and root has nothing to do for it."""
    kabpfctl("apply")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(varlink.call("io.kabpf.Attach", {"cgroup": path_of(own), "idle": "62"}))
        ours.shutdown(socket.SHUT_WR)
        fault = {"KABPF_FAULT": "write kabpf_cgroups, 1"}
        command = [BIN / "kabpfd", "--request"]
        subprocess.run(command, stdin=theirs, env={**os.environ, **fault})
    key = own.stat().st_ino.to_bytes(8, "little")
    pinned = ["pinned", PINS / "kabpf_cgroups", "key", *map(str, key)]
    subprocess.run(["bpftool", "map", "delete", *pinned], check=True)
    other = make_cgroup("other")
    assert "error" not in ask("Attach", other, idle="99")[0]
    assert options_of_new(peer, other)["idle"] == 99
    assert [each.name for each in POLICY_D.glob("user-*")] == [f"user-0-{other.stat().st_ino}.yaml"]
    kabpfctl("apply")
    assert options_of_new(peer, own) == UNTOUCHED
    assert "error" not in ask("Attach", own, idle="62")[0]
    assert options_of_new(peer, own)["idle"] == 62


def test_attach_beside_mkdir_covers_what_is_born(
    own: Path, python: Callable[..., Any], kabpfctl: Any, peer: Callable[..., Peer]
) -> None:
    """Cgroups that are made while a request is at work have what it puts in force, or lifts."""
    code = (
        "import os, sys, time\n"
        "os.chdir(sys.argv[1])\n"
        "for number in range(3000):\n"
        "    os.makedirs(f'{number}/in/ner')\n"
        "print('made', flush=True)\n"
    )
    kabpfctl("apply")
    maker = python(code, own)
    deadline = time.monotonic() + 60 * PATIENCE
    for turn in range(1000):
        assert time.monotonic() < deadline
        ask("Detach" if turn % 2 else "Attach", own)
        if "made" in _said(maker):
            break
    assert changed_by(kabpfctl) == {0}


def _said(process: Any) -> str:
    os.set_blocking(process.stdout.fileno(), False)
    return (process.stdout.read() or b"").decode()


def test_commands_take_no_memory_for_long_paths(
    own: Path, make_many: Callable[..., None], write_policy: Any, kabpfctl: Any, kabpfd: Any
) -> None:
    """Paths are kept as name and parent, and printed one after the other."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(own)}}}]\nkeepalive: on\n")
    kabpfctl("apply")
    daemon = kabpfd(*WATCHED)
    make_many(own, COUNT)
    write_policy("b.yaml", "select: [{cgroup: /nowhere}]\nkeepalive: on\n")
    daemon.reload()
    allowed = (60 + 2.5e-3 * COUNT) * PATIENCE  # with a path of 4 KB for each it were 4e-3 and more
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (memory,) = (int(line.split()[1]) >> 10 for line in status.splitlines() if "VmHWM" in line)
    assert memory < allowed
    for words in ("apply", "status", "verify", "plan", "plan --json", "doctor", "metrics"):
        status, _, memory = measured(BIN / "kabpfctl", *words.split())
        assert (words, status) in ((words, 0), ("doctor", 1))
        assert memory < allowed, words
