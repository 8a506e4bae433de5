"""What reads texts that others wrote, each as a function of bytes.

One that raises anything, takes seconds or much memory has a fault: the errors that callers expect
are caught here, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from kabpf import proc
from kabpf.containers.names import identify
from kabpf.daemon.container_requests import _cgroup
from kabpf.engines import bolt, bundles, files
from kabpf.engines.engines import Engines
from kabpf.errors import PolicyError, RefusedError
from kabpf.kernel import mountinfo
from kabpf.migration import env_command, supervisors, variables
from kabpf.migration.files import Files
from kabpf.migration.scripts import Command, follow
from kabpf.policy import parser
from kabpf.requests import access, methods, varlink
from kabpf.runtime import last_good, notes
from kabpf.systemd import unit_files
from kabpf.systemd.unit_files import Lines

TESTS = Path(__file__).parents[1]
WATCHED = frozenset({"LD_PRELOAD", "KEEPALIVE_TIME"})
GOLDEN = TESTS / "engines"

_scratch = Path(tempfile.mkdtemp(prefix="kabpf-fuzz-", dir="/dev/shm"))


def end() -> None:
    """Remove what the targets wrote."""
    shutil.rmtree(_scratch, ignore_errors=True)


def text(content: bytes) -> str:
    return os.fsdecode(content)


def policy_file(content: bytes) -> None:
    with contextlib.suppress(PolicyError):
        parser.combine([parser.parse(content, "/etc/kabpf/policy.d/a.service.yaml")])


def unit_file(content: bytes) -> None:
    found = list(unit_files.settings(text(content), "/etc/systemd/system/a.service"))
    for section in ("Service", "Socket", ""):
        unit_files.effective(found, section)
    for one in found:
        unit_files.words(one.value)


def environment_file(content: bytes) -> None:
    given = {one.name: one.value for one in unit_files.environment_file(text(content), "/etc/a")}
    with contextlib.suppress(PolicyError, ValueError):
        variables.read(given)


def shell_script(content: bytes) -> None:
    command = Command(["script", "start"], {}, Lines("unit", 1, 1))
    script = Lines("script", 1, 1)
    follow(text(content), script, command, Files(_scratch), lambda _: None, WATCHED)


def supervisor_words(content: bytes) -> None:
    supervisors.pairs(text(content))
    env_command.split(text(content), {"A": "1"})
    env_command.evaluate(text(content).split("\n"), {"A": "1"})


def mountinfo_lines(content: bytes) -> None:
    """Names as the kernel writes them, whatever they are, come back as they were."""
    points = [b"/" + each for each in content.replace(b"\0", b"").split(b"\n\n")]
    lines = [
        b"%d 1 0:%d / %s rw - cgroup2 %s rw\n" % (number, number, _mangled(point), _mangled(point))
        for number, point in enumerate(points, 1)
    ]
    found = mountinfo.mounts(b"".join(lines))
    assert [os.fsencode(one.point) for one in found] == points


def process_status(content: bytes) -> None:
    """A process's name, which the kernel escapes newlines and backslashes of, hides no field."""
    name = content.replace(b"\0", b"").replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    status = b"Name:\t%s\nUmask:\t0022\nUid:\t1\t2\t3\t4\nCapEff:\t0\n" % name
    assert proc.fields(status, b"Uid") == [b"1", b"2", b"3", b"4"]
    assert proc.fields(status, b"CapEff") == [b"0"]


def varlink_call(content: bytes) -> None:
    with contextlib.suppress(varlink.MessageError, varlink.CallError):
        call = varlink.parse_call(content)
        rule = access.TABLE.get(call.method)
        if rule:
            varlink.checked(call, rule.types, rule.required)


def varlink_reply(content: bytes) -> None:
    with contextlib.suppress(varlink.MessageError, varlink.CallError):
        varlink.parse_reply(content)


def hook_request(content: bytes) -> None:
    path = _cgroup(content)
    assert not path or path.startswith("/")
    identify(path)


def oci_bundle(content: bytes) -> None:
    with contextlib.suppress(OSError):
        config = files.decoded(content)
        files.texts(files.inside(config, "annotations"))
        bundles.cgroup(files.text(files.inside(config, "linux").get("cgroupsPath")))


def bolt_database(content: bytes) -> None:
    def everything(view: bolt.View) -> None:
        for id in view.items(b"id-registry"):
            view.value(b"ctr", id, b"config")

    descriptor = os.memfd_create("database")
    try:
        os.write(descriptor, content)
        with contextlib.suppress(OSError):
            bolt.look(descriptor, everything)
    finally:
        os.close(descriptor)


def engine_files(content: bytes) -> None:
    """Any one file of an engine's is what somebody else would have it be: the first two bytes say
    which one."""
    if len(content) < 2:
        return
    cases = _engines()
    case = cases[content[0] % len(cases)]
    name = case.files[content[1] % len(case.files)]
    good = name.read_bytes()
    try:
        name.write_bytes(content[2:])
        for path in case.cgroups:
            if identity := identify(path):
                Engines(case.root).facts(path, identity.id)
    finally:
        name.write_bytes(good)


def notes_in_run(content: bytes) -> None:
    for name in (notes.FORMER, notes.APPLIED, notes.REQUEST):
        file = _scratch / name
        file.write_bytes(content)
        file.chmod(0o600)
    notes.read_applied(_scratch)
    notes.read_begun(_scratch)
    notes.former({1, 2}, _scratch)


def last_good_policies(content: bytes) -> None:
    """With a digest that is right, and as it comes."""
    state = _scratch / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    head = b'{"version": %d, "digest": "%s", "applied_at": 1, "stamp": ""}\n' % (
        last_good.VERSION,
        last_good._digest(content).encode(),
    )
    for whole in (content, head + content):
        (state / last_good.NAME).write_bytes(whole)
        (state / last_good.NAME).chmod(0o600)
        with contextlib.suppress(RefusedError, PolicyError):
            if kept := last_good.read(state):
                kept.parsed()


def users_options(content: bytes) -> None:
    """Options of a user's request never leave its one line of the drop-in."""
    words = [word for word in text(content).split("\n") if word]
    given = dict(zip(words[::2], words[1::2], strict=False))
    with contextlib.suppress(varlink.CallError, PolicyError, RefusedError):
        methods._numbers(given, parser.defaults_of([]))


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (
        policy_file, unit_file, environment_file, shell_script, supervisor_words, mountinfo_lines,
        process_status, varlink_call, varlink_reply, hook_request, oci_bundle, bolt_database,
        engine_files, notes_in_run, last_good_policies, users_options,
    )
}  # fmt: skip


def seeds(target: str) -> Iterator[bytes]:
    """Good inputs, and those that were found to be bad once (seeds/TARGET/)."""
    for file in sorted((TESTS / "fuzz/seeds" / target).glob("*")):
        yield file.read_bytes()
    yield from _GOOD.get(target, list)()


def _mangled(name: bytes) -> bytes:
    """As mangle() in fs/proc_namespace.c."""
    for byte in b"\\ \t\n#":
        name = name.replace(bytes([byte]), b"\\%03o" % byte)
    return name


def _plans() -> list[bytes]:
    return [file.read_bytes() for file in sorted((TESTS / "plans").rglob("*.yaml"))[::8]]


def _bundles() -> list[bytes]:
    return [file.read_bytes() for file in sorted(GOLDEN.rglob("config*.json"))]


def _databases() -> list[bytes]:
    return [gzip.decompress(file.read_bytes()) for file in sorted(GOLDEN.rglob("*.db.gz"))]


_GOOD: dict[str, Callable[[], list[bytes]]] = {
    "policy_file": _plans,
    "last_good_policies": lambda: [b'[["/etc/kabpf/policy.d/a.yaml", "keepalive: on\\n"]]'],
    "oci_bundle": _bundles,
    "bolt_database": _databases,
    "engine_files": lambda: _engine_files(),
}


class _Case(NamedTuple):
    """An engine's files, and the cgroups of its containers."""

    root: Path
    cgroups: list[str]
    files: list[Path]


@functools.cache
def _engines() -> list[_Case]:
    found = []
    for golden in sorted(GOLDEN.iterdir()):
        root = _scratch / golden.name
        shutil.copytree(golden / "root", root)
        for packed in list(root.rglob("*.gz")):
            packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
            packed.unlink()
        told = yaml.safe_load((golden / "facts.yaml").read_text())["containers"]
        names = sorted(name for name in root.rglob("*") if name.is_file())
        found.append(_Case(root, [one["cgroup"] for one in told], names))
    return found


def _engine_files() -> list[bytes]:
    return [
        bytes([number, place]) + file.read_bytes()
        for number, case in enumerate(_engines())
        for place, file in enumerate(case.files)
    ]
