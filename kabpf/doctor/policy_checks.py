"""What is odd about policy files that are right: files and policies that do not count, selectors
that name nothing, policies that are beaten everywhere, options that fall back to the system's."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from shlex import quote

from kabpf.doctor.findings import Finding, Findings, listed, note, warning
from kabpf.errors import PolicyError
from kabpf.kernel import mountinfo, version1
from kabpf.plan.patterns import Naming
from kabpf.plan.state import Cgroup
from kabpf.policy import files
from kabpf.policy.files import Directories
from kabpf.policy.model import Policy, Selector
from kabpf.policy.parser import PolicyFile
from kabpf.policy.presets import presets
from kabpf.policy.yaml import Source
from kabpf.systemd.names import nearest

# By the kind of selector: the names of unit files, and the units that they are (`unit_names`).
UnitFiles = Mapping[str, Mapping[str, str]]

MADE_BY_PROGRAMS = (".scope", ".slice")  # units that need no file

MOUNT = re.compile(r"/sys/fs/cgroup(/unified)?(?=/)")
NEAR_MAX = 20  # names that a near one is looked for, which takes some milliseconds each
CANDIDATES_MAX = 10_000  # of which users may make more, and all alike


def replaced(directories: Directories) -> Findings:
    """Files that do not count because a stronger directory has one of their name."""
    strongest: dict[str, Path] = {}
    for directory in directories.drop_ins:
        for path in sorted(_entries(directory)):
            if not files.has_policy_name(path.name):
                continue
            winner = strongest.setdefault(path.name, path)
            if winner != path:
                done = "masks" if files.is_mask(winner) else "takes the place of"
                yield note(
                    f"{winner} {done} {path}",
                    f"nothing if that is meant; else: diff {quote(str(path))} {quote(str(winner))}",
                )


def ignored(directories: Directories) -> Findings:
    """Files that nobody reads, because of their names."""
    main = directories.main
    for path in sorted(_entries(main.parent)):
        if path != main and path.suffix in (".yaml", ".yml") and not path.is_dir():
            yield warning(
                f"{path} is not read", f"mv -n {quote(str(path))} {directories.drop_ins[0]}/"
            )
    for directory in directories.drop_ins:
        for path in sorted(_entries(directory)):
            # A mounted Kubernetes ConfigMap has its files behind ..data; vi keeps .x.yaml.swp.
            if files.has_policy_name(path.name) or (
                path.name.startswith(".") and path.suffix != ".yaml"
            ):
                continue
            if path.suffix.lower() in (".yml", ".yaml") and not path.name.startswith("."):
                yield warning(
                    f"{path} is not read",
                    f"mv -n {quote(str(path))} {quote(str(path.with_suffix('.yaml')))}",
                )
            else:
                yield note(
                    f"{path} is not read, because of its name",
                    "rename it to end in .yaml if it is a policy file; else nothing",
                )


def namesakes(parsed: dict[Path, PolicyFile]) -> Findings:
    """Policies that do not count because a later one has their name."""
    last: dict[str, Policy] = {}
    for file in parsed.values():
        for draft in file.policies:
            policy = draft.policy
            if policy.name in last:
                yield note(
                    f"policy {policy.name} of {last[policy.name].source} is replaced by"
                    f" {policy.source}",
                    f"give one another name: {_edit(last[policy.name].source)}",
                )
            last[policy.name] = policy


def selectors(
    policies: tuple[Policy, ...],
    cgroups: dict[Cgroup, str | None],
    units: UnitFiles,
) -> Findings:
    """Selectors that name no cgroup, and policies that are beaten in each. `cgroups` have the name
    of the policy that they have."""
    naming = Naming(policies)
    named: set[tuple[str, Selector]] = set()
    where: dict[str, list[Cgroup]] = {}
    for cgroup in cgroups:
        for policy, selector in naming(cgroup.path):
            named.add((policy.name, selector))
            where.setdefault(policy.name, []).append(cgroup)
    in_vain = [
        (policy, selector)
        for policy in policies
        for selector in policy.selectors
        if (policy.name, selector) not in named and not selector.is_of_containers
    ]
    yield from _in_vain(in_vain, cgroups, units)
    for name, named_cgroups in where.items():
        winners = {cgroups[cgroup] for cgroup in named_cgroups}
        if name not in winners:
            yield note(
                f"policy {name} is beaten in every cgroup that it names, by"
                f" {listed(sorted(filter(None, winners)))}",
                f"nothing if that is meant; why: kabpfctl explain {quote(named_cgroups[0].path)}",
            )


def _in_vain(
    selectors: list[tuple[Policy, Selector]], cgroups: Iterable[Cgroup], units: UnitFiles
) -> Findings:
    """Most are of what does not run now, which one finding says of all."""
    not_running: list[str] = []
    for count, (policy, selector) in enumerate(selectors):
        candidates = _candidates(selector, cgroups, units) if count < NEAR_MAX else []
        here = f"{selector.source}: {selector.kind} {selector.text} of policy {policy.name}"
        if selector.kind == "cgroup":
            slip = _slip_in_path(here, selector, candidates)
        else:
            slip = _slip_in_unit(here, selector, candidates, units[selector.kind])
        if slip:
            yield slip
        else:
            not_running.append(selector.text)
    if not_running:
        yield note(
            f"without a cgroup now: {listed(not_running)}",
            "nothing if they are stopped; to see what is covered: kabpfctl plan",
        )


def _slip_in_path(here: str, selector: Selector, candidates: list[str]) -> Finding | None:
    if described := version1.described(selector.text, mountinfo.visible_mounts()):
        return warning(f"{here}: {described}", f"select those cgroups: {_edit(selector.source)}")
    if mount := MOUNT.match(selector.text):
        path = selector.text.removeprefix(mount[0])
        return warning(
            f"{here}: drop the {mount[0]} prefix", f"select {path}: {_edit(selector.source)}"
        )
    near = None if selector.is_glob else nearest(selector.text.rpartition("/")[2], candidates)
    if not near:
        return None
    return warning(f"{here}: no such cgroup", f"if you mean {near}: {_edit(selector.source)}")


def _slip_in_unit(
    here: str, selector: Selector, candidates: list[str], files: Mapping[str, str]
) -> Finding | None:
    real = {files[name] for name in files if _is_named(name, selector.text)}
    if real == {""}:
        return note(f"{here} is masked", f"systemctl unmask {quote(selector.text)}")
    if any(_is_named(name, selector.text) for name in real):
        return None
    if real:
        (name, *_) = sorted(real - {""})
        return warning(
            f"{here} is an alias, and the cgroup is {name}",
            f"select {name}: {_edit(selector.source)}",
        )
    if selector.text.endswith(MADE_BY_PROGRAMS):
        return None
    near = None if selector.is_glob else nearest(selector.text, candidates)
    meant = f"if you mean {near}" if near else "correct the name"
    advice = f"{meant}: {_edit(selector.source)}"
    # Users may have units in their homes.
    grade = note if selector.kind == "user_unit" and not near else warning
    return grade(f"{here}: no such unit, running or installed", advice)


def _is_named(unit: str, text: str) -> bool:
    """Whether a selector's text means a unit, or instances of it."""
    template = re.sub(r"@.*(\.[a-z]+)$", r"@\1", text)
    return fnmatch.fnmatchcase(unit, text) or unit == template


def _candidates(selector: Selector, cgroups: Iterable[Cgroup], units: UnitFiles) -> list[str]:
    if selector.kind == "cgroup":
        above = selector.text.rpartition("/")[0]
        inside = (each.name for each in cgroups if each.path.rpartition("/")[0] == above)
        return [*itertools.islice(inside, CANDIDATES_MAX)]
    # Without systemd's escape (cg_unescape()), and nothing is meant for itself.
    names = (cgroup.name.removeprefix("_") for cgroup in cgroups)
    found = (each for each in (*units[selector.kind], *names) if each != selector.text)
    return [*itertools.islice(dict.fromkeys(found), CANDIDATES_MAX)]


def fallbacks(policies: tuple[Policy, ...], idle_s: int | None, retries_s: int | None) -> Findings:
    """Policies that leave idle or user timeout to the system, where that helps nobody. Given are
    the system's idle time, and how long it waits for data to be acknowledged."""
    on = [policy for policy in policies if policy.rules.options.keepalive]
    if idle_s and (without := [policy for policy in on if not policy.rules.options.idle_s]):
        known = presets().values()
        late = sum(1 for preset in known if preset.timeout_s <= idle_s)
        names = listed([policy.name for policy in without])
        yield (warning if late else note)(
            f"no idle in {names}: the first probe comes after {idle_s} s"
            f" (net.ipv4.tcp_keepalive_time), too late for {late} of {len(known)} presets",
            f"give idle or a preset (kabpfctl presets): {_edit(without[0].source)}",
        )
    unlimited = [policy for policy in on if "user_timeout" not in policy.origins]
    if retries_s and unlimited:
        yield note(
            f"no user timeout in {listed([policy.name for policy in unlimited])}: while data is"
            f" unacknowledged no probe is sent, and the connection ends after about {retries_s} s"
            " (net.ipv4.tcp_retries2); a user timeout ends it sooner, and those of readers that"
            " pause",
            "nothing, or give one; its price: man kabpf.yaml",
        )


def _edit(source: Source) -> str:
    return f"kabpfctl edit {quote(os.path.basename(source.path))}"


def _entries(directory: Path) -> list[Path]:
    try:
        return files.entries(directory)
    except PolicyError:  # said where the files are loaded
        return []
