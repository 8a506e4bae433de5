"""Containers that systemd starts by files of their own: quadlet (podman-systemd.unit(5)), and
systemd.nspawn(5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kabpf.migration import env_command
from kabpf.migration.commands import Started, container_environment_file
from kabpf.migration.files import Files
from kabpf.systemd import unit_files
from kabpf.systemd.unit_files import Assignment, Lines, Setting, words

QUADLETS = (
    ("unit", "/etc/containers/systemd"),
    ("unit", "/run/containers/systemd"),
    ("unit", "/usr/share/containers/systemd"),
    ("user_unit", "/etc/containers/systemd/users"),
    ("user_unit", "/etc/containers/systemd/users/*"),
)
NSPAWN = ("/etc/systemd/nspawn", "/run/systemd/nspawn", "/var/lib/machines")


@dataclass(frozen=True)
class Quadlet:
    """A container of a unit."""

    started: Started
    seen: list[Assignment]
    paths: list[Path]


def quadlets(files: Files) -> Iterator[tuple[tuple[str, str], Quadlet]]:
    """Containers by the kind and name of the unit that is made of each; stronger ones last."""
    for kind, directory in reversed(QUADLETS):
        patterns = (f"{directory}/*.container", f"{directory}/*/*.container")
        for path in (each for pattern in patterns for each in files.matching(pattern)):
            if kind == "unit" and "/containers/systemd/users/" in str(path):
                continue
            name, quadlet = _quadlet(files, path)
            if unit_files.is_name(name):
                yield (kind, name), quadlet


def _quadlet(files: Files, path: Path) -> tuple[str, Quadlet]:
    paths = [path, *unit_files.strongest([path.with_name(f"{path.name}.d")])]
    found = [each for file in paths for each in unit_files.settings(files.text(file), str(file))]
    lists = unit_files.effective(found, "Container")
    environment: dict[str, Assignment] = {}
    seen: list[Assignment] = []
    for setting in lists.get("EnvironmentFile", []):
        values = container_environment_file(files, setting.value, files.name(path.parent))
        environment |= values
        seen += values.values()
    for setting in lists.get("Environment", []):
        given = _assigned(setting)
        environment |= {one.name: one for one in given}
        seen += given
    for setting in lists.get("PodmanArgs", []):
        given = unit_files.assignments(_by_options(words(setting.value)), setting.lines)
        environment |= {one.name: one for one in given}
        seen += given
    command = [word for setting in lists.get("Exec", [])[-1:] for word in words(setting.value)]
    if command and command[0].rpartition("/")[2] == "env":
        evaluated = env_command.evaluate(command[1:], {})
        environment = {} if evaluated.clears else environment
        given = [
            Assignment(name, value, lists["Exec"][-1].lines)
            for name, value in evaluated.sets.items()
        ]
        environment |= {one.name: one for one in given}
        seen += given
    named = lists.get("ServiceName", [])
    unit = f"{named[-1].value if named else path.name.removesuffix('.container')}.service"
    lines = Lines(str(path), 1, 1)
    return unit, Quadlet(Started("podman", environment, lines, in_container=True), seen, paths)


def _by_options(given: list[str]) -> Iterator[str]:
    """The assignments of -e and --env."""
    rest = iter(given)
    for word in rest:
        if word in ("-e", "--env"):
            yield next(rest, "")
        elif word.startswith("--env="):
            yield word.removeprefix("--env=")


def _assigned(setting: Setting) -> list[Assignment]:
    return unit_files.assignments(words(setting.value), setting.lines)


def nspawn(files: Files) -> Iterator[tuple[Path, str, list[Assignment], bool]]:
    """The .nspawn files, with the machine of each, what its first process has in its environment,
    and whether that is an init, which hands nothing on."""
    done: set[str] = set()
    for directory in NSPAWN:
        for path in files.matching(f"{directory}/*.nspawn"):
            name = path.name.removesuffix(".nspawn")
            if name in done:
                continue
            done.add(name)
            found = unit_files.settings(files.text(path), str(path))
            lists = unit_files.effective(found, "Exec")
            given = [one for each in lists.get("Environment", []) for one in _assigned(each)]
            boots = [each.value.lower() for each in lists.get("Boot", [])][-1:]
            yield path, name, given, boots in (["yes"], ["true"], ["on"], ["1"])
