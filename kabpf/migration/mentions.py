"""The files that others name: a table's scripts, a command's configuration."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kabpf.migration.files import KEPT_MAX, Files

FILES_MAX = 2000

_NAME = re.compile(r"(?<![\w.$})/-])/(?:[\w.@+-]++/)*+[\w.@+-]++")
_SUFFIXES = (
    ".bash", ".cfg", ".conf", ".env", ".ini", ".js", ".cjs", ".json", ".lua", ".php", ".pl",
    ".properties", ".py", ".rb", ".sh", ".toml", ".yaml", ".yml",
)  # fmt: skip
# Where nothing is configured; a log repeats what the loader said of a library.
_ELSEWHERE = ("/dev/", "/proc/", "/sys/", "/var/log/", "/usr/share/doc/")


def named(text: str) -> Iterator[str]:
    """The absolute paths in what is no comment."""
    for line in text.split("\n"):
        if "/" in line and not is_comment(line):
            yield from _NAME.findall(line)


def is_comment(line: str) -> bool:
    """Whether a line says nothing to whoever reads it: as shells, systemd and most others do."""
    return line.lstrip().startswith(("#", ";"))


def text(files: Files, path: Path) -> str:
    """What a named file holds that is a script, or has the name of a configuration; of any other,
    and of long ones, nothing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    if not stat.S_ISREG(status.st_mode) or status.st_size > KEPT_MAX:
        return ""
    if files.name(path).startswith(_ELSEWHERE):
        return ""
    if path.suffix in _SUFFIXES or files.head(path, 2) == b"#!":
        return files.text(path)
    return ""
