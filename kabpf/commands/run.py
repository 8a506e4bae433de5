"""kabpfctl run: one command in a cgroup of its own, with a policy of its own.

This process enters the cgroup, activates the policy there, and becomes the command.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Collection, Mapping
from typing import NoReturn

from kabpf import proc
from kabpf.apply import clients, dropins, placement, single, transient
from kabpf.errors import CommandError, PolicyError, RefusedError
from kabpf.faults import fault_point
from kabpf.kernel import cgroups, loading, mountinfo
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.crash_recovery import is_interrupted
from kabpf.kernel.dataplane import PINS
from kabpf.migration import variables
from kabpf.migration.variables import Asked
from kabpf.plan.state import Cgroup
from kabpf.policy import files, options
from kabpf.policy.model import BEFORE_SYN, Options, Policy, Rules, Selector, Until
from kabpf.policy.options import COMMAND_KEYS, TIMERS
from kabpf.policy.yaml import Node, Source
from kabpf.runtime import pidlock
from kabpf.systemd import scopes

ENVIRONMENT_MAX = 6 << 20  # three quarters of 8 MiB, of which arguments have a part (execve(2))


def run(arguments: argparse.Namespace) -> NoReturn:
    """Become the command."""
    # Interrupted before that, this process ends as the command would.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    words: list[str] = arguments.words
    if words[:1] == ["--"]:
        del words[0]
    if not words:
        arguments.refuse("no command given")
    program = find(words[0])
    asked = requested(arguments, os.environ)
    name = transient.new_name()
    if os.geteuid() == 0:
        tree = cgroups.find_tree(mountinfo.own_mounts())
        named = _named(arguments.policy) if arguments.policy else None
        rules = named.rules if named else _rules(asked)
        is_told = loading.kind(PINS).reports_events
        log = (named is not None and named.log) or (asked.debug and is_told)
        with placement.entered(tree, name, program) as cgroup:
            _cover(tree, cgroup, rules, log=log)
        if log:
            pidlock.wait_for_log()
    elif arguments.policy:
        raise RefusedError("--policy needs root")
    else:
        from kabpf.requests import client  # here, because root does without

        given = _without_variables_for_root(arguments, asked.options)
        client.require_requestable(given)
        off = not asked.keepalive
        tree = cgroups.find_tree(mountinfo.own_mounts())
        with placement.entered_by_user(tree, name, program) as path:
            client.attach(path, given, off=off, defaults=False, existing=False)
    if asked.debug and (why := _why_unlogged()):
        _warn(f"DD_DEBUG: no socket is logged: {why}")
    for warning in asked.warnings:
        _warn(f"{warning}; ignored")
    in_session = scopes.is_in_session(cgroups.path_of_process("self"))
    if away := clients.started_elsewhere(words, in_session=in_session):
        _warn(away)
    become(program, words, umask=arguments.umask)


def _warn(text: str) -> None:
    from kabpf import output  # here, because run does without

    print(f"kabpfctl: {output.shown(text)}", file=sys.stderr)


def _without_variables_for_root(
    arguments: argparse.Namespace, options: Mapping[str, str]
) -> dict[str, str]:
    """The options without those that a variable gives and a user may not have."""
    given = dict(options)
    for row in BEFORE_SYN:
        if row.key in given and not getattr(arguments, row.key):
            del given[row.key]
            _warn(f"{variables.VARIABLES[row.key][0]}: needs root; ignored")
    return given


def _why_unlogged() -> str | None:
    """What keeps kabpfd from writing what happens to sockets to the journal, if anything does."""
    if os.geteuid() != 0:
        return "it needs root"
    if not loading.kind(PINS).reports_events:
        return "it needs BTF, which the bcc loader does without"
    return None if pidlock.running() else "kabpfd is not running; try: systemctl start kabpf"


def requested(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Asked:
    """What the command line asks for, and else the environment. Raises PolicyError."""
    given = {key: getattr(arguments, key) for key in COMMAND_KEYS if getattr(arguments, key)}
    for key in given if arguments.policy or arguments.off else ():
        flag, other = key.replace("_", "-"), "policy" if arguments.policy else "off"
        arguments.refuse(f"argument --{flag}: not allowed with argument --{other}")
    asked = variables.read(environ, _decided(arguments, given))
    texts = {**asked.options, **given}
    missing = [key for key in TIMERS if key not in texts]
    if texts.get("user_timeout") == "auto" and "preset" not in texts and missing:
        raise PolicyError(
            f"--user-timeout: auto without {', '.join(missing)},"
            " expected all of idle, interval and probes"
        )
    return asked._replace(keepalive=asked.keepalive and not arguments.off, options=texts)


def _decided(arguments: argparse.Namespace, given: Collection[str]) -> set[str]:
    """What the environment has no say in."""
    if arguments.policy or arguments.off:
        return {*variables.VARIABLES} - {"debug"}
    decided = {"keepalive", *given} if given else set()
    return decided | ({*TIMERS} if "preset" in given else set())


def _rules(asked: Asked) -> Rules:
    if not asked.keepalive:
        return Rules(Options(keepalive=False))
    source = Source("run", 0)
    draft = options.parse({key: Node(text, key, source) for key, text in asked.options.items()})
    try:
        return Rules(options.finish(draft, "this command")[0])
    except PolicyError as error:
        raise PolicyError(str(error).removeprefix(f"{source}: ")) from None


def _named(name: str) -> Policy:
    """A policy that stands in the files, as it is now."""
    policies = {policy.name: policy for policy in files.load(files.SYSTEM) if not policy.until}
    if name not in policies:
        expected = ", ".join(policies) or "one in the policy files"
        raise RefusedError(f"no policy {name}", hint=f"expected {expected}")
    return policies[name]


def find(command: str) -> str:
    """The file that execvp(3) would execute. Raises CommandError."""
    directories = [""] if "/" in command else os.get_exec_path()
    candidates = [os.path.join(directory, command) for directory in directories if command]
    for path in candidates:
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise CommandError(
        command, errno.EACCES if any(map(os.path.exists, candidates)) else errno.ENOENT
    )


def _cover(tree: CgroupTree, cgroup: Cgroup, rules: Rules, *, log: bool) -> None:
    """Activate a policy on this process's cgroup, and leave it to a file. Under the lock."""
    file = transient.drop_in(cgroup.name)
    source = Source(str(file), 1)
    policy = Policy(
        file.stem,
        (Selector("cgroup", cgroup.path, source),),
        rules,
        source,
        existing=False,  # there is none, and so no look at the sockets of the machine
        log=log,
        until=Until(cgroup.path, cgroup.id),
    )
    before = files.stamp(files.SYSTEM)
    pidlock.tell_changed()  # first, for it to find what is left where this process dies
    fault_point("write the drop-in")
    with dropins.written(file, transient.text(policy)):
        if not _added(tree, cgroup, policy, before):
            from kabpf.apply import reconcile, waiting  # here, because most runs do without

            active = waiting.look().active()
            with reconcile.open_or_load(active.snapshot.policies, tree) as loaded:
                reconcile.reconcile(active.snapshot, loaded)
            for warning in waiting.left_out(active.problem):
                _warn(warning)


def _added(tree: CgroupTree, cgroup: Cgroup, policy: Policy, before: str) -> bool:
    """Activate it without a look at anything else; False where that is not enough."""
    if is_interrupted(PINS):
        return False
    try:
        loaded = loading.open_if_loaded(PINS, tree)
    except RefusedError:  # damaged, or of another version
        return False
    if loaded is None:
        return False
    with loaded:
        return single.add(policy, cgroup, loaded, (before, files.stamp(files.SYSTEM)))


def become(program: str, words: list[str], *, umask: int) -> NoReturn:
    """Execute a file with these arguments, as if this process had never been Python. Raises
    CommandError."""
    # Python ignores them from its start; what they were before can't be told.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.umask(umask)
    _restore_locale()
    # execv(3) takes the environment as it came; os.environ lacks what has no name, or one twice.
    try:
        try:
            os.execv(program, words)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            os.execv("/bin/sh", ["/bin/sh", program, *words[1:]])  # as execvp(3) does
    except OSError as error:
        raise CommandError(words[0], error.errno or 0) from None


def _restore_locale() -> None:
    """Take back what Python itself has put into the environment: where the locale is C, it sets
    LC_CTYPE (PEP 538)."""
    with contextlib.suppress(OSError):
        # What this process was started with.
        first = proc.read("/proc/self/environ", ENVIRONMENT_MAX)
        if match := re.search(rb"(?:\A|\0)LC_CTYPE=([^\0]*)", first):
            os.putenv(b"LC_CTYPE", match[1])
        else:
            os.unsetenv(b"LC_CTYPE")
