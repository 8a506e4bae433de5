"""Selectors as policy files spell them: units, units of users' managers, cgroup paths; those of
containers and pods are in `containers`."""

from __future__ import annotations

import re

from kabpf.policy.model import Selector
from kabpf.policy.yaml import Node, Source

KEYS = ("unit", "user_unit", "cgroup", "container", "pod")
ANY_DEPTH_MAX = 4  # in one path; each one doubles the states that the kernel may need
NAME_BYTES_MAX = 255
UNIT_TYPES = (
    "service", "socket", "scope", "slice", "mount", "swap", "target", "timer", "path", "device",
    "automount",
)  # fmt: skip


def parse(node: Node) -> tuple[Selector, ...]:
    """The selectors of a list."""
    items = node.items("a list such as [{unit: nginx.service}]")
    return tuple(_selector(item) for item in items)


def named_by(stem: str, path: str) -> tuple[Selector, ...]:
    """The unit that a drop-in speaks of, if its name without .yaml is one."""
    if not is_unit(stem) or re.match(r"[0-9]+-", stem):
        return ()
    return (Selector("unit", instances(stem), Source(path, 1)),)


def _selector(node: Node) -> Selector:
    keys = node.mapping(KEYS)
    if len(keys) != 1:
        raise node.error(f"{len(keys)} keys, expected one: {', '.join(KEYS[:-1])} or {KEYS[-1]}")
    ((kind, value),) = keys.items()
    if kind in ("container", "pod"):
        from kabpf.policy import containers  # here, because most machines do without

        return containers.parse(kind, value)
    if kind == "cgroup":
        path = value.word("a cgroup path, as /system.slice/nginx.service")
        if problem := _path_problem(path):
            raise value.expected(problem)
        return Selector(kind, path.removesuffix("/") or "/", value.source)
    unit = value.word("a unit's name, as nginx.service")
    if not is_unit(unit):
        raise value.expected("a unit's name with its type, as nginx.service")
    return Selector(kind, instances(unit), value.source)


def is_unit(text: str) -> bool:
    """Whether systemd would take this name, or glob, for a unit (unit_name_is_valid())."""
    stem, _, type_ = text.rpartition(".")
    return (
        bool(stem)
        and not stem.startswith("@")
        and type_ in UNIT_TYPES
        and len(text) <= NAME_BYTES_MAX
        and re.fullmatch(r"[A-Za-z0-9:_.\\@*?\[\]!-]+", text) is not None
    )


def instances(unit: str) -> str:
    """A template stands for its instances."""
    return re.sub(r"@(\.[a-z]+)$", r"@*\1", unit)


def _path_problem(path: str) -> str:
    if not path.startswith("/"):
        return "a path that starts with / at the cgroup2 root"
    names = path.removesuffix("/").split("/")[1:]
    if any(name in ("", ".", "..") or not name.isprintable() for name in names):
        return "a path of printable names without '.', '..' and empty ones"
    if any(len(name.encode()) > NAME_BYTES_MAX for name in names):
        return f"names of at most {NAME_BYTES_MAX} bytes"
    if any("**" in name and name != "**" for name in names):
        return "** between slashes, alone"
    if names.count("**") > ANY_DEPTH_MAX:
        return f"at most {ANY_DEPTH_MAX} times **"
    return ""
