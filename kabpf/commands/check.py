"""kabpfctl check: whether policy files are right."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from kabpf import output
from kabpf.apply import reconcile
from kabpf.doctor import elsewhere
from kabpf.errors import KabpfError, PolicyError
from kabpf.kernel import cgroups, dataplane, loading, mountinfo
from kabpf.kernel.loading import Loader
from kabpf.plan.resolve import left_text
from kabpf.policy import btf_required, files, parser
from kabpf.policy.model import Policy, warnings
from kabpf.systemd import late_mounts


def check(arguments: argparse.Namespace) -> int:
    """Check policy files; needs no root."""
    results: list[dict[str, Any]] = []
    loader = arguments.loader or loading.loader(dataplane.PINS)
    if arguments.files:
        for name in arguments.files:
            results.append(checked(name, partial(_read_alone, Path(name)), loader))
    else:
        read = cache(partial(files.load, files.SYSTEM))
        result = checked("policy files", read, loader)
        with contextlib.suppress(PolicyError):  # which is among the errors
            result["warnings"] += late_mounts.warnings(files.paths(files.SYSTEM))
            result["warnings"] += files.unwatched(files.SYSTEM)
            result["warnings"] += _unreached(read)
        results.append(result)
    if arguments.json:
        output.print_json({"files": results})
    for result in results:
        for warning in result["warnings"]:
            print(f"warning: {output.shown(warning)}", file=sys.stderr)
        if result["errors"]:
            print("\n".join(map(output.shown, result["errors"])), file=sys.stderr)
        elif not arguments.json:
            count = output.count(len(result["policies"]), "policy", "policies")
            warned = output.count(len(result["warnings"]), "warning")
            more = f", {warned}" if result["warnings"] else ""
            print(f"{output.shown(result['file'])}: ok, {count}{more}")
    return 1 if any(result["errors"] for result in results) else 0


def checked(name: str, read: Callable[[], tuple[Policy, ...]], loader: Loader) -> dict[str, Any]:
    """What is wrong, and what to warn of, in the policies that `read` reads."""
    result: dict[str, Any] = {"file": name, "policies": [], "errors": [], "warnings": []}
    try:
        policies = read()
        if loader == Loader.BCC:
            btf_required.require(policies)
    except PolicyError as error:
        return result | {"errors": list(error.findings)}
    left = reconcile.left_of(policies)
    warned = [*warnings(policies), *map(left_text, left)]
    return result | {
        "policies": [each.name for each in policies if each.wishes is None],
        "warnings": warned,
    }


def _unreached(read: Callable[[], tuple[Policy, ...]]) -> list[str]:
    """Units whose policy does not reach their sockets now."""
    with contextlib.suppress(KabpfError):
        tree = cgroups.find_tree(mountinfo.own_mounts())
        found = elsewhere.of_policies(read(), tree)
        return [f"{each.text}; {each.advice}" for each in found]
    return []


def _read_alone(path: Path) -> tuple[Policy, ...]:
    """One file's policies, with the defaults of the installed files if they can be read. A file
    that is installed itself is judged as such."""
    if path.absolute().parent in files.SYSTEM.all:
        files.require_visible(path.absolute(), files.SYSTEM.hidden)
    defaults: list[parser.PolicyFile] = []
    with contextlib.suppress(PolicyError):
        for installed in files.paths(files.SYSTEM):
            with contextlib.suppress(PolicyError):
                defaults.append(files.read(installed)._replace(policies=()))
    return parser.combine([*defaults, files.read(path)])
