"""Shell scripts: what they start, against a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabpf.migration.files import Files
from kabpf.migration.scripts import UNKNOWN, Command, follow
from kabpf.systemd.unit_files import Lines

WATCHED = frozenset(["A", "B"])
PROGRAM = "/usr/bin/printenv"


def started(text: str, root: Path, *arguments: str) -> Iterator[str]:
    """What a script starts of PROGRAM: the watched variables of each."""
    found: list[Command] = []
    command = Command(["script", *arguments], {}, Lines("unit", 1, 1))
    follow(text, Lines("script", 1, 1), command, Files(root), found.append, WATCHED)
    for each in found:
        if each.words[0] == PROGRAM:
            given = {name: one.value for name, one in each.environment.items() if name in WATCHED}
            yield "".join(f"{name}={given[name]}\n" for name in sorted(given))


@pytest.mark.parametrize(
    "text",
    [
        "A=1 B=2 {}",
        "A=1\nB=2 {}\n{}",
        "export A=1; B=2; {}; export B; {}",
        "export A=1 B='x y'\n{} # A=2\nunset A; {}",
        'X=5; export A="$X-${X}-${Y:-d}-${X:+e}-${Y+f}" B=$X\\ y; {}',
        "A=1; A=$A$A; export A; {}",
        "export A=1; (export A=2; {}); {}",
        "export A=1; { export A=2; {}; }; {}",
        "set -a; A=1; set +a; B=2; {}",
        "if [ -d / ]; then export A=1; else export A=2; fi; {}",
        "if [ x = y ]; then export A=1; elif test -n x; then export A=2; fi; {}",
        "[ -e /none ] && export A=1; [ -e /none ] || export B=1; {}",
        "f() { export A=$1; }\nf 7\n{}",
        "f () {\n  A=$1 {}\n}\nf 7; f 8",
        "function_like=1; export A=$function_like; {}",
        'case "$1" in start) export A=1;; stop) export A=2;; *) export A=3;; esac; {}',
        'case "$1" in\n  (sta*|x)\n    export A=1\n    ;;\n  *) export A=3\nesac\n{}',
        "export A=1; exec {}; export A=2; {}",
        "export A=1; eval 'export B=2'; {}",
        "cat <<E >/dev/null\nexport A=1\nE\n{}\nexport B=1; {}",
        "cat <<-'E' >/dev/null\n\texport A=1\n\tE\nexport B=1; {}",
        "export A=1 2>/dev/null >&2; {} | cat",
        "while true; do export A=1; {}; break; done",
        "export A=`echo 1`x; unset A; export B=1; {}",
        "export A=$(echo ')' '(' \"$(echo 1)\"); A=1; {}",
        "! false && export A=1; {}",
        "shift; export A=$1; {}",
        "set -- x y; export A=$2; {}",
        "export A=1\nexport A\\\n=2\n{}",
        "A='it'\"'\"'s' {}",
        "command {} ; A=1 command {}",
        "export A=$0 B=${0##*/}; {}",
        "export A=${1%/*} B=${X:-/a/b}; B=${B%/*}/${B##*/}; {}",
        "export A=$(dirname /a/b/) B=`basename /a/b/c.sh .sh`; {}",
        "export A=$(dirname /) B=$(dirname x)$(basename /)$(dirname //a); {}",
        'export A=$(cd /usr && pwd) B="$(dirname "$(dirname /a/b/c)")"; {}',
        "export A=$(cd /usr/; cd -- lib/..; pwd -P) B=`dirname \\`dirname /a/b/c\\``; {}",
        "export A=$(readlink -f /usr/../usr/lib) B=$(realpath /usr/./bin 2>/dev/null); {}",
        "cd /usr; export A=$(pwd) B=$(readlink -f bin); {}",
        "export A=$(echo) B=$(echo a  b; echo 'c  d'; echo); {}",
        "export A=\u00a0 B=\x1f\v; {}",  # blanks to others, and letters to a shell
    ],
)
def test_script_starts_what_a_shell_starts(text: str, tmp_path: Path) -> None:
    """The environments of what is started, one after the other, are those under sh(1)."""
    script = text.replace("{}", PROGRAM)
    ours = list(started(script, Path("/"), "start", "second"))
    counted = tmp_path / "printenv"
    counted.write_text('#!/bin/sh\n[ "${A+x}" ] && echo "A=$A"; [ "${B+x}" ] && echo "B=$B"; :\n')
    counted.chmod(0o755)
    run = script.replace(PROGRAM, str(counted))
    done = subprocess.run(
        ["/bin/sh", "-c", run, "script", "start", "second"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        timeout=10,
    )
    assert "".join(ours) == done.stdout


@pytest.mark.parametrize(
    "text",
    ["A=$(x) {}", "A=$UNSET {}", "A=`x`; export A; {}", "$X && B=1; export A=$?; {}"]
    + [
        f"A=$({command}) {{}}"
        for command in (
            "pwd | tail",
            "cd x || pwd",
            "cd",
            "echo *",
            "dirname",
            "dirname $(x)",
            "readlink x",
            "basename $X",
            "false && pwd",
            "echo '\\n'",
        )
    ],
)
def test_what_only_the_shell_knows(text: str, tmp_path: Path) -> None:
    """A value that hangs on what runs is marked."""
    (found,) = started(text.replace("{}", PROGRAM), tmp_path)
    assert UNKNOWN in found


def test_files_that_nobody_can_name_are_noted(tmp_path: Path) -> None:
    """What a script reads or starts by a name that is known only as it runs, with its line."""
    text = '. "$X/a"\n$X/b c\nexec "$(x)/d"\n. /none\nprintf $X\n'
    command = Command(["script"], {}, Lines("unit", 1, 1))
    files = Files(tmp_path)
    outcome = follow(text, Lines("script", 1, 1), command, files, lambda _: None, WATCHED)
    assert list(map(str, outcome.unnamed)) == ["script:1", "script:2", "script:3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + "x",
        "if true; then\n" * 5000,
        "echo " + "${A:-" * 5000,
        "f() { f; f; }; f",
        "X=aaaa\n" + "X=$X$X\n" * 60 + "eval $X\n" * 60,
        "true; " * 200_000,
        "cat <<E\n" * 20_000,
        "A=$((((" * 20_000,
        "`" * 100_001,
        "\\" * 1_000_000,
        "'" * 100_001,
        "case x in\n" * 1000 + "esac; )",
        "A=(" * 1000,
        "x " * 100_000,
        ". /script\n" * 100,
        "[[ x && " * 1000,
        f"[ -f /{'a' * 5000} ] || . /{'a' * 5000}; cd {'a/' * 5000}; . x; [ -d x ]",
        "A=$(echo " * 5000,
        "A=$(" * 30 + "pwd" + ")" * 30,
        "A=aaaaaaaa\n" + "A=$(echo $A$A$A)\n" * 60,
        ")) }} fi done esac then ;; ;& | && || & ! !",
    ],
    ids=range(21),
)
def test_any_script_ends(text: str, tmp_path: Path) -> None:
    """What is endless, or nested without end, is followed up to a bound, which is noted."""
    (tmp_path / "script").write_text(text)
    list(started(text, tmp_path))
