"""A socket that outlives its cgroup stays covered, whoever has it."""

import ctypes
import os
import struct

import pytest
from harness import SYS_BPF, changed, enforced, known_cgroups, path_of, wait_until

REMOVED_MAX = 16_384  # KABPF_REMOVED


@pytest.fixture
def handed_over(make_cgroup, peer):
    """A peer that was moved out of a cgroup, which was removed then, with what it opened there."""

    def make(name):
        cgroup, elsewhere = make_cgroup(name), make_cgroup("elsewhere")
        inside = peer(cgroup)
        listener, address = inside.listener()
        id = cgroup.stat().st_ino
        (elsewhere / "cgroup.procs").write_text(str(inside.process.pid))
        wait_until(lambda: not (cgroup / "cgroup.procs").read_text(), "the move")
        os.rmdir(cgroup)
        return inside, listener, address, id

    return make


@pytest.fixture
def referred():
    """Makes and removes a cgroup again and again; each is referred to, as by a socket."""
    libc = ctypes.CDLL(None, use_errno=True)
    maps = []

    def bpf(command, attributes):
        buffer = ctypes.create_string_buffer(attributes, 128)
        if (found := libc.syscall(SYS_BPF, command, buffer, len(buffer))) < 0:
            raise OSError(ctypes.get_errno(), "bpf")
        return found

    def make(path, count):
        maps.append(bpf(0, struct.pack("4I", 8, 4, 4, count)))  # BPF_MAP_TYPE_CGROUP_ARRAY
        for place in range(count):
            path.mkdir()
            descriptor = os.open(path, os.O_RDONLY)
            key, value = ctypes.c_uint32(place), ctypes.c_uint32(descriptor)
            where = ctypes.addressof(key), ctypes.addressof(value)
            bpf(2, struct.pack("Ixxxx3Q", maps[-1], *where, 0))  # BPF_MAP_UPDATE_ELEM
            os.close(descriptor)
            path.rmdir()

    yield make
    for each in maps:
        os.close(each)


def test_socket_that_outlives_its_cgroup_stays_covered(
    make_cgroup, handed_over, peer, kabpfctl, write_policy
):
    """A listener, what it accepts afterwards, and both under a later policy for the path, whose
    `enforce` holds for them; another cgroup of that name is another one. With the last socket the
    kernel forgets the cgroup."""
    path = path_of(make_cgroup()) + "/service"

    def put(idle):
        write_policy("a.yaml", enforced(idle, path))
        kabpfctl("apply")

    put(61)
    inside, listener, address, id = handed_over("service")
    outside = peer()
    assert make_cgroup("service").stat().st_ino != id
    outside.connection(address)
    accepted = [inside.accept(listener)]
    assert inside.options(accepted[0])["idle"] == 61
    put(62)
    outside.connection(address)
    accepted.append(inside.accept(listener))
    for number in (listener, *accepted):
        assert inside.options(number)["idle"] == 62
        inside.set_option(number, "idle", 7)
        assert inside.options(number)["idle"] == 62
    write_policy("a.yaml", "")
    kabpfctl("apply")
    assert id in known_cgroups()
    inside.set_option(accepted[0], "idle", 7)
    assert inside.options(accepted[0])["idle"] == 7
    inside.end()
    outside.end()
    wait_until(lambda: id not in known_cgroups(), "the kernel to forget the cgroup")


def test_policy_reaches_below_what_is_removed(
    make_cgroup, handed_over, peer, kabpfctl, write_policy
):
    """Where the cgroup above is removed, too; a count of cgroups has those that are there."""
    top = make_cgroup()
    inside, listener, address, id = handed_over("outer/inner")
    os.rmdir(top / "outer")
    kabpfctl("apply")
    write_policy("a.yaml", enforced(61, path_of(top) + "/outer"))
    text = kabpfctl("apply").stdout
    peer().connection(address)
    assert id not in known_cgroups()  # no policy was active when it was removed
    assert inside.options(inside.accept(listener))["idle"] == 7200
    inside, listener, address, id = handed_over("outer/inner")
    os.rmdir(top / "outer")
    write_policy("a.yaml", enforced(62, path_of(top) + "/outer"))
    assert kabpfctl("apply").stdout.split(" covered")[0] == text.split(" covered")[0]
    assert inside.options(listener)["idle"] == 62
    peer().connection(address)
    assert inside.options(inside.accept(listener))["idle"] == 62


def test_too_many_removed_cgroups_keep_nothing_from_the_others(
    make_cgroup, peer, kabpfctl, write_policy, referred
):
    """Of more than there is room for some are forgotten, and none that is there."""
    top, home = make_cgroup(), make_cgroup("home")
    write_policy("a.yaml", enforced(61, path_of(top)))
    kabpfctl("apply")
    referred(top / "gone", REMOVED_MAX + 50)
    assert REMOVED_MAX < len(known_cgroups()) < REMOVED_MAX + 40
    inside = peer(home)
    listener, address = inside.listener()
    peer().connection(address)
    assert inside.options(inside.accept(listener))["idle"] == 61
    assert changed(kabpfctl) == {}
