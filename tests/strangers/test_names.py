"""Hostile names of cgroups and processes, through every command that prints or parses one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hostile
import pytest
import shared
from harness import PATIENCE, path_of
from terminal import Terminal

from kabpf import cli

# A process with such a name, in the cgroup, with a listener and a connection to itself.
PROCESS = """\
import ctypes, os, socket, sys
ctypes.CDLL(None).prctl(15, os.fsencode(sys.argv[1]), 0, 0, 0)
with socket.create_server(("127.0.0.1", 0)) as server:
    with socket.create_connection(server.getsockname()) as one, server.accept()[0] as other:
        one.setsockopt(6, 4, 15)
        print("there", flush=True)
        sys.stdin.read()
"""


def encoding(environment: dict[str, str]) -> str:
    """What Python writes in, there."""
    words = [sys.executable, "-c", "import sys; print(sys.stdout.encoding)"]
    environment = {**os.environ, "PYTHONUTF8": "", **environment}
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The environment of each locale; one of a byte a character is made where there is none."""
    where = tmp_path_factory.mktemp("locales")
    target = where / "en_US.ISO-8859-1"
    # It may leave half of one where its sources, a package of their own, are missing.
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", target], capture_output=True)
    found = {name: {"LC_ALL": name} for name in hostile.LOCALES}
    single = found["en_US.ISO-8859-1"]
    single["LOCPATH"] = str(where)
    if encoding(single) != "iso8859-1":  # the same for Python
        single.clear()
        single |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "iso8859-1"}
        assert encoding(single) == "iso8859-1"
    return found


@pytest.fixture
def named(own: Path, python: Any, write_policy: Any, kabpfctl: Any) -> dict[str, Path]:
    """Cgroups with hostile names, each with a process of that name, under an enforcing policy."""
    select = f'select: [{{cgroup: "{path_of(own)}/**"}}]'
    write_policy("a.yaml", f"{select}\nmode: enforce\nkeepalive: {{idle: 61}}\n")
    kabpfctl("apply")
    cgroups = {}
    for name, raw in hostile.NAMES.items():
        cgroups[name] = own / os.fsdecode(raw)
        cgroups[name].mkdir()
        process = python(PROCESS, raw[:15], cgroup=cgroups[name], stdin=subprocess.PIPE)
        assert process.stdout.readline() == b"there\n"
    return cgroups


# Of all cgroups at once; "{}" is one that has them all below it.
COMMANDS = [
    ["plan"],
    ["status"],
    ["verify"],
    ["metrics"],
    ["metrics", "--sockets"],
    ["sockets"],
    ["sockets", "--cgroup", "{}"],
    ["sockets", "--unit", "a*"],
    ["sockets", "--container", "a*"],
    ["explain", "{}"],
    ["audit", "--timeout", "10s"],
    ["suggest", "--timeout", "12s"],
    ["doctor"],
    ["check"],
    ["import"],
    ["presets"],
    ["apply"],
]


# These have tests of their own below.
OTHERS = {"attach", "detach", "edit", "monitor", "run"}


def test_catalogue_goes_through_every_command() -> None:
    """One that is added needs a place here."""
    subparsers = next(each for each in cli.parser()._actions if each.dest == "command")
    assert subparsers.choices is not None
    assert {words[0] for words in COMMANDS} | OTHERS == set(subparsers.choices)


def judged(done: Any, locale: str, words: list[str]) -> list[str]:
    wrong = [hostile.wrong_with(each, locale) for each in (done.stdout, done.stderr)]
    if done.returncode not in (0, 1, 2):
        wrong.append(f"status {done.returncode}")
    if "--json" in words and done.returncode == 0:
        try:
            json.loads(done.stdout)
        except ValueError as error:
            wrong.append(f"not JSON: {error}")
    return [f"{locale}: {' '.join(words)}: {each}" for each in wrong if each]


@pytest.mark.parametrize(
    "locale", [pytest.param(hostile.LOCALES[0], marks=pytest.mark.core), *hostile.LOCALES[1:]]
)
def test_commands_show_names_on_one_line_of_printable_characters(
    named: dict[str, Path], own: Path, command: Any, locales: Any, locale: str
) -> None:
    """With --json and without; no name makes a line, moves the cursor, or ends a command."""
    wrong = []
    for words in COMMANDS:
        for more in ([], ["--json"]):
            each = [word.format(own) for word in words] + more
            done = command(*each, **locales[locale])
            wrong += judged(done, locale, each)
            if done.returncode == 2 and not more:
                wrong.append(f"{each} is wrong usage")
            if words in (["plan"], ["sockets"]) and hostile.FORGED.encode() not in done.stdout:
                wrong.append(f"{each} does not show the names: {done}")
    assert wrong == []


# Names with bytes that a locale decides about.
BY_LOCALE = ("not UTF-8", "LS", "255 bytes, wide", "JSON")
# What attach does not write into a policy file: what can't be seen, and globs.
REFUSED = b"printable path"


@pytest.mark.parametrize("locale", hostile.LOCALES[1:])
def test_commands_find_cgroups_by_their_names(
    named: dict[str, Path], command: Any, locales: Any, locale: str
) -> None:
    """Each can be attached, explained, listed and detached, by its directory, its path and a
    process of it, or is refused with the reason; what was written is read again."""
    wrong = []
    for name in BY_LOCALE:
        wrong += used(named[name], lambda *words: command(*words, **locales[locale]), locale)
    assert wrong == []


def test_commands_find_every_cgroup_by_its_name(named: dict[str, Path], run_kabpfctl: Any) -> None:
    """The same for the whole catalogue, in one process that has imported everything."""

    def run(*words: str | bytes) -> subprocess.CompletedProcess[bytes]:
        done = run_kabpfctl(*map(os.fsdecode, words))
        streams = (os.fsencode(done.stdout), os.fsencode(done.stderr))
        return subprocess.CompletedProcess(words, done.returncode, *streams)

    wrong = [each for cgroup in named.values() for each in used(cgroup, run, "C.UTF-8")]
    assert wrong == []


def used(cgroup: Path, run: Any, locale: str) -> list[str]:
    """What is wrong with the answers of commands that are given a cgroup's name."""
    wrong = []
    pid = (cgroup / "cgroup.procs").read_text().split()[0]
    directory = os.fsencode(cgroup)
    for words in (
        ("attach", "--cgroup", directory, "--idle", "62"),
        ("explain", directory),
        ("explain", os.fsencode(path_of(cgroup)), "--json"),
        ("explain", pid),
        ("sockets", "--cgroup", directory),
        ("sockets", "--cgroup", directory, "--json"),
        ("check",),
        ("detach", "--cgroup", directory),
    ):
        done = run(*words)
        shown = [ascii(word) for word in words]
        wrong += judged(done, locale, shown)
        may_fail = words[0] == "detach" or (words[0] == "attach" and REFUSED in done.stderr)
        if done.returncode and not may_fail:
            wrong.append(f"{shown}: status {done.returncode}: {done.stderr!r}")
    return wrong


def test_a_name_leads_to_its_own_cgroup(named: dict[str, Path], own: Path, command: Any) -> None:
    """A process in `a (deleted)` is in no cgroup `a`, and one in `--all` in no option."""
    (own / "a").mkdir()
    pid = (named["deleted"] / "cgroup.procs").read_text().split()[0]
    done = command("explain", pid, "--json")
    assert done.returncode == 0, done.stderr
    assert f"{path_of(named['deleted'])}" in json.dumps(json.loads(done.stdout))
    for name in ("deleted", "dash", "space"):
        directory = os.fsencode(named[name])
        assert command("attach", "--cgroup", directory, "--idle", "62").returncode == 0
        shown = json.loads(command("explain", directory, "--json").stdout)
        assert "62" in json.dumps(shown)
        assert command("detach", "--cgroup", directory).returncode == 0


@pytest.mark.parametrize("more", [[], ["--wide"], ["--json"]], ids=["text", "wide", "json"])
def test_monitor_shows_names_on_one_line(
    named: dict[str, Path], own: Path, stranger: Any, python: Any, more: list[str]
) -> None:
    """Also the names of processes that set an option in vain."""
    program = str(Path(sys.executable).with_name("kabpfctl"))
    with subprocess.Popen(
        [program, "monitor", *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as monitor:
        assert monitor.stdout
        os.set_blocking(monitor.stdout.fileno(), False)
        seen = b""
        for _ in range(200):
            for raw in hostile.NAMES.values():
                cgroup = own / os.fsdecode(raw)
                process = python(PROCESS, raw[:15], cgroup=cgroup)
                process.wait(20)
            seen += monitor.stdout.read() or b""
            if seen.count(b"\n") > 2 * len(hostile.NAMES):
                break
        monitor.terminate()
    seen = seen[: seen.rfind(b"\n") + 1]  # its end cuts a line short
    assert hostile.wrong_with(seen, "C.UTF-8") == ""
    if more == ["--json"]:
        for line in seen.splitlines():
            json.loads(line)


@pytest.mark.parametrize("locale", hostile.LOCALES)
@pytest.mark.parametrize("noun", ["sockets", "status"])
def test_live_views_show_names_on_one_line(
    named: dict[str, Path], own: Path, locales: Any, noun: str, locale: str
) -> None:
    """In the bytes of the terminal's locale, nothing moves the cursor but the view itself."""
    program = Path(sys.executable).with_name("kabpfctl")
    more = ("--cgroup", own) if noun == "sockets" else ()
    given = {"PYTHONUTF8": "", **locales[locale]}
    with Terminal(program, noun, "--watch", *more, columns=1000, rows=150, locale=given) as shown:
        shown.until("q quits", 20 * PATIENCE)
        if noun == "sockets":
            shown.until(hostile.FORGED, 20 * PATIENCE)
        screen = shown.said
        shown.type(b"q")
        assert shown.end(20 * PATIENCE) == 0
    text = re.sub(rb"\x1b\[(\?1049[hl]|\?25[hl]|[HKJ])|\r+(?=\n)", b"", screen)
    assert hostile.wrong_with(text, locale) == ""


@pytest.mark.core
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_arguments_may_be_names_of_strangers(
    command: Any, own_mounts: Path, tmp_path: Path, more: list[str]
) -> None:
    """As of `kabpfctl check *` in a user's directory: files, cgroups, units, policies and what
    looks like an option."""
    wrong = []
    names = {**hostile.NAMES, **hostile.WITH_NEWLINES}
    policy = b"select: [{unit: a.service}]\nkeepalive: {idle: 61}\n"
    for raw in names.values():
        file = os.path.join(os.fsencode(tmp_path), raw[:250])
        with open(file, "wb") as stream:
            stream.write(policy)
    for words in (
        ["check", *(os.path.join(os.fsencode(tmp_path), raw[:250]) for raw in names.values())],
        *(["check", raw] for name, raw in names.items() if name in ("LF", "ESC", "dash", "bidi")),
        *([["explain", raw] for name, raw in names.items() if name in ("LS", "CR LF", "NEL")]),
        ["sockets", "--unit", names["LF"]],
        ["sockets", "--policy", names["ESC"]],
        ["sockets", "--container", names["ESC"]],
        ["explain", names["bidi"]],
        ["detach", "--cgroup", names["CR"]],
        ["attach", "--cgroup", names["policy"], "--idle", names["LS"]],
        ["run", "--idle", names["ESC"], "true"],
    ):
        each = words + (more if words[0] in ("check", "explain", "sockets") else [])
        done = command(*each)
        shown = [word if isinstance(word, str) else ascii(word)[:40] for word in each]
        wrong += judged(done, "C.UTF-8", shown)
    assert wrong == []


@pytest.mark.parametrize("uses", ["unchanged", "wrong"])
def test_edit_shows_names_on_one_line(own_mounts: Path, tmp_path: Path, uses: str) -> None:
    """The name of what is to be edited, on a terminal, and a file of that name that is wrong."""
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\n" + ("echo '\033[31m: [' > \"$1\"\n" if uses == "wrong" else ""))
    editor.chmod(0o755)
    wrong = []
    for raw in (*hostile.NAMES.values(), *hostile.WITH_NEWLINES.values()):
        ours, theirs = pty.openpty()
        program = os.fsencode(Path(sys.executable).with_name("kabpfctl"))
        with subprocess.Popen(
            [program, b"edit", b"--", raw],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "SUDO_EDITOR": str(editor)},
        ) as process:  # fmt: skip
            os.close(theirs)
            os.write(ours, b"q\n")
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while piece := os.read(ours, 65536):
                    shown += piece
        os.close(ours)
        # As a terminal shows what is typed, and lines.
        text = shown.replace(b"q\r\n", b"").replace(b"\r\n", b"\n")
        done = subprocess.CompletedProcess([], process.returncode, text, b"")
        wrong += judged(done, "C.UTF-8", ["edit", ascii(raw)])
    assert wrong == []


def test_environment_may_have_any_value(command: Any, own_mounts: Path) -> None:
    """run takes options from variables, whose wrong values it shows."""
    wrong = []
    for raw in (*hostile.NAMES.values(), *hostile.WITH_NEWLINES.values()):
        given = {"DD_TCP_KEEPALIVE_TIME": os.fsdecode(raw), "KEEPALIVE": os.fsdecode(raw)}
        wrong += judged(command("run", "true", **given), "C.UTF-8", ["run", ascii(raw)[:40]])
    assert wrong == []


CONFIGS, TASKS = Path("/var/lib/docker"), Path("/run/docker")
OF_CONTAINERS = [
    ["plan"],
    ["status"],
    ["sockets"],
    ["sockets", "--container", "*"],
    ["explain", "{}"],
    ["doctor"],
]


@pytest.fixture
def containers(
    own_mounts: Path, make_cgroup: Callable[[str], Path], python: Any
) -> Iterator[list[Path]]:
    """The cgroups of Docker's containers, of which each has a process and a connection."""
    with ExitStack() as stack:
        for path in (CONFIGS, TASKS):
            stack.enter_context(shared.directory(path))
            subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
            stack.callback(subprocess.run, ["umount", path], check=True)
        made = []
        for raw in (*hostile.NAMES.values(), *hostile.WITH_NEWLINES.values()):
            text, id = os.fsdecode(raw), secrets.token_hex(32)
            cgroup = make_cgroup(f"docker-{id}.scope")
            labels = {"team": text, text: text, "io.kabpf.keepalive": text, "io.kabpf.policy": text}
            _write(
                CONFIGS / "containers" / id / "config.v2.json",
                {"ID": id, "Name": f"/{text}", "Config": {"Labels": labels, "Image": text}},
            )
            _write(
                TASKS / "containerd/daemon/io.containerd.runtime.v2.task/moby" / id / "config.json",
                {"linux": {"cgroupsPath": path_of(cgroup)}},
            )
            process = python(PROCESS, "in", cgroup=cgroup, stdin=subprocess.PIPE)
            assert process.stdout.readline() == b"there\n"
            made.append(cgroup)
        yield made


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def test_commands_show_containers_on_one_line_of_printable_characters(
    containers: list[Path],
    command: Any,
    locales: Any,
    write_policy: Any,
    kabpfctl: Any,
) -> None:
    """Names, images, labels and wishes, which strangers choose who start them or make images,
    in each locale, with --json and without; and each container has the policy."""
    select = "select: [{container: {label: {team: '*'}}}]"
    write_policy("a.yaml", f"{select}\nkeepalive: {{idle: 61}}\n")
    wrong = judged(command("apply"), "C.UTF-8", ["apply"])
    for locale in hostile.LOCALES:
        # Of the others those that print all names.
        for words in OF_CONTAINERS if locale == "C.UTF-8" else OF_CONTAINERS[:3]:
            for more in ([], ["--json"]):
                each = [word.format(containers[0]) for word in words] + more
                done = command(*each, **locales[locale])
                wrong += judged(done, locale, each)
                if words == ["sockets"] and not more and hostile.FORGED.encode() not in done.stdout:
                    wrong.append(f"{each} does not show the names: {done}")
    assert wrong == []
    shown = json.loads(kabpfctl("plan", "--json").stdout)
    assert {path_of(each) for each in containers} <= {each["cgroup"] for each in shown["cgroups"]}
