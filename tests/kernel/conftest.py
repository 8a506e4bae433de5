"""The kernel tier: real cgroups, network namespaces and sockets, read back by those who hold them.

The whole session runs in a mount and a cgroup namespace of its own, with its own /etc/kabpf,
/run/kabpf, /var/lib/kabpf and BPF file system: a kabpf of the machine or of another session is
neither seen nor touched, and nothing of that survives the session. Each test has to leave no
program, map, link, pin, cgroup or process behind.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import dockers
import headers
import held as holders
import pyroute2
import pytest
import session_namespaces
import shared
import versions
from harness import (
    DROP_INS,
    PATIENCE,
    PROGRAMS,
    Daemon,
    Kabpfctl,
    Peer,
    beside_others,
    cgroup_root,
    end_processes,
    let_others_in,
    numbers,
    path_of,
    stay_alone,
)
from held_socket import HeldSocket
from session_namespaces import DIRECTORIES, mount, unmount
from versions import Version

from kabpf.kernel import bcc_compile

BTF, MODULES = Path("/sys/kernel/btf"), Path("/lib/modules")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked with `loaders` runs under both."""
    if metafunc.definition.get_closest_marker("loaders"):
        metafunc.parametrize("loader", ["libbpf", "bcc"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what a mark says that bcc's can't do: values of the test's parameters."""
    items[:] = [item for item in items if not _takes_btf(item)]


def _takes_btf(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("loaders")
    parameters = item.callspec.params if marker and isinstance(item, pytest.Function) else {}
    return parameters.get("loader") == "bcc" and any(
        parameters.get(name) == value for name, value in marker.kwargs.items()
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """Tests that have to be alone keep their turn as long as they follow each other; a machine's
    has a turn of its own, and this is not called after it."""
    yield
    is_like_it = nextitem and nextitem.path.parent.name in ("kernel", "strangers")
    if not (is_like_it and nextitem and nextitem.get_closest_marker("alone")):
        let_others_in()


@pytest.fixture(scope="session", autouse=True)
def own_mounts() -> Iterator[Path]:
    """Namespaces of our own for the whole session; the cgroup namespace that this one left."""
    with session_namespaces.entered() as left:
        yield left


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, run_kabpfctl: Kabpfctl) -> Iterator[None]:
    """Fails the test that leaves anything of kabpf in the kernel, a pin, or a cgroup."""
    is_alone = request.node.get_closest_marker("alone")
    if is_alone:
        stay_alone()
    with nullcontext() if is_alone else beside_others():
        # What an earlier test left is not this one's.
        before = _objects()
        yield
        run_kabpfctl("detach", "--all").check_returncode()
        for directory in DIRECTORIES:
            for path in Path(directory).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        deadline = time.monotonic() + 5 * PATIENCE
        while (left := _objects() - before) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == set(), "the test left something behind"


def _objects() -> set[tuple[str, str]]:
    """As bpftool and listings have it; a process that ends holds its objects a little longer."""
    cgroups = (path.name for path in cgroup_root().glob("kabpf-test-*"))
    listed = {"pin": os.listdir("/sys/fs/bpf"), "cgroup": cgroups}
    by_id = _held()
    return {
        *((kind, name) for kind, names in listed.items() for name in names),
        *((f"{kind} {id}", name) for kind, found in by_id.items() for id, name in found.items()),
    }


def _held() -> dict[str, dict[int, str]]:
    return holders.objects(cgroup_root(), Path("/sys/fs/bpf"))


@pytest.fixture
def own_objects(nothing_left: None) -> Callable[[], dict[str, dict[int, str]]]:
    """What of kabpf this session has in the kernel."""
    return _held


@pytest.fixture(scope="session")
def lent_headers(own_mounts: Path) -> Iterator[None]:
    """The kernel's headers, which bcc needs; Debian's where the machine has none of its own, as
    those are no other in what the programs take of them."""
    if not bcc_compile.missing():
        yield
        return
    try:
        found = headers.debians()
    except headers.MissingError as error:
        headers.lack(str(error), "kernel")
    with shared.directory(MODULES), ExitStack() as mounted:
        mount("tmpfs", MODULES)
        mounted.callback(unmount, MODULES)
        here = MODULES / os.uname().release
        here.mkdir()
        for name, path in found.items():
            (here / name).symlink_to(path)
        if problem := bcc_compile.missing():
            headers.lack(str(problem), "kernel")
        yield


@pytest.fixture(autouse=True)
def loader(
    request: pytest.FixtureRequest, nothing_left: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The loader that the test runs under. For bcc's the kernel seems to have no BTF; what it
    compiled is kept for the next test."""
    name: str = getattr(request, "param", "libbpf")
    if name == "libbpf":
        yield name
        return
    request.getfixturevalue("lent_headers")
    kept = tmp_path_factory.getbasetemp() / bcc_compile.KEPT.name
    if kept.exists():
        shutil.copy(kept, bcc_compile.KEPT)
    mount("tmpfs", BTF)
    yield name
    unmount(BTF)
    if bcc_compile.KEPT.exists():
        shutil.copy(bcc_compile.KEPT, kept)


@pytest.fixture
def make_cgroup() -> Iterator[Callable[[str], Path]]:
    """Makes cgroups below one of this test's own; all go at its end with their processes."""
    top = cgroup_root() / f"kabpf-test-{os.getpid()}-{next(numbers)}"
    top.mkdir()

    def make(name: str = "") -> Path:
        path = top / name if name else top
        path.mkdir(parents=True, exist_ok=True)
        return path

    yield make
    end_processes(top)
    for directory, _, _ in os.walk(top, topdown=False):
        os.rmdir(directory)


@pytest.fixture
def cgroup(make_cgroup: Callable[[str], Path]) -> Path:
    """A cgroup."""
    return make_cgroup("covered")


@pytest.fixture
def other_cgroup(make_cgroup: Callable[[str], Path]) -> Path:
    """Another one beside it."""
    return make_cgroup("other")


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Starts peers in cgroups and network namespaces."""
    peers: list[Peer] = []

    def start(cgroup: Path | None = None, namespace: str | None = None) -> Peer:
        peers.append(Peer(cgroup, namespace))
        return peers[-1]

    yield start
    for one in peers:
        one.end()


@pytest.fixture
def connection(cgroup: Path, peer: Callable[..., Peer]) -> tuple[Peer, Callable[[], int]]:
    """Opens connections from the cgroup: its peer, and a function that gives their numbers."""
    client = peer(cgroup)
    _, address = peer().listener()
    return client, lambda: client.connection(address)


@pytest.fixture(scope="session")
def run_kabpfctl(own_mounts: Path) -> Kabpfctl:
    """Runs kabpfctl."""
    return Kabpfctl(sys.executable, "-P")


@pytest.fixture
def kabpfctl(run_kabpfctl: Kabpfctl) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs kabpfctl, which has to end with `status`."""

    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = run_kabpfctl(*arguments)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def write_policy() -> Callable[[str, str], Path]:
    """Writes a drop-in."""

    def write(name: str, text: str) -> Path:
        DROP_INS.mkdir(exist_ok=True)
        (DROP_INS / name).write_text(text)
        return DROP_INS / name

    return write


@pytest.fixture
def policy(
    cgroup: Path,
    write_policy: Callable[[str, str], Path],
    kabpfctl: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., Path]:
    """Activates a policy on the cgroup, given its keepalive and its other keys; its file."""

    def put(keepalive: str, *others: str) -> Path:
        lines = [f"select: [{{cgroup: {path_of(cgroup)}}}]", f"keepalive: {keepalive}", *others]
        file = write_policy("a.yaml", "\n".join(lines))
        kabpfctl("apply")
        return file

    return put


@pytest.fixture
def kabpfd(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts kabpfd, or another command in its place, and waits for READY."""
    daemons: list[Daemon] = []

    def start(*command: str) -> Daemon:
        daemons.append(Daemon(tmp_path, *command))
        daemons[-1].wait_for("READY=1")
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait()
        daemon.process.stderr.close()
        daemon.channel.close()


@pytest.fixture
def hold(make_cgroup: Callable[[str], Path]) -> Iterator[Callable[..., HeldSocket]]:
    """Holds sockets; when the test dies, the end of their standard input lets go of them."""
    held: list[HeldSocket] = []

    def start(cgroup: Path, namespace: str | None = None, uid: int | None = None) -> HeldSocket:
        held.append(HeldSocket(cgroup, namespace, uid))
        return held[-1]

    yield start
    for each in held:
        each.let_go()


@pytest.fixture
def make_namespace() -> Iterator[Callable[[], str]]:
    """Makes network namespaces whose loopback is up; their names."""
    names: list[str] = []

    def make() -> str:
        names.append(f"kabpf-test-{os.getpid()}-{next(numbers)}")
        pyroute2.netns.create(names[-1])
        with pyroute2.NetNS(names[-1]) as inside:
            inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")
        return names[-1]

    yield make
    for name in names:
        pyroute2.netns.remove(name)


@pytest.fixture
def namespace(make_namespace: Callable[[], str]) -> str:
    """A network namespace of the test's own."""
    return make_namespace()


@pytest.fixture
def others_program(
    compiled: Callable[..., Path], make_cgroup: Callable[[str], Path]
) -> Iterator[Callable[..., str]]:
    """Attaches somebody else's programs to hooks of cgroups, until these go; their pins."""
    with ExitStack() as attached:

        def attach(
            source: str, cgroup: Path, hook: str, flags: tuple[str, ...] = ("multi",)
        ) -> str:
            pin = f"/sys/fs/bpf/kabpf-test-{next(numbers)}"
            subprocess.run(["bpftool", "prog", "load", compiled(source), pin], check=True)
            attached.callback(os.unlink, pin)
            where = (cgroup, hook, "pinned", pin)
            subprocess.run(["bpftool", "cgroup", "attach", *where, *flags], check=True)
            attached.callback(subprocess.run, ["bpftool", "cgroup", "detach", *where], check=True)
            return pin

        yield attach


@pytest.fixture
def neighbour(others_program: Callable[..., str]) -> Callable[..., Callable[[], int]]:
    """Attaches somebody else's sock_ops program to a cgroup; tells how often it ran."""

    def attach(cgroup: Path, flags: tuple[str, ...] = ("multi",)) -> Callable[[], int]:
        pin = others_program("neighbour.bpf.c", cgroup, "sock_ops", flags)

        def seen() -> int:
            shown = json.loads(
                subprocess.check_output(["bpftool", "--json", "prog", "show", "pinned", pin])
            )
            dump = ["bpftool", "--json", "map", "dump", "id", str(shown["map_ids"][0])]
            value: int = json.loads(subprocess.check_output(dump))[0]["formatted"]["value"]
            return value

        return seen

    return attach


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a program of programs/ with clang, once."""

    @functools.cache
    def compile(source: str, *flags: str) -> Path:
        target = tmp_path_factory.mktemp("compiled") / Path(source).stem
        if ".bpf." in source:
            include = f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}"
            flags = ("-g", "-target", "bpf", "-c", include)
            target = target.with_suffix(".bpf.o")
        command = ["clang", "-O2", *flags, str(PROGRAMS / source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    return compile


@pytest.fixture(scope="session")
def version(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Version]:
    """Makes each kind of other version once."""
    return functools.cache(lambda kind: versions.make(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def container(make_cgroup: Callable[[str], Path]) -> Iterator[Callable[..., dockers.Container]]:
    """Makes containers of Docker's, which are described on disk from the beginning or not."""

    def make(*arguments: Any, described: bool = True, **facts: Any) -> dockers.Container:
        made = dockers.Container(make_cgroup, *arguments, **facts)
        if described:
            made.describe()
        return made

    with dockers.directories():
        yield make
