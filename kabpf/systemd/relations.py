"""Which socket units pass their listeners to which services, by systemd's files.

A socket unit foo.socket starts foo.service, or the one in its Service=; a service has the sockets
in its Sockets=, too (systemd.socket(5), systemd.service(5)). Files are read as they are now; those
in the homes of users are not known.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kabpf.policy.model import Policy, Selector
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
    selected: dict[str, list[str]] = {}
    for policy in policies:
        for selector in policy.selectors:
            if selector.text.endswith(".service") and selector.kind in directories:
                selected.setdefault(selector.kind, []).append(selector.text)
    found = {kind: _Related(directories[kind], texts) for kind, texts in selected.items()}
    if not any(found.values()):
        return policies
    return tuple(
        replace(policy, selectors=tuple(_with_sockets(each, found) for each in policy.selectors))
        for policy in policies
    )


def _with_sockets(selector: Selector, found: Mapping[str, _Related]) -> Selector:
    if not selector.text.endswith(".service") or selector.kind not in found:
        return selector
    sockets = (*selector.sockets, *found[selector.kind].sockets(selector.text))
    return replace(selector, sockets=sockets) if sockets else selector


class _Related:
    """The relations of the services that selectors name, but for those by the units' names."""

    def __init__(self, directories: Sequence[str | Path], selected: list[str]) -> None:
        paths = [Path(each) for each in directories]
        sockets = Units(paths, "socket")
        services = Units(paths, "service")
        relations = set(_by_service_key(sockets, services.real))
        relations.update(_by_sockets_key(services, sockets.real, _candidates(services, selected)))
        self._by_service: dict[str, list[str]] = {}
        self._others: list[Relation] = []
        self._all = sorted(each for each in relations if all(each))  # nothing that is masked
        for relation in self._all:
            self._by_service.setdefault(relation.service, []).append(relation.socket)
            if ANY in relation.service:
                self._others.append(relation)

    def __bool__(self) -> bool:
        return bool(self._all)

    def sockets(self, text: str) -> tuple[str, ...]:
        """The socket units, or globs, of the services that a selector's text names."""
        is_glob = any(character in text for character in "*?[")
        relations = self._all if is_glob else self._others
        found = [*self._by_service.get(text, ())]
        found += [name for each in relations if (name := _socket(each, text))]
        return tuple(dict.fromkeys(found))


def _socket(relation: Relation, text: str) -> str:
    """The socket unit of a relation, for the services that a text names; "" where it names none."""
    before, any_, after = relation.service.partition(ANY)
    if any_ and text.startswith(before) and text.endswith(after):
        if instance := text[len(before) : len(text) - len(after)]:
            return relation.socket.replace(ANY, instance, 1)
        return ""
    return relation.socket if fnmatch.fnmatchcase(relation.service, text) else ""


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
        if any(character in text for character in "*?["):
            names = services.names() if names is None else names
            found.update(fnmatch.filter(names, text))
    return {each for each in found if services.real.get(each, each) == each}


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
        with open(path, "rb", opener=_open_at_once) as file:
            return file.read(FILE_SIZE_MAX).decode(errors="replace")
    except OSError:
        return ""


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # if it is a FIFO


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
