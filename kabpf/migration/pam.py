"""What PAM adds to a program that opens a session: an environment, and a cgroup of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kabpf.migration.files import Files

ENVIRONMENT = "/etc/environment"
_DIRECTORIES = ("/etc/pam.d", "/usr/lib/pam.d", "/usr/share/pam.d")
_RULE = re.compile(r"-?(auth|account|password|session)\s+(\[[^]]*\]|\S+)\s+(\S+)\s*(.*)")
_DEPTH_MAX = 10
_RULES_MAX = 1000


@dataclass(frozen=True)
class Rule:
    """A line of a stack."""

    type: str
    module: str
    arguments: tuple[str, ...]


class Pam:
    """The stacks of PAM's services (pam.conf(5))."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._stacks: dict[str, list[Rule]] = {}

    def services(self) -> list[str]:
        """Those that have a file."""
        found = {path.name for each in _DIRECTORIES for path in self._files.matching(f"{each}/*")}
        return sorted(name for name in found if re.fullmatch(r"[\w.-]+", name))

    def reads_environment(self, service: str) -> bool:
        """Whether its sessions have /etc/environment (pam_env(8))."""
        for rule in self._stack(service):
            if rule.module != "pam_env.so" or rule.type not in ("auth", "session"):
                continue
            given = dict(word.partition("=")[::2] for word in rule.arguments)
            if given.get("readenv", "1") != "0" and given.get("envfile", ENVIRONMENT) == (
                ENVIRONMENT
            ):
                return True
        return False

    def moves(self, service: str) -> bool:
        """Whether pam_systemd(8) moves its sessions into a scope below user.slice. Where there is
        no stack to read it is taken to, as distributions have it."""
        stack = self._stack(service)
        if not stack:
            return True
        return any(rule.module == "pam_systemd.so" and rule.type == "session" for rule in stack)

    def _stack(self, service: str) -> list[Rule]:
        if service not in self._stacks:
            rules = self._rules(service, ())
            self._stacks[service] = [
                rule for _, rule in zip(range(_RULES_MAX), rules, strict=False)
            ]
        return self._stacks[service]

    def _rules(self, service: str, outer: tuple[str, ...]) -> Iterator[Rule]:
        if service in outer or len(outer) > _DEPTH_MAX:
            return
        inside = (*outer, service)
        paths = (self._files.inside(f"{each}/{service}") for each in _DIRECTORIES)
        text = next(filter(None, map(self._files.text, paths)), "")
        for line in text.replace("\\\n", " ").splitlines():
            if not self._files.spend(1):
                return
            bare = line.partition("#")[0].strip()
            if bare.startswith("@include"):
                yield from self._rules(bare.removeprefix("@include").strip(), inside)
            elif match := _RULE.fullmatch(bare):
                type_, control, module, arguments = match.groups()
                if control in ("include", "substack"):
                    inner = self._rules(module, inside)
                    yield from (rule for rule in inner if rule.type == type_)
                else:
                    yield Rule(type_, module.rpartition("/")[2], tuple(arguments.split()))
