"""Policies that end with their cgroup, and the cgroups that `kabpfctl run` makes by hand.

`run` writes a drop-in for its cgroup into /run/kabpf/transient.d. Whoever reads the policy files
prunes first: what is over goes, and with it the cgroup, where systemd has not made it. A process
that dies at any step so leaves nothing that the next one does not find.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kabpf.errors import RefusedError
from kabpf.faults import fault_point
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.state import Cgroup
from kabpf.policy import files
from kabpf.policy.model import Destination, Options, Policy, Until
from kabpf.policy.parser import RUNTIME, TRANSIENT
from kabpf.systemd import scopes

# With .scope behind it where systemd has made it.
NAME = re.compile(r"kabpf-run-[0-9]+-[0-9a-f]{8}")
UNTIL = re.compile(r'^until: \{cgroup: ("[^\n]*"), id: ([0-9]+)\}$', re.MULTILINE)


def new_name() -> str:
    """A name for this process's cgroup that no other has, or had."""
    return f"kabpf-run-{os.getpid()}-{os.urandom(4).hex()}"


def drop_in(name: str) -> Path:
    """The policy file of the cgroup of this name."""
    return TRANSIENT / f"{name}.yaml"


def text(policy: Policy) -> bytes:
    """The drop-in of a policy that ends with its cgroup, as `kabpfctl run` writes it. Raises
    RefusedError where it can't be spelled."""
    assert policy.until
    path, rules = policy.until.path, policy.rules
    if not path.isprintable():
        raise RefusedError(f"cgroup {path!r}", hint="expected a path that can be printed")
    # As it is: YAML knows no escape in two halves, as JSON has for what is beyond 16 bits.
    quoted = json.dumps(path, ensure_ascii=False)
    lines = [
        "# Written by kabpfctl run; it goes with the cgroup.",
        f"until: {{cgroup: {quoted}, id: {policy.until.id}}}",
        f"select: [{{cgroup: {quoted}}}]",
        f"keepalive: {_options(rules.options)}",
        f"mode: {rules.mode}",
        f"direction: {rules.direction}",
        f"loopback: {str(rules.loopback).lower()}",
        f"existing: {str(policy.existing).lower()}",
        f"log: {'sockets' if policy.log else 'off'}",
    ]
    if rules.destinations:
        lines += ["destinations:", *map(_destination, rules.destinations)]
    content = "\n".join([*lines, ""]).encode()
    if len(content) > files.FILE_SIZE_MAX:
        raise RefusedError(
            f"policy {policy.name} makes {len(content)} bytes",
            hint=f"expected at most {files.FILE_SIZE_MAX}",
        )
    return content


def _options(options: Options) -> str:
    if not options.keepalive:
        return "off"
    given = ", ".join(f"{key}: {value}" for key, value in _spelled(options).items())
    return f"{{{given}}}" if given else "on"


def _spelled(options: Options) -> dict[str, str]:
    """The options that are given, as policy files spell them."""
    numbers = {
        "idle": options.idle_s,
        "interval": options.interval_s,
        "probes": options.probes,
        "syn_retries": options.syn_retries,
    }
    spelled = {key: str(value) for key, value in numbers.items() if value}
    if options.user_timeout_ms:
        low, high = options.user_timeout_ms
        spelled["user_timeout"] = f"{low}ms" if low == high else f"{low}ms..{high}ms"
    if options.jitter_percent:
        spelled["jitter"] = f"{options.jitter_percent}%"
    return spelled


def _destination(destination: Destination) -> str:
    keys = {"to": json.dumps(destination.to)}
    if destination.ports:
        keys["ports"] = str(list(destination.ports))
    if destination.options.keepalive:
        # What it leaves out would be the policy's.
        keys |= {"user_timeout": "off", "jitter": "0%"} | _spelled(destination.options)
    else:
        keys["keepalive"] = "off"
    return f"  - {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"


@contextlib.contextmanager
def watcher(tree: CgroupTree, run: Path, home: str = "") -> Iterator[Callable[[str], object]]:
    """Starts a process that stays where this one is now, or moves to the cgroup `home` if it may,
    and is nobody's child. Tell it the path of a cgroup that has, or under the lock is to have, its
    processes: it prunes when the last one is gone. It ends where the block ends before.
    """
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        raise RefusedError("start a watcher", error.errno or 0) from None
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.close(writer)
                _watch(tree, reader, run, home)
        finally:
            os._exit(0)
    os.close(reader)
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
        os.waitpid(child, 0)

    def tell(path: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # killed
            os.write(writer, os.fsencode(path))

    try:
        yield tell
    finally:
        os.close(writer)


def _watch(tree: CgroupTree, reader: int, run: Path, home: str) -> None:
    if home:
        with contextlib.suppress(OSError):
            Path(tree.directory(home), "cgroup.procs").write_text("0")
    path = os.fsdecode(os.read(reader, 1 << 16))
    if path:
        prune = (sys.executable, "-P", "-m", "kabpf.daemon", "--prune")
        program = str(Path(__file__).with_name("watcher.py"))
        about = (tree.directory(path), str(drop_in(os.path.basename(path))), str(run))
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.closerange(3, 1 << 16)
        os.execve(
            sys.executable,
            [sys.executable, "-I", "-S", program, *about, *prune],
            {},
        )


class Ending(NamedTuple):
    """What a drop-in says of its end."""

    until: Until
    is_of_user: bool


def prune(tree: CgroupTree) -> list[str]:
    """Remove the drop-ins that are over, and empty cgroups made by hand; the names of the policies.
    The caller holds the lock, under which such a cgroup is made, entered and named."""
    for cgroup in () if scopes.is_booted() else reversed(tree.cgroups()):
        if NAME.fullmatch(cgroup.name) and not tree.is_populated(cgroup):
            remove(tree, cgroup)
    for unfinished in TRANSIENT.glob(".*"):
        unfinished.unlink(missing_ok=True)
    over = [file for file, ending in standing().items() if is_over(ending, tree)]
    for file in over:
        fault_point("remove the drop-in")
        file.unlink(missing_ok=True)
    return [file.stem for file in over]


def remove(tree: CgroupTree, cgroup: Cgroup) -> None:
    """Remove a cgroup and those below, unless a process lives there."""
    for one in reversed((cgroup, *tree.below(cgroup))):
        fault_point("remove the cgroup")
        with contextlib.suppress(OSError):
            os.rmdir(tree.directory(one.path))


def standing() -> dict[Path, Ending]:
    """The drop-ins of policies that end with a cgroup. Only what commands have written is looked
    for, which spares the parser; what is wrong is said when the policy is loaded."""
    found = {}
    for file in (*files.entries(RUNTIME), *files.entries(TRANSIENT)):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text() if files.has_policy_name(file) else ""
            if match := UNTIL.search(text):
                until = Until(json.loads(match[1]), int(match[2]))
                found[file] = Ending(until, is_of_user="\nowner: " in text)
    return found


def is_over(ending: Ending, tree: CgroupTree) -> bool:
    """Whether the cgroup is gone, or is one of `kabpfctl run` and has no process any more."""
    cgroup = Cgroup(ending.until.id, 0, ending.until.path)
    return not tree.has(cgroup) or not (ending.is_of_user or tree.is_populated(cgroup))
