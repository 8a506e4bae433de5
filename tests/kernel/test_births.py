"""Which policy a cgroup has: cgroups that come and go, nest, and are selected in every way."""

import os
import signal
import subprocess

import pytest
from harness import UNTOUCHED, known_cgroups, path_of, wait_until

# PROC_CGROUP_INIT_INO of the kernel's include/linux/proc_ns.h; others can't make a hierarchy
# (cgroup1_root_to_use in its kernel/cgroup/cgroup-v1.c).
FIRST_CGROUP_NAMESPACE = 0xEFFFFFFB
IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}


def _idle(peer, cgroup):
    """The idle time of a new connection from the cgroup; None where keepalive is off."""
    _, address = peer().listener()
    client = peer(cgroup)
    options = client.options(client.connection(address))
    return options["idle"] if options["keepalive"] else None


def _entry(path, options="{idle: 61}"):
    return f'  p{abs(hash(path))}: {{select: [{{cgroup: "{path}"}}], keepalive: {options}}}\n'


def test_service_restarted_200_times_is_covered_at_once(make_cgroup, kabpfctl, write_policy, peer):
    """A cgroup selected by path is covered from its birth, however often it is made again."""
    top = make_cgroup()
    write_policy("p.yaml", f"policies:\n{_entry(f'{path_of(top)}/service')}")
    kabpfctl("apply")
    _, address = peer().listener()
    for _ in range(200):
        service = top / "service"
        service.mkdir()
        child, end = _connected_child(service, address)
        assert os.read(end, 100) == b"1 61"
        os.close(end)
        assert os.waitpid(child, 0)[1] == 0
        wait_until(lambda service=service: _removed(service), "the cgroup to be empty")


def _connected_child(cgroup, address):
    """A process whose first act in the cgroup is to connect; it writes keepalive and idle."""
    import socket

    end, child_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        (cgroup / "cgroup.procs").write_text("0")
        connection = socket.create_connection(tuple(address))
        keepalive = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle = connection.getsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE)
        os.write(child_end, f"{keepalive} {idle}".encode())
        os._exit(0)
    os.close(child_end)
    return child, end


def _removed(cgroup):
    try:
        cgroup.rmdir()
    except OSError:
        return False
    return True


def test_cgroup_of_another_hierarchy_is_not_taken_for_one_of_the_tree(
    kabpfctl, make_cgroup, own_mounts, tmp_path
):
    """A version 1 cgroup is no birth in the cgroup2 tree, whatever its id, nor its end a death."""
    if os.stat(own_mounts).st_ino != FIRST_CGROUP_NAMESPACE:
        pytest.skip("new hierarchies are made in the machine's cgroup namespace alone")
    mount = ["mount", "-t", "cgroup", "-o", "none,name=kabpf-test", "none", tmp_path]
    subprocess.run(["nsenter", f"--cgroup={own_mounts}", *mount], check=True)
    try:
        kabpfctl("attach", "--cgroup", make_cgroup("some"), "--idle", 61)
        before = known_cgroups()
        made = [tmp_path / f"v1-{number}" for number in range(50)]
        for directory in made:
            directory.mkdir()
        assert known_cgroups() == before
        for directory in made:
            directory.rmdir()
        assert known_cgroups() == before
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_removed_cgroups_leave_the_map(kabpfctl, make_cgroup):
    """A cgroup's entry goes with it, soon after where nothing refers to it."""
    top = make_cgroup()
    kabpfctl("attach", "--cgroup", top, "--idle", 61)
    made = [make_cgroup(f"short-{number}") for number in range(100)]
    ids = {directory.stat().st_ino for directory in made}
    assert ids <= known_cgroups()
    for directory in made:
        directory.rmdir()
    wait_until(lambda: not ids & known_cgroups(), "the kernel to release the cgroups")


@pytest.mark.core
def test_path_below_a_parent_that_is_made_later_is_covered(
    make_cgroup, kabpfctl, write_policy, peer
):
    """Neither the cgroup nor its parents have to exist when the policy is applied."""
    top = make_cgroup()
    write_policy("p.yaml", f"policies:\n{_entry(f'{path_of(top)}/a/b/c')}")
    kabpfctl("apply")
    service = make_cgroup("a/b/c")
    assert _idle(peer, service) == 61
    assert _idle(peer, service.parent) is None


@pytest.mark.core
def test_nearest_policy_wins(make_cgroup, kabpfctl, write_policy, peer):
    """Nested cgroups have the policy of the nearest cgroup that one names."""
    outer, inner = make_cgroup("outer"), make_cgroup("outer/inner")
    write_policy(
        "p.yaml",
        f"policies:\n{_entry(path_of(outer), '{idle: 61}')}{_entry(path_of(inner), '{idle: 62}')}",
    )
    kabpfctl("apply")
    below_outer, below_inner = make_cgroup("outer/x/y"), make_cgroup("outer/inner/x/y")
    found = [_idle(peer, one) for one in (outer, below_outer, inner, below_inner)]
    assert found == [61, 61, 62, 62]


def test_keepalive_off_below_a_policy_is_untouched(make_cgroup, kabpfctl, write_policy, peer):
    """`keepalive: off` stops what an ancestor would give, for the cgroups below as well."""
    outer, quiet = make_cgroup("outer"), make_cgroup("outer/quiet")
    write_policy("p.yaml", f"policies:\n{_entry(path_of(outer))}{_entry(path_of(quiet), 'off')}")
    kabpfctl("apply")
    found = [_idle(peer, one) for one in (outer, quiet, make_cgroup("outer/quiet/below"))]
    assert found == [61, None, None]


@pytest.mark.parametrize("when", ["before", "after"])
def test_unit_is_covered_wherever_its_slice_is(make_cgroup, kabpfctl, write_policy, peer, when):
    """A unit's name selects its cgroup and its socket unit's, at any depth, old or new."""
    names = ("a.slice/b.slice/kabpf-test.service", "a.slice/kabpf-test.socket")
    if when == "before":
        for name in names:
            make_cgroup(name)
    write_policy("kabpf-test.service.yaml", "keepalive: {idle: 61}\n")
    kabpfctl("apply")
    assert [_idle(peer, make_cgroup(name)) for name in names] == [61, 61]
    assert _idle(peer, make_cgroup("a.slice/other.service")) is None


@pytest.mark.core
def test_star_and_double_star_are_matched_by_the_kernel(make_cgroup, kabpfctl, write_policy, peer):
    """Globs of whole names cover new cgroups with no daemon running."""
    top = path_of(make_cgroup())
    write_policy(
        "p.yaml",
        f"policies:\n{_entry(f'{top}/one/*', '{idle: 61}')}{_entry(f'{top}/any/**', '{idle: 62}')}"
        f"{_entry(f'{top}/mid/**/end', '{idle: 63}')}",
    )
    kabpfctl("apply")
    expected = {
        "one": None, "one/x": 61, "one/x/y": 61,  # y has what its parent has
        "any": None, "any/x": 62, "any/x/y": 62,
        "mid/end": 63, "mid/x/end": 63, "mid/x/y/end": 63, "mid/x": None,
    }  # fmt: skip
    assert {name: _idle(peer, make_cgroup(name)) for name in expected} == expected


def test_globs_within_names_are_matched_by_the_kernel(make_cgroup, kabpfctl, write_policy, peer):
    """With no daemon running, a new cgroup that a glob selects has its policy on its first
    connection, by the precedence of selectors."""
    top = path_of(make_cgroup())
    selectors = {
        61: '{unit: "barglob@*.service"}',
        62: f'{{cgroup: "{top}/worker-*"}}',
        63: f'{{cgroup: "{top}/worker-a*.scope"}}',
        64: f'{{cgroup: "{top}/**/docker-*.scope"}}',
        65: f'{{cgroup: "{top}/*.service"}}',
    }
    write_policy(
        "p.yaml",
        "policies:\n"
        + "".join(
            f"  p{idle}: {{select: [{selector}], keepalive: {{idle: {idle}}}}}\n"
            for idle, selector in selectors.items()
        ),
    )
    kabpfctl("apply")
    expected = {
        "barglob@1-main.service": 65,  # of two globs the one with the longer text in front
        "worker-1": 62, "worker-b.scope": 62, "worker-a1.scope": 63, "worker-a1.slice": 62,
        "x/y/docker-0a1b.scope": 64, "docker-0a1b.scope": 64, "docker-0a1b.slice": None,
        "q.service": 65, "worker": None, "deep/barglob@x.service": 61, "worker-1/inner": 62,
    }  # fmt: skip
    assert {name: _idle(peer, make_cgroup(name)) for name in expected} == expected
    assert "new cgroups wait" not in kabpfctl("status").stdout


@pytest.mark.core
def test_name_that_a_glob_has_doubts_about_is_resolved_by_the_daemon(
    make_cgroup, kabpfctl, write_policy, kabpfd, peer
):
    """A new cgroup of which only user space can tell gets its policy from kabpfd, and with it the
    sockets that were opened before."""
    top = path_of(make_cgroup())
    write_policy("p.yaml", f"policies:\n{_entry(f'{top}/*/worker-?', '{idle: 61}')}")
    kabpfd()
    make_cgroup("pool")
    _, address = peer().listener()
    for name, covered in (("pool/worker-\u00e9", True), ("pool/worker-\u00e9x", False)):
        client = peer(make_cgroup(name))
        number = client.connection(address)
        took = client.wait_for_keepalive(number, 5 if covered else 0.2)
        assert (took is not None) == covered
        assert client.options(number) == (IDLE_61 if covered else UNTOUCHED)


def test_cgroup_below_a_doubtful_one_is_corrected_too(
    make_cgroup, kabpfctl, write_policy, kabpfd, peer
):
    """What was born below a new cgroup before kabpfd had resolved it inherits its policy."""
    top = path_of(make_cgroup())
    write_policy("p.yaml", f"policies:\n{_entry(f'{top}/worker-?', '{idle: 61}')}")
    daemon = kabpfd()
    daemon.process.send_signal(signal.SIGSTOP)
    below = make_cgroup("worker-\u00e9/deep/deeper")
    _, address = peer().listener()
    client = peer(below)
    number = client.connection(address)
    assert client.options(number) == UNTOUCHED
    daemon.process.send_signal(signal.SIGCONT)
    assert client.wait_for_keepalive(number) is not None
    assert _idle(peer, below) == 61


def test_more_births_than_the_ring_buffer_holds_are_all_resolved(
    make_cgroup, kabpfctl, write_policy, kabpfd, peer
):
    """Where events were lost, kabpfd looks at the whole tree."""
    top = make_cgroup()
    write_policy("p.yaml", f"policies:\n{_entry(f'{path_of(top)}/[!a]*', '{idle: 61}')}")
    daemon = kabpfd()
    daemon.process.send_signal(signal.SIGSTOP)
    for number in range(1500):
        (top / f"\u00e9-{number}").mkdir()
    _, address = peer().listener()
    clients = [peer(top / f"\u00e9-{number}") for number in (0, 1499)]
    numbers = [client.connection(address) for client in clients]
    daemon.process.send_signal(signal.SIGCONT)
    for client, number in zip(clients, numbers, strict=True):
        assert client.wait_for_keepalive(number) is not None


def test_glob_without_room_waits_for_apply(make_cgroup, kabpfctl, write_policy, peer):
    """Without kabpfd a glob that the kernel has no room for covers a new cgroup at the next apply,
    and the commands name it."""
    top = path_of(make_cgroup())
    names = [f"*a{number}-*b{number}-*" for number in range(100)]
    selectors = ", ".join(f'{{cgroup: "{top}/{name}"}}' for name in names)
    write_policy("p.yaml", f"select: [{selectors}]\nkeepalive: {{idle: 61}}\n")
    kabpfctl("apply")
    left = f"resolved by kabpfd: cgroup {top}/{names[99]}"
    assert left in kabpfctl("check").stderr
    assert left in kabpfctl("plan").stdout
    worker = make_cgroup("a99-b99-")
    assert _idle(peer, worker) is None
    assert left in kabpfctl("explain", path_of(worker)).stdout
    assert "some new cgroups wait: " in kabpfctl("status").stdout
    kabpfctl("apply")
    assert _idle(peer, worker) == 61
