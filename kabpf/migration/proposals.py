"""Policies that do the same as libkeepalive and libdontdie where these are preloaded, and what to
remove then."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kabpf.errors import PolicyError
from kabpf.migration import variables
from kabpf.migration.preloads import EVERYTHING, LIBRARY, PRELOAD, Environment, Place, find, unclear
from kabpf.policy import options, writer
from kabpf.policy.files import SYSTEM
from kabpf.policy.model import Direction, Options, Policy, Rules, Selector
from kabpf.policy.yaml import Source
from kabpf.systemd.unit_files import Assignment

# The one of M. Santos has a file of the same name as Debian's, and others beside it.
DEBIANS, SANTOS, DONTDIE = "libkeepalive", "libkeepalive of M. Santos", "libdontdie"
_PREFIXES = {DEBIANS: "KEEP", SANTOS: "TCP_", DONTDIE: "DD_"}  # of their variables
_SYN_RETRIES = "TCP_SYNCNT"  # of Santos, and beyond what kabpf.migration.variables knows
_VARIABLES = [*(name for names in variables.VARIABLES.values() for name in names), _SYN_RETRIES]
_SANTOS_DEFAULTS = {
    "TCP_KEEPIDLE": "15", "TCP_KEEPINTVL": "15", "TCP_KEEPCNT": "9", "TCP_USER_TIMEOUT": "-1",
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a policy has to say beside what it selects."""

    keepalive: bool = False
    options: Mapping[str, str] = field(default_factory=dict)  # as policy files spell them
    direction: Direction = Direction.BOTH
    log: bool = False


@dataclass(frozen=True)
class Proposal:
    """A policy file to write."""

    file: Path
    text: str


@dataclass(frozen=True)
class Removal:
    """What to take out of a line."""

    file: str
    line: int
    what: str


@dataclass
class Found:
    """What `kabpfctl import` says."""

    policies: list[Proposal] = field(default_factory=list)
    remove: list[Removal] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)


def look(root: Path) -> Found:
    """What the files below `root` have, and what to do."""
    found = Found()
    wanted: dict[Place, Wanted | None] = {}
    remove: dict[tuple[str, int, str], Removal] = {}
    environments = []
    for place, broader, given in find(root):
        environments.append(given)
        wanted[place], left_out = _wanted(given)
        around = wanted[broader] if broader else None
        if wanted[place] != around:
            found.policies.append(_proposal(place, wanted[place] or Wanted(), given))
        found.left_out += [each for each in left_out if each not in found.left_out]
        # The broader one is first: a template's line as it is written, not as an instance has it.
        remove = dict(_removals(given)) | remove
    found.remove = sorted(remove.values(), key=lambda each: (each.file, each.line))
    found.unclear = [
        f"{lines}: names {library}.so in a way that is not evaluated, expected Environment=,"
        " EnvironmentFile=, or env in ExecStart="
        for lines, library in unclear(root, environments)
    ]
    return found


def _kinds(given: Environment) -> list[str]:
    """Which of the libraries are preloaded."""
    names = set(given.libraries)
    kinds = [DONTDIE] if "libdontdie" in names else []
    if others := names - {"libdontdie"}:
        theirs = any(
            name.startswith(_PREFIXES[SANTOS]) for name in _VARIABLES if name in given.values
        )
        kinds.append(SANTOS if theirs or others != {"libkeepalive"} else DEBIANS)
    return kinds


def _owner(name: str, kinds: list[str]) -> str | None:
    """The library that reads a variable."""
    known = name in _VARIABLES
    return next((kind for kind in kinds if known and name.startswith(_PREFIXES[kind])), None)


def _wanted(given: Environment) -> tuple[Wanted | None, list[str]]:
    """What the libraries of an environment do, and what of it no policy says."""
    kinds = _kinds(given)
    if not kinds:
        return None, []
    values = dict(_SANTOS_DEFAULTS) if SANTOS in kinds else {}
    left_out: list[str] = []
    for name in _VARIABLES:
        if name in given.values and (owner := _owner(name, kinds)):
            values.pop(name, None)
            value, said = _value(given.values[name], owner)
            values |= {name: value} if value else {}
            left_out += said
    syn_retries = values.pop(_SYN_RETRIES, None)
    if values.get("TCP_USER_TIMEOUT") == "-1" and not _SANTOS_DEFAULTS.keys() <= values.keys():
        del values["TCP_USER_TIMEOUT"]  # of a time of the system's
    try:
        asked = variables.read(values)
    except PolicyError as error:  # two libraries are asked for different things
        asked = variables.Asked()
        where = next(one.lines for name, one in given.values.items() if name in values)
        left_out += [f"{where}: {finding}" for finding in error.findings]
    told = dict(asked.options) | ({"syn_retries": syn_retries} if syn_retries else {})
    wanted = Wanted(
        asked.keepalive,
        told if asked.keepalive else {},
        _direction(kinds, set(given.libraries)),
        asked.debug,
    )
    return wanted, left_out


def _value(one: Assignment, owner: str) -> tuple[str, list[str]]:
    """What a library makes of a variable; "" for nothing, and what there is to say of that."""
    number = re.match(r"\s*[+-]?[0-9]+", one.value)  # as atoi(3) does
    plain = str(int(number[0])) if number else one.value
    if owner == SANTOS and plain == "0":
        return "", []  # which means the system's
    try:
        _check(one.name, one.value)
    except PolicyError as error:
        said = f"{one.lines}: {error}"
    else:
        return one.value, []
    if one.name in variables.VARIABLES["once"]:
        return "", [said]
    try:
        _check(one.name, plain)
    except PolicyError:
        return "", [f"{said}; {owner} ignores it"]
    return plain, [f"{said}; {owner} takes it for {plain}"]


def _check(name: str, value: str) -> None:
    if name == _SYN_RETRIES:
        options.check("syn_retries", value)
    elif (name, value) != ("TCP_USER_TIMEOUT", "-1"):
        variables.read({name: value})


def _direction(kinds: list[str], libraries: set[str]) -> Direction:
    """Santos's libraries act in connect(2), listen(2) and socket(2)."""
    if kinds != [SANTOS] or len(libraries) > 1:
        return Direction.BOTH
    (only,) = libraries
    ways = {"libkeepalive": Direction.OUT, "libkeepalive_listen": Direction.IN}
    return ways.get(only, Direction.BOTH)


def _proposal(place: Place, wanted: Wanted, given: Environment) -> Proposal:
    stem, name = place.name, place.name
    if place == EVERYTHING:
        stem = "everything"
    elif name == "*.service":
        stem = "services"
    else:
        name = re.sub(r"-(?=@|\.service$)", "-*", name)
    suffix = ".user" if place.kind == "user_unit" else ""  # with which no unit's name ends
    read = [*given.loaded, *(one for one in given.values.values() if _is_ours(one, given))]
    where = ", ".join(dict.fromkeys(str(one.lines) for one in read))
    comment = f"In place of {' and '.join(_kinds(given))}: {where}" if where else "Without either"
    file = SYSTEM.drop_ins[0] / f"{stem}{suffix}.yaml"
    source = Source(str(file), 1)
    policy = Policy(
        file.stem,
        (Selector(place.kind, name, source),),
        Rules(Options(wanted.keepalive), direction=wanted.direction),
        source,
        log=wanted.log,
    )
    return Proposal(file, writer.text(policy, comment, wanted.options))


def _is_ours(one: Assignment, given: Environment) -> bool:
    """Whether an assignment is there for one of the libraries."""
    if one.name in ("", PRELOAD):
        return LIBRARY.search(one.value) is not None
    return _owner(one.name, _kinds(given)) is not None


def _removals(given: Environment) -> Iterator[tuple[tuple[str, int, str], Removal]]:
    """What to remove, by file, line and variable."""
    for one in given.seen:
        if not _is_ours(one, given):
            continue
        what = str(one)
        if one.name in ("", PRELOAD):
            libraries = [word for word in re.split(r"[\s:]+", one.value) if word]
            ours = [word for word in libraries if LIBRARY.search(word)]
            what = what if ours == libraries else f"{' and '.join(ours)} of {what}"
        where = one.lines.path, one.lines.first
        yield (*where, one.name), Removal(*where, what)
