"""What preload libraries do with an environment, as a policy would say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kabpf.errors import PolicyError
from kabpf.migration import variables
from kabpf.migration.libraries import DEBIANS, DONTDIE, PRELOAD, SANTOS, Library, kinds
from kabpf.migration.scripts import UNKNOWN, Environment
from kabpf.policy.model import Direction
from kabpf.systemd.unit_files import Assignment, Lines

_PREFIXES = {DEBIANS: "KEEP", SANTOS: "TCP_", DONTDIE: "DD_"}  # of their variables
NAMES = tuple(name for names in variables.VARIABLES.values() for name in names)
WATCHED = frozenset([PRELOAD, "LD_LIBRARY_PATH", *NAMES, *variables.WITHOUT_COUNTERPART])
_SANTOS_DEFAULTS = {
    "TCP_KEEPIDLE": "15", "TCP_KEEPINTVL": "15", "TCP_KEEPCNT": "9", "TCP_USER_TIMEOUT": "-1",
}  # fmt: skip
_TWO_MEANINGS = (
    "may be Debian's (keepalive with the system's times) or that of M. Santos ("
    "{idle: 15, interval: 15, probes: 9, user_timeout: auto}, outgoing connections alone);"
    " its file is not here to tell, and the policy assumes Debian's"
)


@dataclass(frozen=True)
class Wanted:
    """What a policy has to say beside what it selects."""

    keepalive: bool = False
    options: Mapping[str, str] = field(default_factory=dict)  # as policy files spell them
    direction: Direction = Direction.BOTH
    log: bool = False

    def __str__(self) -> str:
        options = ", ".join(f"{key}: {value}" for key, value in self.options.items())
        words = [f"keepalive: {f'{{{options}}}' if options else 'on' if self.keepalive else 'off'}"]
        words += [f"direction: {self.direction}"] if self.direction != Direction.BOTH else []
        words += ["log: sockets"] if self.log else []
        return ", ".join(words)


@dataclass
class Reading:
    """What libraries want by an environment."""

    libraries: list[Library]
    kinds: list[str] = field(default_factory=list)
    wanted: Wanted | None = None  # also where a value is not known
    left_out: list[str] = field(default_factory=list)  # what of it no policy says
    unknown: list[Assignment] = field(default_factory=list)

    def owner(self, name: str) -> str | None:
        """The library that reads a variable."""
        known = name in NAMES or name in variables.WITHOUT_COUNTERPART
        return next(
            (kind for kind in self.kinds if known and name.startswith(_PREFIXES[kind])), None
        )


def read(libraries: list[Library], environment: Environment, where: Lines) -> Reading:
    """What these libraries want, which are preloaded at `where`; nothing where there is none."""
    if not libraries:
        return Reading([])
    given = {name: one for name, one in environment.items() if name in NAMES and one.value}
    # Of M. Santos's own variables all of them tell whose the library is.
    telling = {*given, *(name for name in variables.WITHOUT_COUNTERPART if name in environment)}
    found, guessed = kinds(libraries, dict.fromkeys(telling))
    reading = Reading(libraries, found)
    if guessed:
        preload = environment.get(PRELOAD)
        place = preload.lines if preload else where
        reading.left_out.append(f"{place}: libkeepalive.so {_TWO_MEANINGS}")
    if theirs := [name for name in telling if name.startswith("TCP_") and SANTOS not in found]:
        words = [each.word for each in libraries if each.kind == DEBIANS]
        reading.left_out += [
            f"{environment[name].lines}: {name}: is for the libkeepalive of M. Santos; {word} is"
            " Debian's, which ignores it"
            for name in theirs
            for word in words[:1]
        ]
    values = dict(_SANTOS_DEFAULTS) if SANTOS in found else {}
    for name in NAMES:
        if name in given and (owner := reading.owner(name)):
            values.pop(name, None)
            if UNKNOWN in given[name].value:
                reading.unknown.append(given[name])
                continue
            value, said = _value(given[name], owner)
            values |= {name: value} if value else {}
            reading.left_out += said
    for name in variables.WITHOUT_COUNTERPART:
        if SANTOS in found and name in environment and environment[name].value not in ("", "0"):
            one = environment[name]
            reading.left_out.append(
                f"{one.lines}: {name}: no policy has a counterpart; it ends with the preload"
            )
    if values.get("TCP_USER_TIMEOUT") == "-1" and any(
        values.get(name, "0") == "0" for name in _SANTOS_DEFAULTS
    ):
        del values["TCP_USER_TIMEOUT"]  # of a time of the system's
    try:
        asked = variables.read(values)
    except PolicyError as error:  # two libraries are asked for different things
        asked = variables.Asked()
        place = next((one.lines for name, one in given.items() if name in values), where)
        reading.left_out += [f"{place}: {finding}" for finding in error.findings]
    reading.wanted = Wanted(
        asked.keepalive,
        dict(asked.options),
        _direction(found, {each.name for each in libraries}),
        asked.debug,
    )
    return reading


def _value(one: Assignment, owner: str) -> tuple[str, list[str]]:
    """What a library makes of a variable; "" for nothing, and what there is to say of that."""
    number = re.match(r"\s*[+-]?[0-9]{1,12}(?![0-9])", one.value)  # as atoi(3) does
    plain = str(int(number[0])) if number else one.value
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
    return plain, [f"{said}; {owner} reads it as {plain}"]


def _check(name: str, value: str) -> None:
    if (name, value) == ("TCP_USER_TIMEOUT", "-1"):
        return
    if warnings := variables.read({name: value}).warnings:
        raise PolicyError(*warnings)


def _direction(found: list[str], names: set[str]) -> Direction:
    """Santos's libraries act in connect(2), listen(2) and socket(2)."""
    if found != [SANTOS] or len(names) > 1:
        return Direction.BOTH
    (only,) = names
    ways = {"libkeepalive": Direction.OUT, "libkeepalive_listen": Direction.IN}
    return ways.get(only, Direction.BOTH)
