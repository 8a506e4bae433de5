"""kabpfctl suggest: policies for the connections that audit finds at risk."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kabpf import output, root_files
from kabpf.apply import reconcile
from kabpf.apply.dropins import PERSISTENT
from kabpf.audit import effect, silence, suggestion
from kabpf.audit.connections import Connection
from kabpf.audit.units import Unit
from kabpf.commands import audit
from kabpf.commands.audit import Asked, time_text
from kabpf.containers.names import enclosing
from kabpf.errors import PolicyError, RefusedError
from kabpf.kernel import cgroups, mountinfo
from kabpf.observe import containers, sockets
from kabpf.policy import containers as conditions
from kabpf.policy import files, parser, presets, selectors, writer
from kabpf.policy.model import GLOB, Condition, Policy, Selector
from kabpf.policy.presets import Timeout
from kabpf.policy.yaml import Source

OF_USER = re.compile(r"/user\.slice/user-[0-9]+\.slice/user@[0-9]+\.service/.+")
# Of systemd-run, which counts them, takes random ones, or a process and its start.
TRANSIENT = re.compile(r"run-[upr][0-9a-f]+(-i[0-9]+)?\.(service|scope)")
# Of logind's sessions (session-3, session-c1), and desktops' applications by their process.
NUMBERED = re.compile(r"(.+)-c?[0-9]+(\.scope)$")
NOWHERE = Source("", 0)

FILES_MAX = 256  # at once: users may make cgroups with connections in them without end


class Proposal(NamedTuple):
    """A policy file that could be written."""

    file: Path
    text: str


class Named(NamedTuple):
    """What a file would be called, and select; nothing where its name says it."""

    stem: str
    selectors: tuple[Selector, ...] = ()


def suggest(arguments: argparse.Namespace) -> int:
    """Print a policy file for each unit at risk, or with --write write it; 1 where one can't be."""
    timeouts_s = [arguments.timeout] if arguments.timeout else []
    named = [arguments.preset] if arguments.preset else []
    (asked,) = audit.timeouts(timeouts_s, named)
    found = audit.look([asked], arguments.unit)
    proposals, left_out = proposed(found.units, asked)
    output.warn(found.notes)
    if arguments.write:
        written, refused = write(proposals)
        proposals, left_out = written, [*left_out, *refused]
    if arguments.json:
        policies = [{"file": str(each.file), "text": each.text} for each in proposals]
        output.print_json({"policies": policies, "written": arguments.write, "left_out": left_out})
    else:
        print("\n".join(map(output.shown, _lines(proposals, left_out, arguments))))
    output.warn(left_out)
    return 1 if left_out else 0


def _lines(
    proposals: list[Proposal], left_out: list[str], arguments: argparse.Namespace
) -> Iterator[str]:
    for each in proposals:
        yield f"wrote {each.file}" if arguments.write else f"write {each.file}:"
        if not arguments.write:
            yield from (f"    {line}" for line in each.text.rstrip("\n").split("\n"))
    if proposals:
        yield "then run: kabpfctl apply"
    elif not left_out:
        yield "nothing is at risk"


def proposed(units: list[Unit], asked: Asked) -> tuple[list[Proposal], list[str]]:
    """A policy file for each unit at risk, and why there is none for others. Instances of a
    template have one together, and so have scopes that are numbered."""
    by_file: dict[Named, list[Unit]] = {}
    left_out = []
    for unit in units:
        if not unit.at_risk:
            continue
        try:
            by_file.setdefault(named(unit.cgroup), []).append(unit)
        except RefusedError as error:
            left_out.append(f"{unit.name}: {error}")
    if not by_file:
        return [], left_out
    making = _Making(asked)
    if len(by_file) > FILES_MAX:
        left = f"{output.count(len(by_file) - FILES_MAX, 'more file')}: at most {FILES_MAX} at once"
        left_out.append(f"{left}; try: kabpfctl suggest --unit NAME")
        by_file = first(by_file, making.tree.owner)
    return making.all(by_file, left_out), left_out


def first(
    by_file: dict[Named, list[Unit]], owner: Callable[[str], int | None]
) -> dict[Named, list[Unit]]:
    """Of too many files those for cgroups of root's, and then those for most connections at risk.
    `owner` tells whose the cgroup at a path is."""

    def place(file: Named) -> tuple[bool, int]:
        units = by_file[file]
        is_roots = any(unit.cgroup and owner(unit.cgroup) in (0, None) for unit in units)
        return not is_roots, -sum(len(unit.at_risk) for unit in units)

    return {file: by_file[file] for file in sorted(by_file, key=place)[:FILES_MAX]}


class _Made(NamedTuple):
    """A file that was made for units, and as what it was read."""

    proposal: Proposal
    parsed: parser.PolicyFile
    units: list[Unit]

    @property
    def at_risk(self) -> list[Connection]:
        return [each.connection for unit in self.units for each in unit.at_risk]


class _Making:
    """Makes files for units, beside those that are installed."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        known = presets.presets()
        self._timeout = known[asked.preset] if asked.preset else Timeout(asked.timeout_s)
        self.tree = cgroups.find_tree(mountinfo.own_mounts())
        self._installed = [file for _, file in files.read_all(files.SYSTEM).values()]
        self._names = {path.name for path in files.paths(files.SYSTEM)}
        self._present = self._resolved(self._installed)

    def all(self, by_file: dict[Named, list[Unit]], left_out: list[str]) -> list[Proposal]:
        """The files that do what they are for; `left_out` is told of the others."""
        made = []
        for named, units in by_file.items():
            try:
                made.append(self._one(named, units))
            except (PolicyError, RefusedError) as error:
                left_out += [f"{unit.name}: {error}" for unit in units]
        planned = self._resolved([*self._installed, *(each.parsed for each in made)])
        kept = []
        for each in made:
            stronger = {
                policy
                for connection in each.at_risk
                if (policy := planned.get(connection.cgroup_id))
                and policy.source.path != str(each.proposal.file)
            }
            names = " and ".join(unit.name for unit in each.units)
            if stronger:
                winner = min(stronger, key=lambda policy: policy.name)
                left_out.append(f"{names}: {winner.source} is stronger; change that one instead")
                continue
            kept.append(each.proposal)
            if left := self._left(each.at_risk, planned):
                left_out.append(
                    f"{names}: {output.count(left, 'connection')} stay at risk: the application"
                    " turned keepalive off; mode: enforce turns it on"
                )
        return kept

    def _one(self, named: Named, units: list[Unit]) -> _Made:
        file = PERSISTENT / f"{named.stem}.yaml"
        at_risk = [each.connection for unit in units for each in unit.at_risk]
        # They are not applied yet, or a timer that runs has not ended yet.
        if not self._left(at_risk, self._present):
            raise RefusedError("the policy files are enough, after kabpfctl apply and a probe")
        if file.name in self._names or os.path.lexists(file):
            raise RefusedError(
                f"{file.name} is there already, and not enough; try: kabpfctl edit {named.stem}"
            )
        covered = {
            policy.name
            for connection in at_risk
            if (policy := self._present.get(connection.cgroup_id))
        }
        policy = suggestion.policy(
            str(file), named.stem, named.selectors, at_risk, self._timeout, is_covered=bool(covered)
        )
        text = writer.text(policy, self._evidence(units, covered))
        parsed = parser.parse(text.encode(), str(file))
        parser.combine([*self._installed, parsed])
        return _Made(Proposal(file, text), parsed, units)

    def _evidence(self, units: list[Unit], covered: set[str]) -> str:
        at_risk = sum(unit.counts[0].at_risk for unit in units)
        connections = sum(unit.connections for unit in units)
        longest = time_text(max(unit.longest_silence_ms for unit in units))
        instead = f"in place of policy {min(covered)}; " if covered else ""
        return (
            f"{at_risk} of {output.count(connections, 'connection')} at risk of an idle timeout of"
            f" {self._asked}, silent for up to {longest}; {instead}kabpfctl suggest,"
            f" {time.strftime('%Y-%m-%d')}"
        )

    def _resolved(self, parsed: list[parser.PolicyFile]) -> dict[int, Policy]:
        """The policies of cgroups, by their ids, under these files."""
        policies = parser.combine(parsed)
        planned = reconcile.preview(policies, self.tree, None).plan.cgroups
        return {id: found.policy for id, found in planned.items() if found.policy}

    def _left(self, at_risk: list[Connection], planned: dict[int, Policy]) -> int:
        """How many connections would be at risk all the same if they were opened under policies."""
        left = 0
        for connection in at_risk:
            has = effect.under(planned.get(connection.cgroup_id))(connection)
            left += silence.of(connection, has).is_at_risk(self._asked.timeout_s) is True
        return left


def named(path: str | None) -> Named:
    """What a policy file for a cgroup would be called and select. Raises RefusedError where there
    is none that would do."""
    if path is None:
        raise RefusedError("its cgroup is gone, or outside of this cgroup namespace")
    if (container := containers.of(path)) is not None:
        if not container.name or GLOB.search(container.name):
            raise RefusedError("its container has no name that a policy could select")
        kind, found = "container", {"name": container.name}
        if container.pod and container.pod.namespace:  # pods' names end with the pod
            kind = "pod"
            found = {"namespace": container.pod.namespace, "container": container.name}
        wanted = tuple(Condition(key, "", name) for key, name in found.items())
        name = "/".join(found.values())
        return Named(_slug(kind, name), (conditions.of(kind, wanted, NOWHERE),))
    if enclosing(path):
        raise RefusedError("no engine knows its container's name")
    *around, unit = sockets.units(path) or ("",)
    if path == "/" or path.endswith(".slice"):
        raise RefusedError("a policy for it would cover all that is below it")
    if TRANSIENT.fullmatch(unit):
        raise RefusedError("its unit has another name at each start; select what starts it")
    is_users = OF_USER.fullmatch(path) is not None and not unit.startswith("user@")
    # Whoever has a cgroup calls those in it as they like: like a glob, or like another unit. And a
    # unit of a container's systemd is not the one of its name outside.
    is_inside = not is_users and not all(each.endswith(".slice") for each in around)
    if selectors.is_unit(unit) and GLOB.search(unit) is None and not is_inside:
        template = re.sub(r"@[^@]*(\.[a-z]+)$", r"@\1", unit)
        numbered = NUMBERED.match(template)
        common = "{}-*{}".format(*numbered.groups()) if numbered else template
        if is_users:
            name = "".join(numbered.groups()) if numbered else template
            return Named(_slug("user", name), (Selector("user_unit", common, NOWHERE),))
        if numbered:
            return Named(_slug("scope", numbered[1]), (Selector("unit", common, NOWHERE),))
        if selectors.named_by(template, "") and files.has_policy_name(f"{template}.yaml"):
            return Named(template)
    if not path.isprintable() or GLOB.search(path):
        raise RefusedError("its path can't be written into a policy file")
    return Named(_slug("cgroup", path[1:]), (Selector("cgroup", path, NOWHERE),))


def _slug(kind: str, name: str) -> str:
    """A file's name for what may be called anything."""
    plain = re.sub(r"[^A-Za-z0-9_.@-]+", "-", name)[:150]
    if plain != name:
        plain += "-" + hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()
    return f"{kind}-{plain}"


def write(proposals: list[Proposal]) -> tuple[list[Proposal], list[str]]:
    """Write files where there are none; those that were written, and what went wrong."""
    written, refused = [], []
    for each in proposals:
        try:
            root_files.create(each.file, each.text.encode(), mode=0o644)
            written.append(each)
        except OSError as error:
            refused.append(f"write {each.file}: {os.strerror(error.errno or 0)}")
    return written, refused
