"""The units that systemd has files of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# Where systemd has units by the kind of selector, the strongest first (systemd.unit(5)). Those in
# the homes of users are left out.
DIRECTORIES = {
    "unit": (
        "/etc/systemd/system.control",
        "/run/systemd/system.control",
        "/run/systemd/transient",
        "/run/systemd/generator.early",
        "/etc/systemd/system",
        "/etc/systemd/system.attached",
        "/run/systemd/system",
        "/run/systemd/system.attached",
        "/run/systemd/generator",
        "/usr/local/lib/systemd/system",
        "/usr/lib/systemd/system",
        "/lib/systemd/system",
        "/run/systemd/generator.late",
    ),
    "user_unit": (
        "/etc/systemd/user",
        "/run/systemd/user",
        "/usr/local/lib/systemd/user",
        "/usr/local/share/systemd/user",
        "/usr/lib/systemd/user",
        "/usr/share/systemd/user",
    ),
}


def unit_names(directories: Iterable[str | Path]) -> dict[str, str]:
    """The names of the units in these directories, the strongest first, with the names that they
    really have: a link is an alias, or with /dev/null a mask."""
    names: dict[str, str] = {}
    for directory in directories:
        try:
            entries = [entry for entry in os.scandir(directory) if not entry.is_dir()]
        except OSError:
            continue
        for entry in entries:
            target = os.path.realpath(entry.path) if entry.is_symlink() else entry.name
            real = "" if target == os.devnull else os.path.basename(target)
            names.setdefault(entry.name, real)
    return names


def template_of(name: str) -> str:
    """The template of an instance, or the name itself."""
    return re.sub(r"@.*(\.[a-z]+)$", r"@\1", name)


def of_instance(template: str, instance: str) -> str:
    """The name of a template's instance."""
    return template.replace("@.", f"@{instance}.", 1)


def real_name(names: Mapping[str, str], name: str) -> str:
    """The unit that a name means by these names of files: an alias is another's, that of a template
    its instances', too. "" is masked; one without a file is itself."""
    if name in names:
        return names[name]
    template = template_of(name)
    real = names.get(template, template)
    if real == template:
        return name
    start = template.index("@") + 1
    return of_instance(real, name[start : len(name) - len(template) + start])
