"""Names of units and cgroups as people type them, taken as systemctl(1) takes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from kabpf.errors import RefusedError
from kabpf.kernel import mountinfo, version1
from kabpf.kernel.cgroups import CgroupTree
from kabpf.plan.patterns import compiled, patterns_of
from kabpf.plan.state import Cgroup
from kabpf.policy import selectors
from kabpf.policy.model import GLOB, Selector
from kabpf.policy.yaml import Source
from kabpf.systemd import relations
from kabpf.systemd.unit_files import is_name
from kabpf.systemd.units import DIRECTORIES, real_name, template_of, unit_names

SHOWN_MAX = 5  # cgroups in one error
NEAR = 0.75  # how alike two names are that may be meant for each other (difflib)


def unit(text: str) -> str:
    """The unit that a name means: one without a type is a service, and an alias is the unit that it
    is of; a glob stays one. "" is masked."""
    if GLOB.search(text):
        return text
    name = text if is_name(text) and text.rpartition(".")[2] in selectors.UNIT_TYPES else ""
    return real_name(unit_names(DIRECTORIES["unit"]), name or f"{text}.service") or text


def covered_by(text: str) -> tuple[str, ...]:
    """The names of cgroups, or globs, that a policy's `unit:` of this text covers: the unit's and
    those of its sockets."""
    selector = Selector("unit", selectors.instances(unit(text)), Source("", 0))
    (followed,) = relations.related([selector])
    return tuple(dict.fromkeys(names[-1] for _, _, names in patterns_of(followed)))


def cgroups_of(text: str, cgroups: Iterable[Cgroup]) -> Iterator[Cgroup]:
    """Those of the cgroups that a policy's `unit:` of this text covers, or that have it as their
    name."""
    globs = [compiled(name) for name in (*covered_by(text), text)]
    return (each for each in cgroups if any(glob.match(each.name) for glob in globs))


def require_unit(text: str, tree: CgroupTree) -> None:
    """Raise RefusedError where a name means no unit that runs or has a file; a glob may mean those
    of later."""
    if GLOB.search(text):
        return
    meant = {unit(text), template_of(unit(text)), text}
    globs = [compiled(name) for name in covered_by(text)]
    files = [name for each in DIRECTORIES.values() for name in unit_names(each)]
    running = [each.name for each in tree.cgroups()]
    for name in (*files, *running):
        if name in meant or any(glob.match(name) for glob in globs):
            return
    # Without systemd's escape (cg_unescape()).
    found = nearest(unit(text), [*files, *(name.removeprefix("_") for name in running)])
    advice = f"did you mean {found}?" if found else "try: systemctl list-units --all"
    raise RefusedError(f"{text}: no such unit, running or installed; {advice}")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The name of the same type that is nearest; the type itself would make any two alike."""
    import difflib  # here, because it takes 5 ms and most names are right

    stem, type_ = os.path.splitext(name)
    stems = {os.path.splitext(each)[0] for each in candidates if os.path.splitext(each)[1] == type_}
    longer = sorted(each for each in stems if each.startswith(f"{stem}-"))
    found = difflib.get_close_matches(stem, stems, 1, NEAR) or longer
    return f"{found[0]}{type_}" if found else None


def path(tree: CgroupTree, text: str) -> str:
    """The cgroup path that is meant by a directory below the mount, by a path as systemd-cgls(1)
    prints it, or by the name of a unit that runs. Raises RefusedError."""
    try:
        return tree.path(text)
    except RefusedError:
        if not text or os.path.exists(text):
            raise
        inside = _absolute(text)
        if os.path.isdir(tree.directory(inside)):
            return inside
        if "/" in text:
            raise
    found = _named(tree, text)
    if len(found) == 1:
        return found[0]
    if not found:
        raise RefusedError(
            f"cgroup {text}", hint=f"expected a directory below {tree.mount}, or a running unit"
        )
    more = f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
    raise RefusedError(
        f"{text} is ambiguous: {', '.join(found[:SHOWN_MAX])}{more}",
        hint="give one of these paths",
    )


def find(tree: CgroupTree, text: str) -> Cgroup:
    """The cgroup at `path`. Raises RefusedError where there is none; it says so where it is one of
    version 1."""
    try:
        return tree.find(path(tree, text))
    except RefusedError as error:
        if described := version1.described(_absolute(text), mountinfo.visible_mounts()):
            raise RefusedError(described, hint="expected one of version 2") from None
        raise error


def _absolute(text: str) -> str:
    return os.path.normpath("/" + text.lstrip("/"))  # which keeps a second slash


def _named(tree: CgroupTree, text: str) -> list[str]:
    names = {text, next(iter(covered_by(text)))}
    return [each.path for each in tree.cgroups() if each.name in names]
