"""Activates the cases of plans/, one after the other, in a cgroup namespace whose root is the
cgroup of this process: a connection from each cgroup shows which policy is active there.

  golden.py MOUNT CASES

Prints as JSON by case what the connections of each cgroup showed: once for cgroups that were there
before the policies were applied, and twice for those that were born after: what the kernel was sure
of, and everything once user space had answered its questions."""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import yaml

from kabpf.apply import births, owned, reconcile
from kabpf.apply.containers import Containers
from kabpf.containers.facts import Container, Pod
from kabpf.kernel.cgroups import CgroupTree
from kabpf.policy import files, parser
from kabpf.policy.files import Directories, Snapshot
from kabpf.policy.model import Options, Range, Rules
from kabpf.systemd import relations


def policies_of(case):
    """A case's policies, told apart by idle: 100 s and their place; `off` is on, too."""
    where = Directories(case / "policy.yaml", (case / "policy.d",))
    policies = parser.combine([files.read(path) for path in files.paths(where)])
    units = {"unit": sorted((case / "units").glob("*"))}
    policies = relations.followed(policies, units)
    return tuple(
        policy._replace(rules=Rules(Options(idle_s=Range(idle, idle))))
        for idle, policy in enumerate(policies, 100)
    )


class Engines:
    """Those of a case, which know what its containers.yaml says."""

    def __init__(self, case):
        file = case / "containers.yaml"
        self.known = yaml.safe_load(file.read_text()) if file.exists() else {}

    def facts(self, path, id):
        if path not in self.known:
            return None
        facts = {"engine": "podman", "name": "", "image": "", **self.known[path]}
        if "pod" in facts:
            facts["pod"] = Pod(**{"namespace": "", "name": "", "uid": "", **facts["pod"]})
        return Container(id, **facts)


class Silent:
    """Engines that there is no time to ask."""

    def facts(self, path, id):
        raise TimeoutError


def directories(mount, case):
    """The case's cgroups, parents before their children."""
    found = {}
    for line in (case / "cgroups").read_text().splitlines():
        path = Path(line)
        for each in (*reversed(path.parents), path):
            found[str(each)] = mount / str(each)[1:]
    return found


def make(cgroups):
    for directory in cgroups.values():
        directory.mkdir(exist_ok=True)


def remove(mount, cgroups):
    enter(mount)
    for directory in sorted(cgroups.values(), reverse=True):
        if directory != mount:
            directory.rmdir()


def enter(directory):
    (directory / "cgroup.procs").write_text("0")


def seen(cgroups, resolution, address):
    """The policies' names, or null, by what connections from the cgroups have."""
    names = {each.options.idle_s.low: each.name for each in resolution.desired.values()}
    found = {}
    for path, directory in cgroups.items():
        enter(directory)
        with socket.create_connection(address) as connection:
            idle = connection.getsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == (idle < 7200)
        found[path] = names.get(idle)
    return found


def sure(cgroups, born):
    """The cgroups that the kernel asked nothing about, nor about one above them."""
    asked = {event.id for event in born}
    unsure = [path for path, directory in cgroups.items() if directory.stat().st_ino in asked]
    return {
        path: directory
        for path, directory in cgroups.items()
        if not any(f"{path}/".startswith(f"{one}/") for one in unsure)
    }


def main():
    mount, cases = Path(sys.argv[1]), Path(sys.argv[2])
    tree = CgroupTree(mount)
    answer = {}
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    address = listener.getsockname()
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(reconcile.open_or_load((), tree))
        born = []
        events = stack.enter_context(loaded.events(born.append))
        for case in sorted(cases.iterdir()):
            policies, cgroups = policies_of(case), directories(mount, case)
            engines = Engines(case)
            make(cgroups)
            last = reconcile.reconcile(Snapshot("", policies), loaded, engines=engines)
            before = seen(cgroups, last, address)
            if engines.known:  # what was not read stays as it is
                unread = reconcile.reconcile(Snapshot("", policies), loaded, engines=Silent())
                assert unread.unread and unread.left
                assert seen(cgroups, last, address) == before
            remove(mount, cgroups)
            last = reconcile.reconcile(Snapshot("", policies), loaded, engines=engines)
            events.consume()
            born.clear()
            make(cgroups)
            events.consume()
            alone = seen(sure(cgroups, born), last, address)
            # As kabpfd does. The cgroups above are new as well, and need no look at everything.
            found = births.resolve(born, last, loaded, Containers(tree, engines))
            assert not found.unplaced, case
            processes = tree.processes(found.paths)
            assert not owned.update(found.owed, tree, contextlib.nullcontext(), processes)
            # Below a container the kernel goes on alone.
            inside = {
                path: directory
                for path, directory in cgroups.items()
                if any(path.startswith(f"{each}/") for each in engines.known)
            }
            remove(mount, inside)
            make(inside)
            answer[case.name] = before, alone, seen(cgroups, last, address)
            remove(mount, cgroups)
    print(json.dumps(answer))


os.umask(0o022)
main()
