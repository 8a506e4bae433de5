"""kabpfctl run where there is no systemd: in cgroups made by hand."""

import contextlib
import ctypes
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import (
    BIN,
    PINS,
    PROGRAMS,
    UNTOUCHED,
    Peer,
    cgroup_root,
    changed,
    entering,
    refuse_bpf,
    wait_until,
)

from kabpf.runtime.locks import locked

KABPFCTL = str(BIN / "kabpfctl")
TRANSIENT = Path("/run/kabpf/transient.d")
DEADLINE_S = 20

others = set()  # what left() had before the test: of commands on a machine where kabpf is used


def _idle(seconds):
    return UNTOUCHED | {"keepalive": 1, "idle": seconds}


@pytest.fixture(scope="module", autouse=True)
def no_systemd(own_mounts):
    """The module's tests find no systemd."""
    if not Path("/run/systemd/system").is_dir():
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run/systemd"], check=True)
    yield
    subprocess.run(["umount", "/run/systemd"], check=True)


@pytest.fixture(autouse=True)
def nothing_left_of_runs(nothing_left):
    """Fails the test whose commands leave a cgroup, a drop-in or a process."""
    others.clear()
    others.update(left())
    yield
    wait_until(lambda: not left(), "the end of everything", DEADLINE_S)


def left():
    """What there is of kabpfctl run: cgroups, files, watchers."""
    cgroups = [name for _, names, _ in os.walk(cgroup_root()) for name in names if "-run-" in name]
    files = list(TRANSIENT.iterdir()) if TRANSIENT.exists() else []
    return [one for one in (*cgroups, *files, *watchers()) if one not in others]


def watchers():
    """The process ids of watchers, and of what they become."""
    return _found(r"kabpf/apply/watcher\.py|kabpf\.daemon --prune")


def _found(command):
    found = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True)
    return [pid for pid in map(int, found.stdout.split()) if pid not in others]


class Runner(Peer):
    """A peer that kabpfctl run has become."""

    def __init__(self, *arguments, cgroup=None, **environment):
        python = [sys.executable, "-I", "-S", str(PROGRAMS / "peer.py")]
        self.process = subprocess.Popen(
            [KABPFCTL, "run", *map(str, arguments), "--", *python],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=entering(cgroup),
        )

    def cgroup(self):
        """The directory of its cgroup."""
        (path,) = re.findall(
            "^0::/(.*)", Path(f"/proc/{self.process.pid}/cgroup").read_text(), re.M
        )
        return cgroup_root() / path

    def new(self, address):
        """The options of a new connection."""
        return self.options(self.connection(address))


@pytest.fixture
def runner():
    """Starts peers by kabpfctl run."""
    runners = []

    def start(*arguments, **how):
        runners.append(Runner(*arguments, **how))
        return runners[-1]

    yield start
    for one in runners:
        one.end()


@pytest.fixture
def commands():
    """Starts so many commands that wait, and returns when all of them are covered."""
    started = []

    def start(count):
        started.extend(subprocess.Popen([KABPFCTL, "run", "sleep", "100"]) for _ in range(count))
        wait_until(lambda: len(list(TRANSIENT.glob("*.yaml"))) == count, "so many", DEADLINE_S)
        return started

    yield start
    for one in started:
        one.kill()
        one.wait()


@pytest.fixture
def address(peer):
    """The address of a listener that no policy covers."""
    return peer().listener()[1]


@pytest.fixture
def kabpf_active(kabpfctl):
    """kabpf is in the kernel, with no policy."""
    kabpfctl("apply")


def run(*arguments, **how):
    """Run kabpfctl run to its end."""
    environment = {**os.environ, **how.pop("env", {})}
    return subprocess.run(
        [KABPFCTL, "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=DEADLINE_S,
        **how,
    )


def _asking(address):
    """A shell's command that connects, and prints how long the connection may be idle."""
    connect = f"connection = socket.create_connection({tuple(address)!r})"
    ask = "print(connection.getsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE))"
    return shlex.join([sys.executable, "-I", "-S", "-c", f"import socket; {connect}; {ask}"])


@pytest.mark.core
@pytest.mark.loaders
def test_command_has_the_options(runner, address):
    """The sockets of the command have what the command line says, on either side, and others what
    they had."""
    one = runner("--idle", "61", "--interval", "7s", "--probes", 5, "--user-timeout", "auto")
    wanted = {"keepalive": 1, "idle": 61, "interval": 7, "probes": 5, "user_timeout": 96_000}
    assert one.new(address) == wanted
    listener, own = one.listener()
    stranger = Peer(None)
    number = stranger.connection(own)
    assert one.options(one.accept(listener)) == wanted
    assert stranger.options(number) == UNTOUCHED
    stranger.end()


def test_without_options_the_times_are_the_systems(runner, address, write_policy):
    """Keepalive is on, and what is not given is the system's, whatever policy files have for
    defaults."""
    write_policy("defaults.yaml", "defaults: {idle: 99, interval: 9, probes: 3}")
    assert runner().new(address) == UNTOUCHED | {"keepalive": 1}


def test_environment_of_the_libraries_is_honoured(runner, address):
    """What libkeepalive and libdontdie read is taken, and the command line wins."""
    one = runner("--idle", 61, KEEPIDLE="30", DD_TCP_KEEPALIVE_INTVL="7", TCP_KEEPCNT="5")
    assert one.new(address) == UNTOUCHED | {"keepalive": 1, "idle": 61, "interval": 7, "probes": 5}


def test_syn_retries_of_the_environment_bound_connect(runner, peer):
    """TCP_SYNCNT is honoured as msantos/libkeepalive does, and the command line wins."""
    server = peer()
    address = server.listen(server.open_socket(socket.AF_INET), ["127.0.0.1", 0], 0)
    server.connection(address)  # for which alone there is room: the next SYN is not answered
    for arguments, environment, expected in (
        ((), {"TCP_SYNCNT": "1"}, 1),
        (("--syn-retries", 3, "--connect-timeout", "9s"), {"TCP_SYNCNT": "1"}, 3),
        ((), {"TCP_SYNCNT": "0", "TCP_KEEPIDLE": "0", "KEEPIDLE": ""}, 6),
    ):
        one = runner(*arguments, **environment)
        number = one.open_socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        assert one.connect_error(number, address) == "EINPROGRESS"
        retries = one.get_bytes(number, socket.SOL_TCP, socket.TCP_SYNCNT, 4)
        assert int.from_bytes(bytes.fromhex(retries), sys.byteorder) == expected
        assert one.options(number)["user_timeout"] == (9000 if arguments else 0)


def test_foreign_keepalive_is_said():
    """A KEEPALIVE that is other software's stops no command."""
    done = run("echo", "begun", env={"KEEPALIVE": "65"})
    assert (done.returncode, done.stdout) == (0, "begun\n")
    assert done.stderr == "kabpfctl: KEEPALIVE: 65 is neither off nor on; ignored\n"


def test_command_whose_work_is_elsewhere_is_said(tmp_path):
    """The client of an engine runs, and one line says that its containers are not covered."""
    (tmp_path / "docker").write_text("#!/bin/sh\necho begun\n")
    (tmp_path / "docker").chmod(0o755)
    done = run("./docker", "run", "debian", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "begun\n")
    assert done.stderr == (
        "kabpfctl: docker: a container runs in another cgroup, which this policy does not cover\n"
    )


def test_debugging_is_a_log(runner, address, kabpfd):
    """Under DD_DEBUG=1 kabpfd logs the command's sockets, from the first one on."""
    daemon = kabpfd()
    one = runner("--idle", 61, DD_DEBUG="1")
    port = one.local_port(one.connection(address))
    errors, said = daemon.process.stderr.fileno(), ""
    while "set: " not in said:
        assert select.select([errors], [], [], DEADLINE_S)[0], said
        said += os.read(errors, 1 << 16).decode()
    assert f"set: 127.0.0.1:{port} -> " in said
    assert "keepalive on, idle 61s" in said


def test_debugging_that_nobody_logs_is_said():
    """Without kabpfd the command runs, and standard error says what is missing."""
    done = run("echo", "begun", env={"DD_DEBUG": "1"})
    assert (done.returncode, done.stdout) == (0, "begun\n")
    assert done.stderr == (
        "kabpfctl: DD_DEBUG: no socket is logged: kabpfd is not running; try: systemctl"
        " start kabpf\n"
    )


def test_environment_that_would_be_ignored_is_an_error():
    """Each variable that is wrong is named, and the command does not begin."""
    done = run("echo", "begun", env={"KEEPIDLE": "0", "DD_USE_KEEPALIVE": "no"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "kabpfctl: DD_USE_KEEPALIVE: no, expected 0 or 1\n"
        "KEEPIDLE: 0 is not in 1 to 32767 seconds\n"
    )
    assert not PINS.exists()


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--off"], {}), ([], {"KEEPALIVE": "off", "KEEPIDLE": "9"}), ([], {"DD_USE_KEEPALIVE": "0"})],
)
def test_off_is_stronger_than_the_cgroup_above(
    runner, address, policy, cgroup, arguments, environment
):
    """Nothing is set, whatever policy the caller's cgroup has."""
    policy("{idle: 62}")
    assert runner(*arguments, cgroup=cgroup, **environment).new(address) == UNTOUCHED


def test_policy_of_the_files_is_taken_by_its_name(runner, address, policy, write_policy):
    """All that a policy says holds for the command, destinations and mode as well."""
    policy("{idle: 62, jitter: 0%}", "mode: enforce", "destinations: [{to: 127.0.0.0/8, idle: 63}]")
    one = runner("--policy", "a")
    number = one.connection(address)
    assert one.options(number) == _idle(63)
    one.set_option(number, "idle", 9)
    assert one.options(number) == _idle(63)


def test_policy_that_is_not_there_is_refused(policy):
    """The error names the policies that there are."""
    policy("{idle: 62}")
    done = run("--policy", "b", "true")
    assert (done.returncode, done.stderr) == (1, "kabpfctl: no policy b, expected a\n")


def test_preset_fits_a_middlebox(runner, address):
    """A preset is known by its name, and options override it."""
    options = runner("--preset", "aws-nlb", "--probes", 4).new(address)
    assert options == {"keepalive": 1, "idle": 175, "interval": 29, "probes": 4, "user_timeout": 0}


def test_application_wins(runner, address):
    """As under the libraries, what the command sets itself stays, before and after it connects."""
    one = runner("--idle", 61)
    early, late = one.open_socket(2), one.connection(address)
    one.set_option(early, "idle", 9)
    one.connect(early, address)
    one.set_option(late, "idle", 8)
    assert (one.options(early), one.options(late)) == (_idle(9), _idle(8))
    one.set_option(late, "keepalive", 0)
    assert one.options(late) == _idle(8) | {"keepalive": 0}


def test_children_are_covered(address):
    """What the command starts is covered, be it a shell's pipe line."""
    done = run("--idle", 61, "sh", "-c", f"{_asking(address)} | cat")
    assert done.stdout == "61\n"


LOOK = """
echo "$@"; pwd; umask; ulimit -n; ulimit -t; cat; env | sort | grep -v '^_='
cut -d ' ' -f 4-8 /proc/$$/stat
while read -r key value; do  # the shell blocks signals while it starts a program
    case $key in SigBlk:|SigIgn:|Cap*|NoNew*) echo $key $value; esac
done </proc/$$/status
ls -l /proc/$$/fd >fds  # with no pipe open
sed 's/.* \\([0-9]\\)/\\1/' fds | sort
"""


@pytest.mark.parametrize("settings", ["plain", "odd"])
def test_command_finds_what_it_would_find_without_run(tmp_path, settings):
    """Arguments, working directory, umask, limits, environment, parent, process group, session,
    signals, privileges and descriptors are those that the command would have had."""

    def look(*before):
        def prepare():
            if settings == "odd":
                os.umask(0o027)
                for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_IGN)
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

        odd = {"PATH": os.environ["PATH"], "LANG": "C", "EMPTY": "", "ODD": "\udce4\n=x"}
        with open(tmp_path / "input", "w+") as file:
            file.write("input\n")
            file.seek(0)
            command = ["sh", "-c", LOOK, "sh", "a b", "", "--json", "--"]
            done = subprocess.run(
                [*before, *command],
                cwd=tmp_path,
                env=odd if settings == "odd" else None,
                stdin=file,
                capture_output=True,
                pass_fds=[file.fileno()],
                preexec_fn=prepare,
                start_new_session=settings == "odd",
            )
        # The numbers of pipes, sessions and process groups are others each time.
        return re.sub(rb"pipe:\[\d+\]", b"pipe", re.sub(rb"(?m)^(\d+ )\d+ \d+", b"\1", done.stdout))

    assert look(KABPFCTL, "run", "--idle", "61") == look()


@pytest.mark.parametrize(
    "entries", [[b"LC_CTYPE=C", b"B=1"], [b"A=1", b"A=2", b"=nameless", b"without", b"", b"A="]]
)
def test_environment_is_handed_on_byte_by_byte(entries):
    """Also what Python sets for itself, and what it has no word for."""
    words = [KABPFCTL.encode(), b"run", b"/bin/cat", b"/proc/self/environ"]

    def execute():
        lists = [(ctypes.c_char_p * (len(each) + 1))(*each) for each in (words, entries)]
        ctypes.CDLL(None).execve(words[0], *lists)

    assert subprocess.check_output(words, preexec_fn=execute) == b"\0".join([*entries, b""])


def test_command_is_the_process_that_was_started(tmp_path):
    """Whoever started kabpfctl has the command as its child."""
    process = subprocess.Popen([KABPFCTL, "run", "sh", "-c", "echo $$"], stdout=subprocess.PIPE)
    assert int(process.communicate()[0]) == process.pid


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7), ("kill -TERM $$", -15), ("kill -PIPE $$", -13)]
)
def test_exit_status_is_the_commands(script, status):
    """Also where a signal ends it."""
    assert run("sh", "-c", script).returncode == status


def test_descriptors_that_are_closed_stay_closed(tmp_path):
    """Also standard output and standard error, which Python has no stream for then."""
    script = f"exec {KABPFCTL} run sh -c 'ls /proc/$$/fd >{tmp_path}/fds; :' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script]).returncode == 0
    assert not {"0", "2"} & set((tmp_path / "fds").read_text().split())


def test_what_is_wrong_is_not_said_on_another_descriptor():
    """Where standard error is closed, standard output is the command's all the same."""
    done = subprocess.run(["sh", "-c", f"{KABPFCTL} run none 2>&-"], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (127, b"")


def test_signals_reach_the_command(runner):
    """A signal to the process that was started is one to the command."""
    one = runner()
    one.listener()
    one.process.terminate()
    assert one.process.wait(DEADLINE_S) == -signal.SIGTERM


def test_interrupted_before_it_is_the_command(kabpf_active):
    """It ends by the signal, as the command would, for a shell to see."""
    with locked():
        process = subprocess.Popen([KABPFCTL, "run", "true"])
        waits = re.compile(rf"-> FLOCK .* {process.pid} ")
        wait_until(lambda: waits.search(Path("/proc/locks").read_text()), "its turn", DEADLINE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == -signal.SIGINT


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("kabpf-no-such-command", 127, "No such file or directory"),
        ("./no-such-command", 127, "No such file or directory"),
        ("", 127, "No such file or directory"),
        ("./plain", 126, "Permission denied"),
        ("./directory", 126, "Permission denied"),
        ("./no-interpreter", 127, "No such file or directory"),
    ],
)
def test_command_that_can_not_be_started_is_said(tmp_path, command, status, said):
    """The exit status is that of env(1), with one line on standard error."""
    (tmp_path / "plain").write_text("")
    (tmp_path / "directory").mkdir()
    (tmp_path / "no-interpreter").write_text("#!/no/such/interpreter\n")
    (tmp_path / "no-interpreter").chmod(0o755)
    done = run("--idle", 61, command, cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr == f"kabpfctl: run {command}: {said}\n"


def test_script_without_an_interpreter_is_the_shells(tmp_path):
    """As execvp(3) has it."""
    (tmp_path / "script").write_text("echo $0 $1\n")
    (tmp_path / "script").chmod(0o755)
    assert run("./script", "a", cwd=tmp_path).stdout == "./script a\n"


def test_watcher_holds_no_descriptor():
    """A pipe ends with the command, though a process of it lives on in the cgroup."""
    script = "sleep 100 </dev/null >/dev/null 2>&1 & echo $!"
    child = int(run("--idle", 61, "sh", "-c", script).stdout)
    assert left()
    os.kill(child, signal.SIGKILL)


def test_policy_lasts_until_the_last_process(runner, address):
    """The cgroup stays covered as long as a process lives in it, and then everything goes."""
    one = runner("--idle", 61)
    one.listener()
    other = Peer(one.cgroup())
    one.end()
    assert other.options(other.connection(address)) == _idle(61)
    other.end()


def test_killed_command_leaves_nothing(runner, kabpfctl):
    """SIGKILL of all that is in the cgroup ends the policy, in the kernel as well."""
    one = runner("--idle", 61)
    one.listener()
    (one.cgroup() / "cgroup.kill").write_text("1")
    wait_until(lambda: not left(), "the end of the policy", DEADLINE_S)
    assert json.loads(kabpfctl("status", "--json").stdout)["policies"] == []


def test_daemon_ends_the_policy(runner, kabpfd, kabpfctl):
    """A running kabpfd needs no watcher to see the end of a command."""
    daemon = kabpfd()
    one = runner("--idle", 61)
    one.listener()
    for pid in watchers():
        os.kill(pid, signal.SIGKILL)
    daemon.wait_for("1 policy active")
    one.end()
    daemon.wait_for("0 policies active")
    assert not left()


def test_end_of_a_command_activates_no_file(runner, kabpfd, write_policy):
    """Files that were changed meanwhile wait for a reload as before."""
    daemon = kabpfd()
    one = runner("--idle", 61)
    one.listener()
    for pid in watchers():
        os.kill(pid, signal.SIGKILL)
    daemon.wait_for("1 policy active")
    write_policy("waiting.yaml", "select: [{unit: none.service}]\nkeepalive: {idle: 62}\n")
    one.end()
    daemon.wait_for("0 policies active")
    assert not left()


def test_daemon_has_room_for_many_commands(kabpfd, commands):
    """It sees the end of more than it may have files open at first."""
    daemon = kabpfd("prlimit", "--nofile=40:4096", str(BIN / "kabpfd"))
    running = commands(24)
    daemon.wait_for("24 policies active")
    for one in running:
        one.kill()
    daemon.wait_for("0 policies active")


def test_commands_that_end_together_are_tidied_up_by_one(kabpf_active, commands):
    """There is one process at a time that does it."""
    for one in commands(8):
        one.kill()
    seen = []
    prune = "^[^ ]+ -P -m kabpf.daemon --prune"
    wait_until(lambda: seen.append(len(_found(prune))) or not left(), "the end", DEADLINE_S)
    assert max(seen) == 1


@pytest.mark.parametrize("waits", ["watcher", "daemon"])
def test_end_that_the_kernel_does_not_tell_is_seen(
    runner, request, kabpf_active, make_cgroup, waits
):
    """A cgroup that is emptied and removed within 10 ms after another event ends the policy."""
    if waits == "daemon":
        request.getfixturevalue("kabpfd")()
    one = runner("--idle", 61)
    one.listener()
    cgroup, outside = one.cgroup(), make_cgroup("outside")
    for pid in watchers() if waits == "daemon" else ():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)  # as the kernel tells of the first change at once when nothing was for a while
    (cgroup / "cgroup.freeze").write_text("1")
    (outside / "cgroup.procs").write_text(str(one.process.pid))
    with contextlib.suppress(FileNotFoundError):  # whoever waits may have removed it already
        cgroup.rmdir()
    wait_until(lambda: not left(), "the end of the policy")


def test_next_apply_ends_what_nobody_watched(runner, kabpfctl):
    """Where watcher and daemon are gone, the next command that reconciles tidies up."""
    one = runner("--idle", 61)
    one.listener()
    for pid in watchers():
        os.kill(pid, signal.SIGKILL)
    one.end()
    kabpfctl("apply")
    assert not left()
    assert json.loads(kabpfctl("status", "--json").stdout)["policies"] == []


def test_next_look_at_the_files_changes_nothing(runner, kabpfctl, kabpf_active):
    """What run activates without a look at anything else is what apply would."""
    one = runner("--idle", 61)
    one.listener()
    assert changed(kabpfctl) == {}
    (policy,) = json.loads(kabpfctl("status", "--json").stdout)["policies"]
    assert policy["source"].startswith(str(TRANSIENT))
    shown = json.loads(kabpfctl("explain", "--json", one.process.pid).stdout)["cgroups"][0]
    assert (shown["policy"], shown["active"]) == (policy["policy"], True)


def test_wrong_policy_file_stops_no_command(runner, address, write_policy, kabpf_active):
    """Where kabpf is active, what an administrator is about to write is nobody else's matter."""
    write_policy("wrong.yaml", "keepalive: perhaps")
    assert runner("--idle", 61).new(address) == _idle(61)


def test_wrong_policy_file_is_left_out_where_run_loads_kabpf(write_policy):
    """Where kabpf is not active, the command is covered all the same, and the file is named."""
    write_policy("wrong.service.yaml", "keepalive: perhaps")
    done = run("--idle", 61, "echo", "begun")
    assert (done.returncode, done.stdout) == (0, "begun\n")
    assert "wrong.service.yaml:1: keepalive: perhaps, expected" in done.stderr


def test_command_that_can_not_be_covered_does_not_begin():
    """Where kabpf can't be activated, it says why, and nothing is left."""
    command = [KABPFCTL, "run", "--idle", "61", "echo", "begun"]
    done = subprocess.run(command, preexec_fn=refuse_bpf, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the kernel refuses bpf(2) to root" in done.stderr
    wait_until(lambda: not left(), "the end of the watcher", DEADLINE_S)


@pytest.mark.loaders
def test_inner_run_wins(address):
    """A run within a run has its own policy, and both go."""
    python = _asking(address)
    inner = f"{python}; {KABPFCTL} run --idle 62 {python}; exec {KABPFCTL} run --off {python}"
    done = run("--idle", 61, "sh", "-c", inner)
    assert done.stdout == "61\n62\n7200\n"


def test_dozens_at_once(address, runner):
    """Each of many commands that start together has its own policy."""
    runners = [runner("--idle", 100 + number) for number in range(24)]
    assert [one.new(address) for one in runners] == [_idle(100 + number) for number in range(24)]


def test_new_command_uncovers_nobody(runner, address):
    """A command that starts or ends leaves another one's policy alone."""
    one = runner("--idle", 61)
    one.listener()
    assert run("--idle", 62, "true").returncode == 0
    wait_until(lambda: len(list(TRANSIENT.iterdir())) == 1, "the end of the other", DEADLINE_S)
    assert one.new(address) == _idle(61)


def _steps(*arguments):
    """The fault points of a run."""
    traced = run(*arguments, env={"KABPF_FAULT": "trace"})
    assert traced.returncode == 0
    return re.findall(r"^fault point: (.*)", traced.stderr, re.MULTILINE)


def test_killed_at_any_step_leaves_nothing(kabpfctl, kabpf_active):
    """Killed between any two steps, run leaves nothing that does not go by itself, and the next run
    works."""
    steps = _steps("--idle", 61, "true")
    assert len(steps) > 5
    for step in steps:
        assert run("--idle", 61, "true", env={"KABPF_FAULT": step}).returncode == -9, step
        wait_until(lambda: not left(), f"the end of what was there at: {step}", DEADLINE_S)
    assert run("--idle", 61, "true").returncode == 0


def test_cgroup_tree_that_can_not_be_written_to_is_said():
    """As in a container whose cgroups are read-only."""
    script = f"mount -o remount,bind,ro {cgroup_root()} && exec {KABPFCTL} run true"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search("make cgroup .*: Read-only file system; the cgroup2 tree", done.stderr)
