"""The preload libraries: their names, and what is told from their contents.

Debian's libkeepalive and that of M. Santos have one name and little else in common: variables,
defaults, and the calls in which they act.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kabpf.migration.files import Files

PRELOAD = "LD_PRELOAD"
NAME = re.compile(r"lib(?:keepalive(?:_listen|_socket)?|dontdie)(?=\.so\b)")
NAME_BYTES = re.compile(NAME.pattern.encode())

DEBIANS, SANTOS, DONTDIE = "libkeepalive", "libkeepalive of M. Santos", "libdontdie"

# Variables whose names only one of them holds, in the order in which they have to be looked for.
_SIGNS = ((b"DD_TCP_KEEPALIVE_TIME", DONTDIE), (b"TCP_KEEPIDLE", SANTOS), (b"KEEPIDLE", DEBIANS))
_SIZE_MAX = 1 << 20
# Of ld.so(8), on the architectures and distributions that these libraries are built for.
_DIRECTORIES = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/local/lib64",
    "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib/arm-linux-gnueabihf",
    "/usr/lib/i386-linux-gnu", "/usr/lib/riscv64-linux-gnu", "/usr/lib/powerpc64le-linux-gnu",
    "/usr/lib/s390x-linux-gnu",
)  # fmt: skip
_TOKEN = re.compile(r"\$(?:LIB|\{LIB\})")
_LIB = ("lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu")


@dataclass(frozen=True)
class Library:
    """A library that is preloaded."""

    word: str  # as LD_PRELOAD has it
    name: str  # without `.so`
    kind: str  # "" where it may be Debian's or that of M. Santos


class Libraries:
    """Tells libraries apart by what is in them, where their files are."""

    def __init__(self, files: Files | None) -> None:
        self._files = files
        self._kinds: dict[str, str] = {}
        self._found: dict[tuple[str, str], list[Library]] = {}

    def of(self, value: str, path: str = "") -> list[Library]:
        """Those of ours in a value of LD_PRELOAD; `path` is LD_LIBRARY_PATH."""
        if (value, path) not in self._found:
            self._found[value, path] = [*self._of(value, path)]
        return self._found[value, path]

    def _of(self, value: str, path: str) -> Iterator[Library]:
        for word in dict.fromkeys(parts(value)):
            named = NAME.search(word)
            kind = self._kind(word, path)
            if named is None and not kind:
                continue
            name = named[0] if named else Path(word).name.partition(".so")[0]
            yield Library(word, name, kind or by_name(name))

    def _kind(self, word: str, path: str) -> str:
        if self._files is None or "\0" in word:
            return ""
        if word not in self._kinds:
            heads = (self._files.head(each, _SIZE_MAX) for each in self._places(word, path))
            self._kinds[word] = next((kind_of(head) for head in heads if head), "")
        return self._kinds[word]

    def _places(self, word: str, path: str) -> Iterator[Path]:
        assert self._files is not None
        directories = [""] if "/" in word else [*filter(None, path.split(":")), *_DIRECTORIES]
        for directory in directories:
            full = f"{directory}/{word}" if directory else word
            for lib in _LIB if _TOKEN.search(full) else [""]:
                yield self._files.inside(_TOKEN.sub(lib, full))


def parts(value: str) -> list[str]:
    """What a value of LD_PRELOAD, or a line of ld.so.preload, names."""
    return [word for word in re.split(r"[\s:]+", value) if word]


def kind_of(content: bytes) -> str:
    """Which library it is by the variables that it looks for, or ""."""
    return next((kind for sign, kind in _SIGNS if sign in content), "")


def by_name(name: str) -> str:
    """Only the name libkeepalive has two meanings."""
    if name == "libdontdie":
        return DONTDIE
    return "" if name == "libkeepalive" else SANTOS


def kinds(found: list[Library], environment: Mapping[str, object]) -> tuple[list[str], bool]:
    """The kinds of libraries that are preloaded together, and whether one of them is a guess.

    Where the file does not say whose a libkeepalive is, the others of M. Santos beside it do, or
    the variables that are set for it.
    """
    known = {each.kind for each in found if each.kind}
    guessed = False
    if any(not each.kind for each in found):
        theirs = any(name.startswith("TCP_") for name in environment)
        debians = any(name.startswith("KEEP") for name in environment)
        guessed = not (theirs or debians or SANTOS in known)
        known.add(SANTOS if theirs or SANTOS in known else DEBIANS)
    return [kind for kind in (DONTDIE, SANTOS, DEBIANS) if kind in known], guessed
