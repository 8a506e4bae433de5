"""kabpfctl where it needs no kernel: wrong usage, wrong users, and checking files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kabpfctl import KABPFCTL, NOBODY, Outcome, as_nobody, kabpfctl, run, skip_unless_executable

import kabpf

SECONDS = "a time in seconds (60, 90s, 5m, 1h) or a range (30s..5m)"
TIMEOUT = "a time (30, 30s, 1500ms, 5m), a range (30s..2m), auto or off"
GOOD = b"keepalive: {idle: 60s}\n"
BAD = b"keepalive: {idle: 60s, probes: 200}\n"
COMMANDS = (
    "attach, detach, run, apply, edit, check, plan, status, verify, metrics, explain, presets,"
    " import, sockets, audit, suggest, monitor, doctor"
)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--idle", "0", "0 is not in 1 to 32767 seconds"),
        ("--idle", "32768", "32768 is not in 1 to 32767 seconds"),
        ("--connect-timeout", "999ms", "999ms is not in 1000 to 2147483647 ms"),
        ("--syn-retries", "0", "0 is not in 1 to 127"),
        ("--idle", "-5", f"-5, expected {SECONDS}"),
        ("--idle", "soon", f"soon, expected {SECONDS}"),
        ("--idle", "", f"nothing, expected {SECONDS}"),
        ("--idle", '5", probes: "6', f'5", probes: "6, expected {SECONDS}'),
        ("--idle", "\U0001f600", f"\U0001f600, expected {SECONDS}"),
        ("--interval", "0s", "0s is not in 1 to 32767 seconds"),
        ("--interval", "é\n", f"é\\n, expected {SECONDS}"),
        ("--probes", "128", "128 is not in 1 to 127"),
        ("--probes", "9" * 5000, f"{'9' * 300}..., expected a number, 1 to 127, or a range (3..9)"),
        ("--probes", "six", "six, expected a number, 1 to 127, or a range (3..9)"),
        ("--user-timeout", "0", "0 is not in 1 to 2147483647 ms"),
        ("--user-timeout", "25d", "25d is not in 1 to 2147483647 ms"),
        ("--user-timeout", "never", f"never, expected {TIMEOUT}"),
    ],
)
def test_option_out_of_range_is_wrong_usage(option: str, value: str, message: str) -> None:
    """An option's value is held to the rules of policy files, whoever asks."""
    outcome = kabpfctl("attach", "--cgroup", "/a", f"{option}={value}")
    assert (outcome.status, outcome.output) == (2, "")
    assert outcome.errors.endswith(f"\nkabpfctl attach: error: argument {option}: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "who", "message"),
    [
        ([], "kabpfctl", "the following arguments are required: COMMAND"),
        (
            ["enforce"],
            "kabpfctl",
            f"argument COMMAND: invalid choice: enforce (choose from {COMMANDS})",
        ),
        (["plan", "all"], "kabpfctl", "unrecognized arguments: all"),
        (["attach"], "kabpfctl attach", "the following arguments are required: --cgroup"),
        (["attach", "--cgroup"], "kabpfctl attach", "argument --cgroup: expected one argument"),
        (["detach"], "kabpfctl detach", "one of the arguments --cgroup --all is required"),
        (
            ["detach", "--all", "--cgroup", "/a"],
            "kabpfctl detach",
            "argument --cgroup: not allowed with argument --all",
        ),
        (["run"], "kabpfctl run", "no command given"),
        (["run", "--off", "--"], "kabpfctl run", "no command given"),
        (
            ["run", "--off", "--policy", "a", "true"],
            "kabpfctl run",
            "argument --policy: not allowed with argument --off",
        ),
        (
            ["run", "--idle", "9", "--off", "true"],
            "kabpfctl run",
            "argument --idle: not allowed with argument --off",
        ),
        (
            ["run", "--idle", "0", "true"],
            "kabpfctl run",
            "argument --idle: 0 is not in 1 to 32767 seconds",
        ),
        (
            ["audit", "--timeout", "6d"],
            "kabpfctl audit",
            "argument --timeout: 6d is not in 1 to 432000 seconds",
        ),
        (
            ["audit", "--watch", "soon"],
            "kabpfctl audit",
            "argument --watch: soon, expected a time (60, 90s, 5m, 1h)",
        ),
        (
            ["audit", "--preset", "aws-nla"],
            "kabpfctl audit",
            "argument --preset: aws-nla, did you mean aws-nlb?",
        ),
        (
            ["suggest", "--timeout", "11"],
            "kabpfctl suggest",
            "argument --timeout: 11 is not in 12 to 432000 seconds",
        ),
        (
            ["suggest", "--timeout", "12", "--preset", "ipvs"],
            "kabpfctl suggest",
            "argument --preset: not allowed with argument --timeout",
        ),
        (
            ["monitor", "--event", "lost"],
            "kabpfctl monitor",
            "argument --event: lost, expected one of set, updated, kept, failed, ignored, clamped,"
            " turned_off, timed_out",
        ),
        # As where a script's variable is empty.
        *(
            (
                [*command.split(), "", *more],
                f"kabpfctl {command.split()[0]}",
                f"argument {argument}: nothing, expected a name",
            )
            for command, argument, more in (
                ("attach --cgroup", "--cgroup", ()),
                ("check", "FILE", ()),
                ("explain", "PATH|UNIT|CONTAINER|PID", ()),
                ("metrics --textfile", "--textfile", ()),
                ("monitor --policy", "--policy", ()),
                ("run --policy", "--policy", ("true",)),
                ("sockets --container", "--container", ()),
                ("sockets --unit", "--unit", ()),
                ("status", "POLICY", ()),
            )
        ),
    ],
)
def test_wrong_arguments_are_wrong_usage(arguments: list[str], who: str, message: str) -> None:
    """What the command line does not know ends with status 2 and says what is wrong."""
    outcome = kabpfctl(*arguments)
    assert (outcome.status, outcome.output) == (2, "")
    assert outcome.errors.startswith(f"usage: {who} ")
    # Python 3.12 gave up the quotation marks round the choices.
    said = outcome.errors.replace("'", "")
    assert said.endswith(f"\n{who}: error: {message}\n")


def test_usage_of_run_has_its_command() -> None:
    """And not the dots of argparse."""
    assert kabpfctl("run").errors.splitlines()[-2].strip() == "[--] COMMAND [ARGUMENT...]"


def test_version_is_that_of_the_package() -> None:
    """--version needs no command and no root."""
    assert kabpfctl("--version") == Outcome(0, f"kabpfctl {kabpf.__version__}\n", "")


def test_help_shows_every_command() -> None:
    """--help lists the commands with their purpose."""
    outcome = kabpfctl("--help")
    assert (outcome.status, outcome.errors) == (0, "")
    listed = re.findall(r"^    ([a-z]+)  +\w", outcome.output, re.MULTILINE)
    assert listed == COMMANDS.split(", ")


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("attach --persist", ["--cgroup", "/a", "--idle", "60"]),
        ("detach --all", []),
        ("apply", []),
        ("edit", ["nginx"]),
        ("plan", []),
        ("status", ["--json"]),
        ("audit", []),
        ("suggest", []),
        ("import", []),
    ],
)
def test_command_that_needs_root_says_so(what: str, arguments: list[str]) -> None:
    """Whoever is not root learns it before anything else is looked at, with status 1."""
    expected = f"kabpfctl: {what}: must be run as root\n"
    assert as_nobody(*what.split(), *arguments) == Outcome(1, "", expected)


def test_check_of_good_files(folder: Path) -> None:
    """check names each file with how many policies it has, and needs no root; whose a file is does
    not matter."""
    put(folder / "a.service.yaml", GOOD)
    put(folder / "two.yaml", b"policies: {p: {select: [{cgroup: /p}], keepalive: off},"
        b" q: {select: [{cgroup: /q}], keepalive: on}}")  # fmt: skip
    put(folder / "empty.yaml", b"")
    files = [str(folder / name) for name in ("a.service.yaml", "two.yaml", "empty.yaml")]
    expected = "".join(
        f"{file}: ok, {count}\n"
        for file, count in zip(files, ("1 policy", "2 policies", "0 policies"), strict=True)
    )
    assert as_nobody("check", *files) == Outcome(0, expected, "")
    if os.geteuid() == 0:
        os.chown(files[0], NOBODY, NOBODY)
    assert kabpfctl("check", *files) == Outcome(0, expected, "")


def test_check_of_a_bad_file(folder: Path) -> None:
    """A bad file gives its finding on standard error and status 1; the others are checked too."""
    put(folder / "a.service.yaml", BAD)
    put(folder / "b.service.yaml", GOOD)
    bad, good, none = (str(folder / f"{name}.service.yaml") for name in ("a", "b", "none"))
    assert as_nobody("check", bad, good, none) == Outcome(
        1,
        f"{good}: ok, 1 policy\n",
        f"{bad}:1: keepalive.probes: 200 is not in 1 to 127\n"
        f"{none}: cannot be read: No such file or directory\n",
    )


def test_check_prints_json(folder: Path) -> None:
    """With --json there is one object for each file; findings are on standard error as well."""
    put(folder / "a.service.yaml", BAD)
    put(folder / "b.service.yaml", GOOD)
    bad, good = str(folder / "a.service.yaml"), str(folder / "b.service.yaml")
    outcome = as_nobody("check", "--json", good, bad)
    finding = f"{bad}:1: keepalive.probes: 200 is not in 1 to 127"
    assert (outcome.status, outcome.errors) == (1, f"{finding}\n")
    assert json.loads(outcome.output)["files"] == [
        {"file": good, "policies": ["b.service"], "errors": [], "warnings": []},
        {"file": bad, "policies": [], "errors": [finding], "warnings": []},
    ]


def test_check_warns_of_contradictions(folder: Path) -> None:
    """What can't be meant is said on standard error, and is no failure."""
    file = folder / "a.service.yaml"
    put(file, b"keepalive: {idle: 60, interval: 10, user_timeout: 20s}\n")
    outcome = as_nobody("check", str(file))
    assert (outcome.status, outcome.output) == (0, f"{file}: ok, 1 policy, 1 warning\n")
    assert outcome.errors == (
        f"warning: {file}:1: keepalive.user_timeout: 20 s is below idle + interval of policy"
        " a.service (60 s + 10 s), expected at least 70 s, or auto\n"
    )


def test_presets_shows_what_each_middlebox_asks_for() -> None:
    """Each preset stands in a line with its time-out, its options, and who says so."""
    outcome = as_nobody("presets")
    assert outcome.status == 0
    (line,) = (line for line in outcome.output.splitlines() if line.startswith("aws-nlb "))
    assert line.split()[:8] == [
        "aws-nlb", "350s", "175s", "29s", "5", "answered", "by", "RST",
    ]  # fmt: skip
    shown = json.loads(as_nobody("presets", "--json").output)["presets"]
    (azure,) = (each for each in shown if each["preset"] == "azure-lb")
    assert azure == {
        "preset": "azure-lb", "timeout_s": 240, "idle_s": 120, "interval_s": 20, "probes": 5,
        "on_expiry": "dropped silently, unless TCP reset is on", "source": azure["source"],
    }  # fmt: skip
    assert azure["source"].startswith("Azure documentation, ")


@pytest.mark.parametrize(
    ("name", "encoding"), [(b"\xff.yaml", "utf-8:strict"), ("é.yaml".encode(), "ascii:strict")]
)
def test_check_of_a_file_with_any_name(folder: Path, name: bytes, encoding: str) -> None:
    """A name that can't be printed is no reason to fail."""
    path = os.path.join(os.fsencode(folder), name)
    put(Path(os.fsdecode(path)), b"policies: {}")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([KABPFCTL, "check", path], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"yaml: ok, 0 policies\n")


def test_check_of_a_file_that_cannot_be_read(folder: Path) -> None:
    """A directory, a FIFO that nobody writes to, and a file without permission are findings."""
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    put(folder / "secret", GOOD)
    (folder / "secret").chmod(0o600)
    if os.geteuid() != 0:
        (folder / "secret").chmod(0)
    files = [str(folder / name) for name in ("directory", "fifo", "secret")]
    assert as_nobody("check", *files) == Outcome(
        1,
        "",
        f"{files[0]}: not a regular file, expected a policy file\n"
        f"{files[1]}: not a regular file, expected a policy file\n"
        f"{files[2]}: cannot be read: Permission denied\n",
    )


def test_output_that_nobody_reads_is_no_bug(folder: Path) -> None:
    """A reader that has gone away ends the command without a traceback."""
    put(folder / "a.service.yaml", GOOD)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [KABPFCTL, "check", folder / "a.service.yaml"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("where", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
@pytest.mark.parametrize(
    "command",
    [
        "kabpfctl --version",
        "kabpfctl --help",
        "kabpfctl check --help",
        "kabpfctl presets",
        "kabpfctl presets --json",
        "kabpfctl check $FILE",
        "kabpfctl check --json $FILE",
        "kabpfctl import --json",
        "kabpfd --version",
        "kabpfd --help",
    ],
)
def test_output_that_is_lost_is_said_once(
    folder: Path, command: str, where: str, reason: str
) -> None:
    """Standard output on a full disk, or closed: status 1 and one line."""
    (folder / "a.service.yaml").write_bytes(GOOD)
    program, _, arguments = command.partition(" ")
    script = f"exec {Path(KABPFCTL).with_name(program)} {arguments} {where}"
    environment = {**os.environ, "FILE": str(folder / "a.service.yaml")}
    done = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, text=True, env=environment)
    said = f"{program}: write to standard output: {reason}\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize("command", ["kabpfctl check /none", "kabpfctl none", "kabpfd --none"])
def test_status_is_the_same_where_the_reason_is_lost(command: str, where: str) -> None:
    """Standard error on a full disk, or closed."""
    script = f"exec {Path(KABPFCTL).with_name(command.split()[0])} {command.partition(' ')[2]}"
    expected = subprocess.run(["sh", "-c", script], capture_output=True).returncode
    done = subprocess.run(["sh", "-c", f"{script} {where}"], stdout=subprocess.PIPE)
    assert expected in (1, 2)
    assert (done.returncode, done.stdout) == (expected, b"")


@pytest.mark.parametrize(
    ("mode", "timeout"), [("0755", "6000"), ("0700", None)], ids=["readable", "closed"]
)
def test_check_takes_defaults_of_installed_files(
    folder: Path, mode: str, timeout: str | None
) -> None:
    """A file is checked with the defaults that it will have, as far as the user may read them; that
    they may not is no finding."""
    put(folder / "a.service.yaml", b"keepalive: {idle: 60, probes: 6, user_timeout: auto}")
    script = (
        "mount -t tmpfs tmpfs /run && mkdir -p /run/kabpf/policy.d &&"
        " echo 'defaults: {interval: 10}' >/run/kabpf/policy.d/zz.yaml &&"
        f' chmod {mode} /run/kabpf/policy.d && exec setpriv --reuid={NOBODY} --clear-groups "$@"'
    )
    apart = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("it needs root and a mount namespace to install files for this test alone")
    skip_unless_executable(*apart)
    outcome = run(*apart, KABPFCTL, "check", str(folder / "a.service.yaml"))
    if timeout:
        assert outcome == Outcome(0, f"{folder}/a.service.yaml: ok, 1 policy\n", "")
    else:
        assert outcome.status == 1
        assert "auto without interval" in outcome.errors
        assert "Permission denied" not in outcome.errors


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user may read, as pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="kabpf-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)
