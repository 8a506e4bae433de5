"""What this machine can't do, and what a policy can't say, is said, and changes nothing."""

import contextlib
import errno
import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from harness import (
    BIN,
    DROP_INS,
    PATIENCE,
    PINS,
    UNTOUCHED,
    WITHOUT_BTF,
    WITHOUT_SYS_ADMIN,
    cgroup_root,
    changed,
    options_of_new,
    path_of,
    refuse_bpf,
    refuse_bpf_command,
)
from malformed import MALFORMED

from kabpf.kernel import mountinfo
from kabpf.kernel.libbpf import library

# By which libbpf loads and attaches (enum bpf_cmd).
BPF_COMMANDS = {"BPF_MAP_CREATE": 0, "BPF_PROG_LOAD": 5, "BPF_LINK_CREATE": 28}


def _maps():
    """What kabpf's pinned maps hold, as bpftool reads them; of the cgroups those with a policy,
    because others come and go on any machine."""

    def dumped(name):
        command = ["bpftool", "--json", "map", "dump", "pinned", PINS / f"kabpf_{name}"]
        return [one["formatted"] for one in json.loads(subprocess.check_output(command))]

    covered = [one for one in dumped("cgroups") if one["value"]["policy_id"]]
    return dumped("policies"), dumped("births"), covered


@pytest.fixture
def active(cgroup, kabpfctl):
    """A policy that is active; what the kernel has of it."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--interval", 11, "--probes", 5)
    return _maps()


def test_malformed_policy_changes_nothing(active, kabpfctl):
    """Each malformed file gives its one message and status 1, and nothing in the kernel changes."""
    DROP_INS.mkdir(exist_ok=True)
    file = DROP_INS / "app.service.yaml"
    for text, message in MALFORMED:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        done = kabpfctl("apply", status=1)
        assert done.stderr == f"kabpfctl: {file}:{message}\n"
        assert done.stdout == ""
    assert len(MALFORMED) >= 40
    assert _maps() == active


def test_policy_file_of_somebody_else_is_refused(active, write_policy, kabpfctl, cgroup):
    """A file that root does not own, or that others may write, changes nothing in the kernel."""
    text = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: 62}}\n'
    file = write_policy("zzz.yaml", text)
    os.chown(file, 1000, -1)
    done = kabpfctl("apply", status=1)
    assert done.stderr == f"kabpfctl: {file}: owned by uid 1000, expected root\n"
    os.chown(file, 0, -1)
    file.chmod(0o664)
    done = kabpfctl("apply", status=1)
    assert done.stderr == f"kabpfctl: {file}: mode 0664, expected one that root alone can write\n"
    assert _maps() == active


@pytest.mark.parametrize("beside", ["good files", "a bad file"])
def test_attach_that_is_wrong_changes_nothing(active, write_policy, kabpfctl, cgroup, beside):
    """attach puts back what was there when its own options can't be, whatever lies beside it."""
    directory = Path("/run/kabpf/policy.d")
    bad = write_policy("bad.service.yaml", "keepalive: {idle: never}\n")
    if beside == "good files":
        bad.unlink()
    before = {path: path.read_bytes() for path in directory.iterdir()}
    done = kabpfctl("attach", "--cgroup", cgroup, "--user-timeout", "auto", status=1)
    assert "user_timeout: auto without" in done.stderr
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert _maps() == active
    bad.unlink(missing_ok=True)
    assert changed(kabpfctl) == {}


@pytest.fixture
def version1():
    """A cgroup of version 1 alone, with a process."""
    hierarchy = next((each for each in mountinfo.visible_mounts() if each.type == "cgroup"), None)
    if hierarchy is None:
        pytest.skip("no hierarchy of version 1 is mounted")
    directory = Path(hierarchy.point, f"kabpf-version1-{os.getpid()}")
    directory.mkdir()
    process = subprocess.Popen(["sleep", "infinity"])
    try:
        (directory / "cgroup.procs").write_text(str(process.pid))
        yield directory
    finally:
        process.kill()
        process.wait()
        directory.rmdir()


def test_cgroup_of_version_1_is_told_from_one_that_is_missing(kabpfctl, version1):
    """attach and explain say where its processes are in version 2."""
    said = f" is a cgroup of version 1 ({version1}); its processes are in /"
    for path in (version1, f"/{version1.name}"):
        for command in (("attach", "--idle", 61, "--cgroup"), ("explain",)):
            assert f"kabpfctl: {path}{said}" in kabpfctl(*command, path, status=1).stderr


def test_cgroup_is_named_as_systemd_names_it(kabpfctl, cgroup):
    """attach takes a path as systemd-cgls prints it, and a unit's name; detach likewise."""
    unit = cgroup / "kabpf-named.service"
    unit.mkdir()
    for name in (str(unit.relative_to(cgroup_root())), unit.name, "kabpf-named"):
        done = kabpfctl("attach", "--cgroup", name, "--idle", 61)
        assert done.stdout.startswith(f"/{unit.relative_to(cgroup_root())}: ")
        kabpfctl("detach", "--cgroup", name)
    unit.rmdir()


def test_attach_to_something_else_than_a_cgroup_is_refused(kabpfctl, tmp_path, cgroup):
    """A missing cgroup, a file, and a directory elsewhere are refused, and nothing is loaded."""
    for path in (cgroup / "missing", cgroup / "cgroup.procs", tmp_path, "relative"):
        done = kabpfctl("attach", "--cgroup", path, "--idle", 61, status=1)
        assert f"expected a directory below {cgroup_root()}" in done.stderr
    link = tmp_path / "link"
    link.symlink_to(cgroup)
    kabpfctl("attach", "--cgroup", link, "--idle", 61, status=1)
    assert not PINS.exists()


def _hidden(script, command="kabpfctl apply"):
    """Runs a command in a mount namespace after a shell script."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f"{script}\nexec {BIN}/{command}"],
        capture_output=True,
        text=True,
        timeout=20 * PATIENCE,
    )


def _libbpf():
    listed = subprocess.check_output(["/sbin/ldconfig", "-p"], text=True)
    return next(line.split()[-1] for line in listed.splitlines() if "libbpf.so.1 " in line)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            WITHOUT_BTF,
            "/sys/kernel/btf/vmlinux is missing; boot a kernel with CONFIG_DEBUG_INFO_BTF",
        ),
        (
            "umount {cgroup_root}",
            "no cgroup2 tree is mounted whose root is this cgroup namespace's;"
            " mount one at /sys/fs/cgroup, as systemd does",
        ),
        (
            "mount --bind /dev/null {libbpf}",
            "libbpf.so.1 is missing; install libbpf1 (Debian) or libbpf (Fedora)",
        ),
        (
            "mount -t tmpfs none /sys/fs",
            "no cgroup2 tree is mounted",
        ),
    ],
    ids=["no BTF", "no cgroup2", "no libbpf", "nothing below /sys/fs"],
)
def test_what_the_machine_lacks_is_named(script, message):
    """Each missing thing is one clear message with the remedy, and status 1, or kabpfd's, which is
    that of RestartPreventExitStatus= in kabpf.service."""
    script = script.format(cgroup_root=cgroup_root(), libbpf=_libbpf())
    for command, status in (("kabpfctl apply", 1), ("kabpfd", 78)):
        done = _hidden(script, command)
        assert done.returncode == status
        assert done.stderr.startswith(f"{command.split()[0]}: {message}")
        assert "Traceback" not in done.stderr
        assert not PINS.exists()


def test_missing_capability_is_named():
    """Root without a capability is told which one."""
    command = [
        "setpriv",
        "--bounding-set",
        "-bpf",
        "--inh-caps",
        "-bpf",
        f"{BIN}/kabpfctl",
        "apply",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "kabpfctl: CAP_BPF missing; run it as root with these capabilities\n"
    assert not PINS.exists()


def test_bpf_file_system_is_mounted_where_it_is_missing(cgroup):
    """Without a BPF file system at /sys/fs/bpf kabpfctl mounts one."""
    # Below the session's own there is the machine's.
    script = "while umount /sys/fs/bpf 2> /dev/null; do :; done"
    script += f"; {BIN}/kabpfctl attach --cgroup {cgroup} --idle 61; ls /sys/fs/bpf/kabpf"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kabpf_sockops" in done.stdout


def _detached_by_force():
    pin = PINS / "kabpf_sockops"
    subprocess.run(["bpftool", "link", "detach", "pinned", pin], check=True)
    return f"{pin} is not attached to {cgroup_root()}; try: kabpfctl apply"


def _pin_removed():
    pin = PINS / "kabpf_births"
    pin.unlink()
    return f"{pin} is missing; try: kabpfctl apply"


def _program_removed(name):
    pin = PINS / name
    pin.unlink()
    return f"{pin} is missing; try: kabpfctl apply"


def _map_of_another_version():
    pin = PINS / "kabpf_cgroups"
    pin.unlink()
    command = ["bpftool", "map", "create", pin, "type", "hash", "key", "8", "value", "16"]
    subprocess.run([*command, "entries", "8", "name", "kabpf_cgroups"], check=True)
    return f"{pin} is not kabpf's map"


def _another_build():
    pin = PINS / "kabpf_totals"
    value = ["1"] + ["0"] * 31
    command = ["bpftool", "map", "update", "pinned", pin, "key", "0", "0", "0", "0", "value"]
    subprocess.run([*command, *value], check=True)
    return f"{PINS} comes from another version of kabpf; try: kabpfctl apply"


def test_kernel_without_a_feature_is_told_from_one_with_it():
    """What is missing from the kernel's BTF is found by name."""
    names = {"bpf_iter_tcp_get_func_proto": 12, "kabpf_has_no_such_function": 12}
    assert library.missing_from_btf(names) == ["kabpf_has_no_such_function"]


def test_refused_system_call_is_named():
    """Root whose bpf(2) is filtered, as in a container, is told what refuses it."""
    done = subprocess.run(
        [BIN / "kabpfctl", "apply"], preexec_fn=refuse_bpf, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("kabpfctl: the kernel refuses bpf(2) to root: let ")


@pytest.mark.parametrize(
    "error", [errno.EPERM, errno.EBUSY, errno.E2BIG, errno.ENOSPC], ids=errno.errorcode.get
)
@pytest.mark.parametrize("command", BPF_COMMANDS)
def test_refused_step_of_a_load_is_named(cgroup, kabpfctl, command, error):
    """Whichever step is refused, and with whichever errno: a line says so, nothing is left, and the
    next apply does it."""
    done = subprocess.run(
        [BIN / "kabpfctl", "attach", "--cgroup", cgroup, "--idle", "61"],
        preexec_fn=functools.partial(refuse_bpf_command, BPF_COMMANDS[command], error),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    said = "the kernel refuses bpf(2) to root" if error == errno.EPERM else os.strerror(error)
    assert done.stderr.startswith("kabpfctl: ") and "Traceback" not in done.stderr
    assert said in done.stderr or os.strerror(error) in done.stderr
    assert not [name for name in os.listdir(PINS.parent) if "kabpf" in name]
    kabpfctl("apply")


@pytest.mark.parametrize("name", ["kabpf-new", "kabpf-old"])
def test_what_an_interrupted_command_left_is_cleared_up(cgroup, kabpfctl, peer, name):
    """Pins of a load or unload that was killed half-way are named by status, and go at the next
    apply with what they have active."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    PINS.rename(PINS.with_name(name))
    assert "leftover pins" in kabpfctl("status").stdout
    Path("/run/kabpf/policy.d").joinpath(*os.listdir("/run/kabpf/policy.d")).unlink()
    kabpfctl("apply")
    assert "left pins" not in kabpfctl("status").stdout
    _, address = peer().listener()
    client = peer(cgroup)
    assert client.keepalive(client.connection(address)) == 0


def test_retrofit_that_was_refused_stays_owed(cgroup, kabpfctl, peer):
    """Where the open sockets could not be updated, the next apply does it."""
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    attach = [BIN / "kabpfctl", "attach", "--cgroup", cgroup, "--idle", "61"]
    kabpfctl("apply")
    done = subprocess.run([*WITHOUT_SYS_ADMIN, *attach], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CAP_SYS_ADMIN is missing; try: systemctl restart kabpf-retrofit.socket" in done.stderr
    assert client.keepalive(number) == 0
    kabpfctl("apply")
    assert client.options(number)["idle"] == 61


def test_refused_retrofit_keeps_no_later_policy_back(cgroup, other_cgroup, kabpfctl, peer):
    """While open sockets can't be updated, policies come and go for new connections."""
    kabpfctl("apply")

    def refused(*arguments):
        command = [*WITHOUT_SYS_ADMIN, BIN / "kabpfctl", *arguments]
        assert subprocess.run(command, capture_output=True).returncode == 1

    refused("attach", "--cgroup", cgroup, "--idle", "61")
    refused("attach", "--cgroup", other_cgroup, "--idle", "62")
    assert options_of_new(peer, other_cgroup)["idle"] == 62
    refused("attach", "--cgroup", cgroup, "--idle", "63")
    assert options_of_new(peer, cgroup)["idle"] == 63
    subprocess.run([*WITHOUT_SYS_ADMIN, BIN / "kabpfctl", "detach", "--cgroup", cgroup])
    assert options_of_new(peer, cgroup) == UNTOUCHED


def test_killed_command_leaves_what_the_next_apply_completes(cgroup, kabpfctl, peer):
    """kabpfctl killed at any moment of attach leaves no socket uncovered after the next apply, and
    nothing beside the pins."""
    _, address = peer().listener()
    client = peer(cgroup)
    for round in range(12):
        number = client.connection(address)
        idle = 100 + round
        attach = [BIN / "kabpfctl", "attach", "--cgroup", cgroup, "--idle", str(idle)]
        killed = subprocess.Popen(attach, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            killed.wait(0.06 + 0.01 * round)
        killed.kill()
        killed.wait()
        kabpfctl("apply")
        asked = str(idle) in "".join(
            file.read_text() for file in Path("/run/kabpf/policy.d").glob("*.yaml")
        )
        if asked:
            assert client.options(number)["idle"] == idle
        assert [name for name in os.listdir(PINS.parent) if "kabpf" in name] == ["kabpf"]


@pytest.mark.parametrize(
    "damage",
    [
        _detached_by_force,
        _pin_removed,
        *(
            functools.partial(_program_removed, f"kabpf_{name}")
            for name in (
                *("cgroup_mkdir", "cgroup_rmdir", "retrofit", "list", "events"),
                "setsockopt_program",
            )
        ),
        _map_of_another_version,
        _another_build,
    ],
)
def test_damaged_data_plane_is_noticed_and_replaced(cgroup, kabpfctl, peer, damage):
    """Pins that are not whole, or not this version's, are not mistaken for an active policy, and
    the next apply activates the policy again."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    message = damage()
    assert kabpfctl("status", status=1).stderr == f"kabpfctl: {message}\n"
    kabpfctl("apply")
    _, address = peer().listener()
    client = peer(cgroup)
    assert client.options(client.connection(address))["idle"] == 61


def test_foreign_directory_among_the_pins_is_named(cgroup, kabpfctl):
    """What kabpf did not pin it does not take away, and says what is in the way."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    (PINS / "kabpf_cgroup_mkdir").unlink()
    (PINS / "foreign").mkdir()
    refused = kabpfctl("apply", status=1).stderr
    foreign = Path("/sys/fs/bpf").rglob("foreign")
    (found,) = foreign
    assert refused.startswith(f"kabpfctl: remove {found}: ")
    assert refused.endswith("; files or mounts of others are in the way\n")
    found.rmdir()
    kabpfctl("apply")


def test_file_in_the_place_of_the_run_directory_is_named(kabpfctl):
    """Where /run/kabpf can't be a directory, kabpfctl and kabpfd say so."""
    script = "mount -t tmpfs tmpfs /run; touch /run/kabpf; {}"
    for command in ("kabpfctl apply", "kabpfd"):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script.format(f"{BIN}/{command}")],
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr
        assert f"{command.split()[0]}: open /run/kabpf/" in done.stderr
        assert "Not a directory" in done.stderr


def test_bpf_file_system_that_is_read_only_is_named(cgroup):
    """Where nothing can be pinned, kabpfctl says so and ends with status 1."""
    script = f"mount -o remount,ro,bind /sys/fs/bpf; exec {BIN}/kabpfctl apply"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 1
    expected = "the BPF file system must be writable"
    assert done.stderr == f"kabpfctl: make {PINS}-new: Read-only file system; {expected}\n"


def test_pins_that_cannot_be_removed_are_named(cgroup):
    """Where another mount keeps what an interrupted command left, kabpfctl says so."""
    left = f"{PINS}-old"
    script = f"mkdir {left}; mount --bind {left} {left}; exec {BIN}/kabpfctl apply"
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True
        )
    finally:
        os.rmdir(left)
    assert done.returncode == 1
    expected = "files or mounts of others are in the way"
    assert done.stderr == f"kabpfctl: remove {left}: Device or resource busy; {expected}\n"
