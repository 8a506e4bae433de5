"""What real shells complete: as a list, and at a terminal, as people have it."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable, Iterable

from parsers import commands, flags

from kabpf import cli
from kabpf.daemon import main
from kabpf.observe.events import KINDS
from kabpf.policy.presets import presets

PROGRAMS = ("kabpfctl", "kabpfd")
DEADLINE_S = 60
SET = {event for event in KINDS if event.startswith("s")}

# What is typed, and all that is offered. A unit and a policy are there that begin with kabpf-test.
VALUES = [
    ("kabpfctl attach --cgroup /sys/fs/cg", {"/sys/fs/cgroup"}),
    ("kabpfctl attach --cgroup=/sys/fs/cg", {"/sys/fs/cgroup"}),
    ("kabpfctl attach --cgroup /sys --persist --loader l", {"libbpf"}),
    ("kabpfctl attach --user-timeout a", {"auto"}),
    ("kabpfctl attach --idle 6", set()),
    ("kabpfctl explain /sys/fs/cg", {"/sys/fs/cgroup"}),
    ("kabpfctl explain kabpf-test", {"kabpf-test.service"}),
    ("kabpfctl check /etc/os-rel", {"/etc/os-release"}),
    ("kabpfctl check /etc/group /etc/os-rel", {"/etc/os-release"}),
    ("kabpfctl edit kabpf-test", {"kabpf-test.service", "kabpf-test-policy"}),
    ("kabpfctl sockets --unit kabpf-test", {"kabpf-test.service"}),
    ("kabpfctl sockets --policy kabpf-test", {"kabpf-test-policy"}),
    ("kabpfctl monitor --json --unit=kabpf-test", {"kabpf-test.service"}),
    ("kabpfctl monitor --policy kabpf-test", {"kabpf-test-policy"}),
    ("kabpfctl monitor --event s", SET),
    ("kabpfctl monitor --event clamped --event s", SET),
    ("kabpfctl audit --preset conn", {"conntrack"}),
    ("kabpfctl audit --preset conntrack --unit kabpf-test", {"kabpf-test.service"}),
    ("kabpfctl audit --with /etc/os-rel", {"/etc/os-release"}),
    ("kabpfctl suggest --unit kabpf-test", {"kabpf-test.service"}),
    ("kabpfctl run --policy kabpf-test", {"kabpf-test-policy"}),
    ("kabpfctl run --preset conn", {"conntrack"}),
    ("kabpfctl run --preset ", set(presets())),
    ("kabpfctl run mkfif", {"mkfifo"}),
    ("kabpfctl run --idle 60 mkfif", {"mkfifo"}),
    ("kabpfctl run --idle=60 --off mkfif", {"mkfifo"}),
    ("kabpfctl run -- mkfif", {"mkfifo"}),
    ("kabpfctl run --off cat /etc/os-rel", {"/etc/os-release"}),
    ("kabpfctl status /etc/os-rel", set()),
]
# Of a machine with a container that is web-test in the pod pod-test, and has sockets.
VALUES_OF_CONTAINERS = [
    ("kabpfctl explain web-te", {"web-test"}),
    ("kabpfctl explain pod-te", {"pod-test"}),
    ("kabpfctl sockets --container web-te", {"web-test"}),
    ("kabpfctl sockets --container ", {"web-test", "pod-test"}),
    ("kabpfctl monitor --container pod-te", {"pod-test"}),
    ("kabpfctl monitor --json --container=web-te", {"web-test"}),
]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """By the words with which a line begins."""
    of_commands = {f"kabpfctl {name}": parser for name, parser in commands().items()}
    return {"kabpfctl": cli.parser(), "kabpfd": main.parser(), **of_commands}


def lists() -> list[tuple[str, set[str]]]:
    """What is typed, and all that is offered, for each command of each program."""
    names = {line.partition(" ")[2] for line in parsers()} - {""}
    options = [(f"{line} --", flags(parser)) for line, parser in parsers().items()]
    return [("kabpfctl ", names), *options]


def words() -> list[tuple[str, str]]:
    """What is typed, and the one word that it becomes: commands, options and values."""
    names = [line.split() for line in parsers()]
    found = [_shortest(words[-1], [other[-1] for other in names]) for words in names if words[1:]]
    typed = [(f"kabpfctl {start}", word) for start, word in found]
    for line, parser in parsers().items():
        found = [_shortest(flag, flags(parser)) for flag in sorted(flags(parser))]
        # One option alone has a short form beside it, which a hyphen may mean as well.
        typed += [(f"{line} {max(start, '--')}", word) for start, word in found]
    # A value after = is one word with its option in zsh, and of its own in the other shells.
    return typed + values(VALUES)


def values(offered: Iterable[tuple[str, set[str]]]) -> list[tuple[str, str]]:
    """What is typed of these, and the one word that it becomes."""
    lists = [(line, [*words]) for line, words in offered]
    return [(line, words[0]) for line, words in lists if len(words) == 1 and "=" not in line]


def _shortest(word: str, among: Iterable[str]) -> tuple[str, str]:
    for end in range(1, len(word) + 1):
        if [each for each in among if each.startswith(word[:end])] == [word]:
            return word[:end], word
    return word, word


def by_bash(run: Callable[..., str], load: str, typed: str) -> set[str]:
    """What bash offers; `load` are commands that load the completions."""
    words = re.sub("=", " = ", typed).split() + ([""] if typed.endswith((" ", "=")) else [])
    script = (
        f'{load}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*";'
        " COMP_POINT=${#COMP_LINE}; COMP_TYPE=9;"
        '  f=$(complete -p "$1"); f=${f##*-F }; ${f%% *} "$1" "${*: -1}";'
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    said = run("bash", "--norc", "-c", script, "bash", *words)
    return {line.rstrip("/ ") for line in said.splitlines() if line.strip()}


def by_fish(run: Callable[..., str], load: str, typed: str) -> set[str]:
    """What fish offers; of an option with its value the value."""
    said = run("fish", "-c", f"{load}; complete -C '{typed}'").splitlines()
    offered = {line.partition("\t")[0].rstrip("/").rpartition("=")[2] for line in said}
    # Fish 4 also offers what has it elsewhere in it.
    last = "" if typed.endswith(" ") else typed.split()[-1].rpartition("=")[2]
    return {word for word in offered if word.startswith(last)}


_COMMANDS = {"bash": ("bash", "--norc", "-i"), "zsh": ("zsh", "-f", "-i")}
_QUIET = {
    "bash": "bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; PS1=",
    "zsh": "unset zle_bracketed_paste; PS1=",
}


class Terminal:
    """A context manager: a shell at a terminal where the programs only say their arguments."""

    def __init__(self, shell: str, load: str, *starter: str) -> None:
        self._command = [*starter, *_COMMANDS[shell]]
        said = "; ".join(f'{name}() {{ printf "<%s>\\n" "$*"; }}' for name in PROGRAMS)
        self._setup = f"{_QUIET[shell]}; {load}; {said}; {PROGRAMS[0]} ready"

    def __enter__(self) -> Terminal:
        self._process, self._terminal = pty.fork()
        if not self._process:
            os.chdir("/")
            os.execvpe(self._command[0], self._command, {**os.environ, "TERM": "dumb"})
        self._write(f"{self._setup}\n")
        self._answer("ready")
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._terminal)

    def completed(self, typed: str) -> str:
        """The last word of a line after the tabulator key."""
        self._write(f"{typed}\t\n")
        return self._answer(".*").split()[-1].rstrip("=/")

    def _write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _answer(self, pattern: str) -> str:
        deadline = time.monotonic() + DEADLINE_S
        text = ""
        while not (found := re.search(rf"^<({pattern})>\r$", text, re.MULTILINE)):
            left = max(0, deadline - time.monotonic())
            assert select.select([self._terminal], [], [], left)[0], text
            text += os.read(self._terminal, 65536).decode()
        return found[1]
