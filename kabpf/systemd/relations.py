"""Which socket units pass their listeners to which services, by systemd's files.

A socket unit foo.socket starts foo.service, or the one in its Service=; a service has the sockets
in its Sockets=, too (systemd.socket(5), systemd.service(5)). Files are read as they are now; those
in the homes of users are not known.
"""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from kabpf import root_files
from kabpf.policy.model import GLOB, Policy, Selector
from kabpf.systemd.unit_files import Units, settings, words
from kabpf.systemd.units import DIRECTORIES, of_instance, real_name, template_of

Directories = Mapping[str, Sequence[str | Path]]  # by the kind of selector

ANY = "*"  # stands for the instance, where a unit is a template
FILE_SIZE_MAX = 1 << 20  # bytes; systemd takes no longer line (LONG_LINE_MAX)

_SPECIFIER = re.compile(r"%(.)")


class Relation(NamedTuple):
    """A service, and a socket unit that passes listeners to it; ANY is one instance in both."""

    service: str
    socket: str


def followed(
    policies: tuple[Policy, ...], directories: Directories = DIRECTORIES
) -> tuple[Policy, ...]:
    """The policies; to their selectors of services the socket units are added that systemd's files
    relate to these."""
    selectors = related((each for policy in policies for each in policy.selectors), directories)
    each = iter(selectors)
    return tuple(
        policy._replace(selectors=tuple(islice(each, len(policy.selectors)))) for policy in policies
    )


def related(
    selectors: Iterable[Selector], directories: Directories = DIRECTORIES
) -> list[Selector]:
    """The selectors, as `followed` makes them."""
    given = list(selectors)
    selected: dict[str, list[str]] = {}
    for selector in given:
        if selector.text.endswith(".service") and selector.kind in directories:
            selected.setdefault(selector.kind, []).append(selector.text)
    found = {kind: _Related(directories[kind], texts) for kind, texts in selected.items()}
    return [_with_sockets(each, found) for each in given]


class Services:
    """The services of all socket units, by the files as they are when this is made."""

    def __init__(self, directories: Sequence[str | Path] = DIRECTORIES["unit"]) -> None:
        self._found = _Related(directories, ["*.service"])

    def of(self, socket: str) -> tuple[str, ...]:
        """Those that get the listeners of one."""
        own = socket.removesuffix("socket") + "service"
        first = [own] if self._found.has(own) else []
        return tuple(dict.fromkeys([*first, *self._found.services(socket)]))


def _with_sockets(selector: Selector, found: Mapping[str, _Related]) -> Selector:
    if not selector.text.endswith(".service") or selector.kind not in found:
        return selector
    sockets = (*selector.sockets, *found[selector.kind].sockets(selector.text))
    return selector._replace(sockets=sockets) if sockets else selector


class _Related:
    """The relations of the services that selectors name, but for those by the units' names."""

    def __init__(self, directories: Sequence[str | Path], selected: list[str]) -> None:
        paths = [Path(each) for each in directories]
        sockets = Units(paths, "socket")
        services = Units(paths, "service")
        self.has = services.has
        relations = set(_by_service_key(sockets, services.real))
        relations.update(_by_sockets_key(services, sockets.real, _candidates(services, selected)))
        self._by_service: dict[str, list[str]] = {}
        self._others: list[Relation] = []
        self._all = sorted(each for each in relations if all(each))  # nothing that is masked
        self._services = [each.service for each in self._all]
        for relation in self._all:
            self._by_service.setdefault(relation.service, []).append(relation.socket)
            if ANY in relation.service:
                self._others.append(relation)

    def sockets(self, text: str) -> tuple[str, ...]:
        """The socket units, or globs, of the services that a selector's text names."""
        matching = {*_matching(self._services, text)} if GLOB.search(text) else set()
        found = [*self._by_service.get(text, ())]
        for relation in self._all if matching else self._others:
            if socket := _counterpart(relation.service, relation.socket, text):
                found.append(socket)
            elif relation.service in matching:
                found.append(relation.socket)
        return tuple(dict.fromkeys(found))

    def services(self, socket: str) -> list[str]:
        """The services of a socket unit."""
        found = (_counterpart(each.socket, each.service, socket) for each in self._all)
        return [service for service in found if service]


def _counterpart(name: str, other: str, text: str) -> str:
    """The other unit of a relation, where the text is the name of the one; "" where it is not."""
    before, any_, after = name.partition(ANY)
    if not any_:
        return other if name == text else ""
    if not text.startswith(before) or not text.endswith(after):
        return ""
    instance = text[len(before) : len(text) - len(after)]
    return other.replace(ANY, instance, 1) if instance else ""


def _by_service_key(sockets: Units, services: Mapping[str, str]) -> Iterator[Relation]:
    for socket in sockets.names():
        values = _values(sockets, socket, "Socket", "Service")
        named = [each for value in values if (each := _expanded(value, socket))]
        if named and named[-1].endswith(".service"):
            yield Relation(real_name(services, named[-1]), _generic(socket))


def _by_sockets_key(
    services: Units, sockets: Mapping[str, str], candidates: Iterable[str]
) -> Iterator[Relation]:
    for service in candidates:
        for value in _values(services, service, "Service", "Sockets"):
            for word in words(value):
                if (socket := _expanded(word, service)).endswith(".socket"):
                    yield Relation(_generic(service), real_name(sockets, socket))


def _candidates(services: Units, selected: list[str]) -> set[str]:
    """The services with files that selectors name, an instance without files as its template."""
    found: set[str] = set()
    names: list[str] | None = None
    for text in dict.fromkeys(selected):
        template = template_of(text)
        found.update(each for each in (text, template) if services.has(each))
        if GLOB.search(text):
            names = sorted(services.names()) if names is None else names
            found.update(_matching(names, text))
    return {each for each in found if services.real.get(each, each) == each}


def _matching(names: Sequence[str], glob: str) -> list[str]:
    """Those of the sorted names that match a glob; most begin otherwise, and take no expression."""
    start = GLOB.split(glob, 1)[0]
    first = bisect_left(names, start)
    some = list(takewhile(lambda name: name.startswith(start), islice(names, first, None)))
    return fnmatch.filter(some, glob) if some else []


def _values(units: Units, name: str, section: str, key: str) -> list[str]:
    found = []
    for path in units.files(name):
        text = _text(path)
        if key in text:  # most have none, and need no parser
            found += [
                each.value
                for each in settings(text, str(path))
                if (each.section, each.key) == (section, key)
            ]
    return found


def _text(path: Path) -> str:
    """What a file says; nothing where it can't be read, or is none."""
    try:
        return root_files.beginning(path, FILE_SIZE_MAX).decode(errors="replace")
    except OSError:
        return ""


def _generic(name: str) -> str:
    """A template with ANY in the place of its instance."""
    return of_instance(name, ANY) if template_of(name) == name and "@" in name else name


def _expanded(text: str, unit: str) -> str:
    """A name with the specifiers that come from the unit's own name (systemd.unit(5)); one with
    others is not known."""
    name = _generic(unit)
    stem, _, _ = name.rpartition(".")
    prefix, _, instance = stem.partition("@")
    known = {
        "n": name, "N": stem, "p": prefix, "P": prefix, "i": instance, "I": instance, "%": "%",
        "j": prefix.rpartition("-")[2], "J": prefix.rpartition("-")[2],
    }  # fmt: skip
    if any(match[1] not in known for match in _SPECIFIER.finditer(text)):
        return ""
    return _SPECIFIER.sub(lambda match: known[match[1]], text)
