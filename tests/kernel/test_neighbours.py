"""Other programs on the hooks that kabpf uses."""

import json
import subprocess

import held
import pytest
from harness import UNTOUCHED, cgroup_root, path_of, pinned, wait_until

pytestmark = pytest.mark.core

IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}


@pytest.mark.parametrize("where", ["the root cgroup", "the covered cgroup", "a child of it"])
@pytest.mark.parametrize("first", ["kabpf", "the neighbour"])
def test_another_sock_ops_program_works_beside(
    cgroup, make_cgroup, peer, kabpfctl, neighbour, where, first
):
    """Another program at the same cgroup, above or below runs for every connection, and ours does,
    whoever comes first."""
    child = make_cgroup("covered/child")
    place = {"the root cgroup": cgroup_root(), "the covered cgroup": cgroup}.get(where, child)
    if first == "kabpf":
        kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
        seen = neighbour(place)
    else:
        seen = neighbour(place)
        kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    _, address = peer().listener()
    before = seen()
    client = peer(child)
    assert client.options(client.connection(address)) == IDLE_61
    # From the root it sees the accepting end, too, and what else the machine connects.
    assert seen() - before >= (2 if where == "the root cgroup" else 1)
    kabpfctl("detach", "--all")
    before = seen()
    # A link whose last holder is gone is detached by a work queue (bpf_link_put() in the kernel's
    # kernel/bpf/syscall.c): a little later where the processors are busy.
    wait_until(lambda: client.options(client.connection(address)) == UNTOUCHED, "the program's end")
    assert seen() > before


def test_applying_again_attaches_nothing_twice(cgroup, kabpfctl):
    """However often the policy is applied, the program is attached once, by one link."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    kabpfctl("apply")
    kabpfctl("apply")
    shown = json.loads(
        subprocess.check_output(["bpftool", "--json", "cgroup", "show", cgroup_root()])
    )
    links = held.listed("link", "list")
    program = pinned("link")["kabpf_sockops"]["prog_id"]
    assert [one["id"] for one in shown].count(program) == 1
    assert [one.get("prog_id") for one in links].count(program) == 1


@pytest.fixture
def rewritten(others_program, make_cgroup):
    """A cgroup inside the covered one, with somebody else's program on setsockopt(2)."""
    child = make_cgroup("covered/child")
    others_program("rewriter.bpf.c", child, "setsockopt")
    return child


@pytest.mark.parametrize(
    ("mode", "idle", "expected", "counted"),
    [
        ("fill", "61", (61, 40), (0, 0)),
        ("enforce", "61", (61, 61), (1, 0)),
        ("fill", "30..300", (300, 40), (0, 0)),
        ("fill", "50..300", (300, 50), (0, 1)),
    ],
)
def test_another_setsockopt_program_works_beside(
    cgroup, rewritten, peer, kabpfctl, write_policy, mode, idle, expected, counted
):
    """What another program ignored stays so, and is not ours to count; what it made of a call is
    what the policy judges."""
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]"
    write_policy("a.yaml", f"{select}\nmode: {mode}\nkeepalive: {{idle: {idle}}}\n")
    kabpfctl("apply")
    _, address = peer().listener()
    client = peer(rewritten)
    number = client.connection(address)
    found = []
    for asked in (20, 15):
        client.set_option(number, "idle", asked)
        found.append(client.options(number)["idle"])
    assert tuple(found) == expected
    (status,) = json.loads(kabpfctl("status", "--json").stdout)["policies"]
    assert (status["counters"]["ignored"], status["counters"]["clamped"]) == counted
