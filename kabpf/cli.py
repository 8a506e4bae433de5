"""kabpfctl: the command line. Nouns read, verbs change; nothing here knows the kernel.

Exit status: 0 done, 1 an expected failure (said on standard error), 2 wrong usage, 3 a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kabpf import __version__, cgroups, daemon, dataplane, plan, policy, reconcile
from kabpf.cgroups import CgroupTree
from kabpf.dataplane import Counters, Dataplane
from kabpf.errors import KabpfError, PolicyError, RefusedError
from kabpf.policy import Options, Policy
from kabpf.reconcile import Resolution

RUNTIME = Path("/run/kabpf/policy.d")
PERSISTENT = Path("/etc/kabpf/policy.d")
# Read last, so that what a person attaches by hand wins over a file that names the same path.
ATTACHED = "zz-attach-"

OPTION_KEYS = ("idle", "interval", "probes", "user_timeout")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command != "check" and os.geteuid() != 0:
            raise RefusedError(f"{parsed.command}: not root", hint="expected root")
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except KabpfError as error:
        for line in f"kabpfctl: {error}".expandtabs().splitlines():
            print(_shown(line), file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at exit
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        print("kabpfctl: this is a bug in kabpf; please report the lines above", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kabpfctl",
        description="TCP keepalive by policy, for the sockets of selected cgroups.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kabpfctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    attach = _command(commands, "attach", _attach, "put a policy in force on one cgroup")
    attach.add_argument("--cgroup", required=True, metavar="PATH", help="the cgroup's directory")
    for key in OPTION_KEYS:
        attach.add_argument(_flag(key), type=_option(key), metavar=_METAVARS[key], help=_HELP[key])
    attach.add_argument(
        "--persist", action="store_true", help=f"keep it over a reboot, in {PERSISTENT}"
    )

    detach = _command(commands, "detach", _detach, "undo attach; sockets keep their options")
    which = detach.add_mutually_exclusive_group(required=True)
    which.add_argument("--cgroup", metavar="PATH", help="the cgroup's directory")
    which.add_argument(
        "--all", action="store_true", help="undo every attach and take kabpf out of the kernel"
    )

    _command(commands, "apply", _apply, "put the policy files in force")
    check = _command(commands, "check", _check, "check policy files; needs no root")
    check.add_argument("files", nargs="*", metavar="FILE", help="default: the installed ones")
    _command(commands, "plan", _plan, "show which cgroup gets what, and what apply would do")
    _command(commands, "status", _status, "show what is in force, and what it did")
    return parser


_METAVARS = {"idle": "TIME", "interval": "TIME", "probes": "N", "user_timeout": "TIME"}
_HELP = {
    "idle": "silence before the first probe: 60, 90s, 5m, 1h",
    "interval": "time between probes",
    "probes": "unanswered probes before the connection is given up",
    "user_timeout": "limit for unacknowledged data: a time, auto or off",
}


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], purpose: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=purpose, description=purpose, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _option(key: str) -> Callable[[str], str]:
    """A checker for argparse: the option's own rules, as policy files have them."""

    def checked(text: str) -> str:
        try:
            policy.check_option(key, text)
        except PolicyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return checked


def _attach(arguments: argparse.Namespace) -> int:
    tree = cgroups.find_tree(cgroups.own_mounts())
    options = {key: getattr(arguments, key) for key in OPTION_KEYS if getattr(arguments, key)}
    with reconcile.locked():
        cgroup = tree.find(arguments.cgroup)
        file = _attached_file(PERSISTENT if arguments.persist else RUNTIME, cgroup.path)
        if not arguments.persist and (PERSISTENT / file.name).exists():
            raise RefusedError(
                f"{cgroup.path} is attached by {PERSISTENT / file.name} already",
                hint="expected --persist to change it",
            )
        with _written(file, _attached_policy(cgroup.path, options)):
            policies = policy.load(policy.SYSTEM)
            found = reconcile.preview(policies, tree, None).plan.cgroups.get(cgroup.id)
            if found is None:
                raise RefusedError(f"cgroup {cgroup.path} is gone", hint="expected it to stay")
            winner = found.policy
            if winner is None or winner.source.path != str(file):
                other = winner.source if winner else "a mask"
                raise RefusedError(
                    f"{cgroup.path} has its policy from {other}, which is read later",
                    hint="expected no other file to name this path",
                )
            loaded = dataplane.open_or_load(dataplane.PINS, tree)
        with loaded:
            before = _retrofitted(loaded, winner)
            _reconcile(policies, tree, loaded)
            changed = _retrofitted(loaded, winner) - before
    result = {
        "cgroup": cgroup.path,
        "policy": winner.name,
        "file": str(file),
        "options": dataclasses.asdict(winner.options),
        "retrofitted": changed,
    }
    options_text = _options_text(winner.options)
    text = f"{_shown(cgroup.path)}: {options_text}; {_count(changed, 'open socket')} changed"
    return _print(arguments, result, text)


def _retrofitted(loaded: Dataplane, wanted: Policy) -> int:
    """How many open sockets a policy has changed; 0 for one that is not in the kernel yet."""
    ids = [id for id, found in loaded.records().items() if found == plan.record(wanted)]
    return sum(counters.retrofitted for counters in loaded.counters(ids).values())


def _detach(arguments: argparse.Namespace) -> int:
    tree = cgroups.find_tree(cgroups.own_mounts())
    path = "/" if arguments.all else tree.path(arguments.cgroup)
    pattern = f"{ATTACHED}*.yaml" if arguments.all else _attached_file(RUNTIME, path).name
    with reconcile.locked():
        removed = [
            file for directory in (RUNTIME, PERSISTENT) for file in sorted(directory.glob(pattern))
        ]
        if not removed and not arguments.all:
            raise RefusedError(f"{path} is not attached", hint="expected an attached cgroup")
        with contextlib.ExitStack() as stack:
            for file in removed:
                stack.enter_context(_written(file, None))
            policies = () if arguments.all else policy.load(policy.SYSTEM)
        if arguments.all:
            dataplane.lift(dataplane.PINS)
            daemon.tell_changed()
        else:
            with dataplane.open_or_load(dataplane.PINS, tree) as loaded:
                _reconcile(policies, tree, loaded)
    text = f"{_shown(path)}: detached"
    if arguments.all:
        files = len(policy.files(policy.SYSTEM))
        stay = f"; {_count(files, 'policy file')} left for kabpfctl apply" if files else ""
        text = f"kabpf is out of the kernel{stay}"
    return _print(arguments, {"removed": [str(file) for file in removed]}, text)


def _apply(arguments: argparse.Namespace) -> int:
    tree = cgroups.find_tree(cgroups.own_mounts())
    with reconcile.locked():
        policies = policy.load(policy.SYSTEM)
        with dataplane.open_or_load(dataplane.PINS, tree) as loaded:
            resolution = _reconcile(policies, tree, loaded)
    result = {
        "policies": len(resolution.plan.policies),
        "cgroups": len(resolution.cgroups),
        "covered": len(_covered(resolution)),
        "changes": _changes_json(resolution),
    }
    in_force = _count(len(policies), "policy", "policies")
    covered = f"{result['covered']} of {_count(len(resolution.cgroups), 'cgroup')} covered"
    text = f"{in_force} in force, {covered}; changed: {_changes_text(resolution)}"
    return _print(arguments, result, text)


def _check(arguments: argparse.Namespace) -> int:
    results: list[dict[str, Any]] = []
    if arguments.files:
        for name in arguments.files:
            results.append(_checked(name, partial(_read_alone, Path(name))))
    else:
        results.append(_checked("policy files", partial(policy.load, policy.SYSTEM)))
    if arguments.json:
        print(json.dumps(results, indent=2))
    for result in results:
        if result["errors"]:
            print("\n".join(map(_shown, result["errors"])), file=sys.stderr)
        elif not arguments.json:
            count = _count(len(result["policies"]), "policy", "policies")
            print(f"{result['file']}: ok, {count}")
    return 1 if any(result["errors"] for result in results) else 0


def _checked(name: str, read: Callable[[], tuple[Policy, ...]]) -> dict[str, Any]:
    try:
        return {"file": name, "policies": [found.name for found in read()], "errors": []}
    except PolicyError as error:
        return {"file": name, "policies": [], "errors": list(error.findings)}


def _read_alone(path: Path) -> tuple[Policy, ...]:
    """One file's policies, with the defaults of the installed files if they can be read."""
    defaults: list[policy.PolicyFile] = []
    with contextlib.suppress(PolicyError):
        for installed in policy.files(policy.SYSTEM):
            with contextlib.suppress(PolicyError):
                defaults.append(dataclasses.replace(policy.read(installed), policies=()))
    return policy.combine([*defaults, policy.read(path)])


def _plan(arguments: argparse.Namespace) -> int:
    tree = cgroups.find_tree(cgroups.own_mounts())
    with _opened(tree) as loaded:
        resolution = reconcile.preview(policy.load(policy.SYSTEM), tree, loaded)
    covered = _covered(resolution)
    result = {
        "cgroups": [
            {
                "cgroup": path,
                "policy": found.name,
                "source": str(found.source),
                "options": dataclasses.asdict(found.options),
            }
            for path, found in covered
        ],
        "changes": _changes_json(resolution),
    }
    rows = [
        (_shown(path), found.name, *_option_cells(found.options), str(found.source))
        for path, found in covered
    ]
    table = _table(("CGROUP", "POLICY", *_OPTION_HEADS, "FROM"), rows) if rows else ""
    return _print(arguments, result, f"{table}apply would change: {_changes_text(resolution)}")


def _status(arguments: argparse.Namespace) -> int:
    tree = cgroups.find_tree(cgroups.own_mounts())
    policies, findings = _load_or_findings()
    with _opened(tree) as loaded:
        resolution = reconcile.preview(policies, tree, loaded)
        records = resolution.actual.records
        counters = loaded.counters(records) if loaded else {}
        totals = loaded.totals() if loaded else dataplane.Totals(0, 0)
    used = Counter(entry.policy_id for entry in resolution.actual.cgroups.values())
    sources = {found.name: str(found.source) for found in policies}
    in_force = sorted(
        (record.name, id, record.options)
        for id, record in records.items()
        if used[id] or record.name in sources
    )
    applied = not findings and not (resolution.changes if loaded else policies)
    pid = daemon.running()
    result = {
        "loaded": loaded is not None,
        "interrupted": dataplane.is_interrupted(dataplane.PINS),
        "cgroup2": str(tree.mount),
        "pins": str(dataplane.PINS),
        "daemon": pid,
        "new_cgroups_wait": resolution.plan.asks and not pid,
        "policy_files": {"policies": len(policies), "errors": findings, "applied": applied},
        "policies": [
            {
                "policy": name,
                "options": dataclasses.asdict(options),
                "cgroups": used[id],
                "counters": dataclasses.asdict(counters[id]),
                "source": sources.get(name),
            }
            for name, id, options in in_force
        ],
        "totals": dataclasses.asdict(totals),
    }
    rows = [
        (
            name,
            str(used[id]),
            *_option_cells(options),
            *_counter_cells(counters[id]),
            sources.get(name, "no file any more"),
        )
        for name, id, options in in_force
    ]
    heads = ("POLICY", "CGROUPS", *_OPTION_HEADS, *_COUNTER_HEADS, "FROM")
    table = f"\n{_table(heads, rows)}".rstrip() if rows else ""
    return _print(arguments, result, "\n".join(_status_lines(result)) + table)


def _status_lines(status: dict[str, Any]) -> Iterator[str]:
    if status["loaded"]:
        yield f"data plane: attached to {status['cgroup2']}, pinned at {status['pins']}"
    else:
        yield "data plane: not loaded; kabpfctl apply or systemctl start kabpf loads it"
    if status["interrupted"]:
        yield "  an interrupted command left pins in force beside it; kabpfctl apply clears up"
    if unrecorded := status["totals"]["unrecorded"]:
        yield f"  {_count(unrecorded, 'new cgroup')} not recorded, because there are too many"
    if status["daemon"]:
        yield f"daemon: running as process {status['daemon']}"
    else:
        yield "daemon: not running"
    if status["new_cgroups_wait"]:
        yield "  some new cgroups wait for kabpfctl apply: globs within names, or too many rules"
    files = status["policy_files"]
    if files["errors"]:
        yield "policy files: wrong; the last good ones stay in force"
        yield from (f"  {_shown(finding)}" for finding in files["errors"])
    elif files["applied"]:
        yield f"policy files: {'in force' if files['policies'] else 'none'}"
    else:
        yield "policy files: not in force as they are now; kabpfctl apply does it"
    yield ""


def _load_or_findings() -> tuple[tuple[Policy, ...], list[str]]:
    try:
        return policy.load(policy.SYSTEM), []
    except PolicyError as error:
        return (), list(error.findings)


def _reconcile(policies: tuple[Policy, ...], tree: CgroupTree, loaded: Dataplane) -> Resolution:
    try:
        return reconcile.reconcile(policies, tree, loaded)
    finally:
        daemon.tell_changed()


@contextlib.contextmanager
def _opened(tree: CgroupTree) -> Iterator[Dataplane | None]:
    loaded = dataplane.open_if_loaded(dataplane.PINS, tree)
    with loaded or contextlib.nullcontext():
        yield loaded


@contextlib.contextmanager
def _written(file: Path, content: bytes | None) -> Iterator[None]:
    """Replace a file, or with None remove it; where the block fails, put back what was there."""
    before = file.read_bytes() if file.exists() else None
    try:
        try:
            _write(file, content)
        except OSError as error:
            raise RefusedError(f"write {file}", error.errno or 0) from None
        yield
    except BaseException:
        _write(file, before)
        raise


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
        return
    if not file.parent.exists():
        file.parent.mkdir(parents=True)
        file.parent.chmod(0o755)  # whatever the umask: check needs no root
    fresh = file.with_name(f".{file.name}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
    os.rename(fresh, file)


def _attached_file(directory: Path, path: str) -> Path:
    """The drop-in of an attached cgroup, named by its path, escaped as systemd-escape(1) does."""
    special = re.compile(rb"[^A-Za-z0-9:_./]")
    plain = special.sub(lambda match: b"\\x%02x" % ord(match[0]), os.fsencode(path[1:])).decode()
    escaped = plain.replace("/", "-")
    if len(escaped) > 200:
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
        escaped = f"{escaped[:180]}-{digest}"
    return directory / f"{ATTACHED}{escaped or '-'}.yaml"


def _attached_policy(path: str, options: dict[str, str]) -> bytes:
    if policy.GLOB.search(path) or not path.isprintable():
        raise RefusedError(f"cgroup {path!r}", hint="expected a printable path without *, ? and [")
    keepalive = "{" + ", ".join(f"{key}: {text}" for key, text in options.items()) + "}"
    return (
        "# Written by kabpfctl attach; kabpfctl detach removes it.\n"
        f"select: [{{cgroup: {json.dumps(path)}}}]\n"
        f"keepalive: {keepalive if options else 'on'}\n"
    ).encode()


def _covered(resolution: Resolution) -> list[tuple[str, Policy]]:
    paths = resolution.cgroups
    return sorted(
        (
            (paths[id].path, found.policy)
            for id, found in resolution.plan.cgroups.items()
            if found.policy
        ),
        key=lambda item: item[0],
    )


def _changes_json(resolution: Resolution) -> dict[str, int]:
    changes = resolution.changes
    return {
        "policies": len(changes.records),
        "births": len(changes.births),
        "cgroups": len(changes.cgroups),
        "retrofits": len(changes.retrofits),
    }


def _changes_text(resolution: Resolution) -> str:
    changes = resolution.changes
    counts = (
        (len(changes.records), "policy", "policies"),
        (len(changes.cgroups) + len(changes.stale_cgroups), "cgroup", "cgroups"),
        (len(changes.births), "rule for new cgroups", "rules for new cgroups"),
    )
    return ", ".join(_count(*count) for count in counts if count[0]) or "nothing"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


_OPTION_HEADS = ("IDLE", "INTERVAL", "PROBES", "USER-TIMEOUT")
_COUNTER_HEADS = ("NEW", "LISTENERS", "RETROFITTED", "LEFT", "FAILED")


def _option_cells(options: Options) -> tuple[str, str, str, str]:
    if not options.keepalive:
        return ("off",) * 4
    return (
        _cell(options.idle_s, "s"),
        _cell(options.interval_s, "s"),
        _cell(options.probes, ""),
        _cell(options.user_timeout_ms, "ms"),
    )


def _cell(value: int | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "ms" and value % 1000 == 0:
        value, unit = value // 1000, "s"
    return f"{value}{unit}"


def _options_text(options: Options) -> str:
    if not options.keepalive:
        return "keepalive off"
    cells = zip(_OPTION_HEADS, _option_cells(options), strict=True)
    words = [f"{head.lower().replace('-', ' ')} {cell}" for head, cell in cells if cell != "-"]
    return "keepalive on" + "".join(f", {word}" for word in words)


def _counter_cells(counters: Counters) -> tuple[str, ...]:
    failed = ", ".join(f"{name} {count}" for name, count in sorted(counters.failed.items()))
    counts = (counters.established, counters.listening, counters.retrofitted, counters.left)
    return (*map(str, counts), failed or "0")


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def _shown(text: str) -> str:
    """A name from the file system, safe for a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _print(arguments: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
