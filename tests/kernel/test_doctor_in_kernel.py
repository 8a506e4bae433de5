"""What kabpfctl doctor says of real situations."""

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
from harness import (
    BIN,
    DROP_INS,
    PATIENCE,
    PINS,
    WITHOUT_BTF,
    cgroup_root,
    path_of,
    refuse_bpf,
    set_sysctl,
    wait_until,
)

RUNTIME = Path("/run/kabpf/policy.d")
APPLY = "kabpfctl apply"


def _said(done):
    """The findings by check, as [grade, found, advice]."""
    found = {}
    for each in json.loads(done.stdout)["findings"]:
        found.setdefault(each["check"], []).append((each["status"], each["found"], each["fix"]))
    assert "a bug in kabpf" not in done.stdout
    assert done.stderr == ""
    grades = {grade for findings in found.values() for grade, *_ in findings}
    assert done.returncode == ("error" in grades)
    return found


def _run(*command, **others):
    done = subprocess.run([*command, BIN / "kabpfctl", "doctor", "--json"],
                          capture_output=True, text=True, **others)  # fmt: skip
    return _said(done)


@pytest.fixture
def doctor():
    """Runs kabpfctl doctor, after another command if there is one; its findings by check."""
    return _run


@pytest.fixture
def applied(policy):
    """An active policy on the cgroup; its file."""
    return policy("{idle: 61, user_timeout: off}")


def test_what_is_in_order_is_said_to_be(applied, doctor):
    """With an active policy nothing of kabpf's is odd but that the daemon does not run."""
    found = doctor()
    assert found["pins"] == [("ok", f"attached to {cgroup_root()}, pinned at {PINS}", "")]
    assert found["policy files"] == [("ok", "1 policy in 1 file", "")]
    assert found["active"] == [("ok", "the policy files as they are now", "")]
    assert found["selectors"][0][1].startswith("1 of ")
    assert "file names" not in found and "fallbacks" not in found
    assert found["daemon"][0][0] == "note"
    for check in ("kernel", "BTF", "capabilities", "bpf(2)", "bpffs", "limits"):
        assert [grade for grade, *_ in found[check]] == ["ok"], check


def test_nothing_is_changed(cgroup, write_policy, doctor):
    """Neither pins nor notes appear, nor a program."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    before = sorted(os.listdir("/run/kabpf"))
    assert doctor()["pins"] == [("warning", "nothing is loaded: no policy is active", APPLY)]
    assert sorted(os.listdir("/run/kabpf")) == before
    assert not PINS.exists()


def _detached():
    subprocess.run(["bpftool", "link", "detach", "pinned", PINS / "kabpf_sockops"], check=True)
    return "error", f"{PINS}/kabpf_sockops is not attached to {cgroup_root()}"


def _without_pins():
    (PINS / "kabpf_births").unlink()
    (PINS / "kabpf_list").unlink()
    return "error", f"{PINS} is damaged: kabpf_births, kabpf_list missing"


def _with_a_stranger():
    (PINS / "mine").mkdir()
    return "warning", f"not kabpf's: {PINS}/mine"


def _interrupted():
    PINS.rename(PINS.with_name("kabpf-new"))
    return "warning", f"an interrupted command left pins beside {PINS}"


def _given_away():
    os.chown(PINS, 1000, -1)
    return "error", f"{PINS}: uid 1000, mode 0700: root alone must be able to write it"


@pytest.mark.parametrize(
    "damage",
    [_detached, _without_pins, _with_a_stranger, _interrupted, _given_away],
)
def test_damaged_pins_are_told(applied, doctor, kabpfctl, damage):
    """What is wrong with the pins is named."""
    grade, text = damage()
    try:
        found = [each for each in doctor()["pins"] if each[1].startswith(text)]
        assert [each[0] for each in found] == [grade]
        assert found[0][2]
    finally:
        if damage is _with_a_stranger:
            (PINS / "mine").rmdir()
        if damage is _given_away:
            os.chown(PINS, 0, -1)


@pytest.mark.parametrize("kind", ["rebuilt", "relaid", "renamed"])
def test_another_version_is_told(cgroup, write_policy, version, doctor, kind):
    """Pins of another version are taken neither for damaged ones nor for somebody else's."""
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    version(kind).kabpfctl("apply")
    text = f"{PINS} comes from another version of kabpf, and stays active"
    assert doctor()["pins"] == [("warning", text, APPLY)]


def test_detached_setsockopt_link_is_told(cgroup, write_policy, kabpfctl, doctor):
    """Where enforce is active and its program is not attached, that is an error."""
    select = f"select: [{{cgroup: {path_of(cgroup)}}}]"
    write_policy("a.yaml", f"{select}\nmode: enforce\nkeepalive: {{idle: 61}}\n")
    kabpfctl("apply")
    pin = PINS / "kabpf_setsockopt"
    subprocess.run(["bpftool", "link", "detach", "pinned", pin], check=True)
    (found,) = doctor()["pins"]
    assert found[0] == "error"
    assert found[1].startswith(f"{pin} is not attached to {cgroup_root()}")
    subprocess.run(["sh", "-ec", f"PATH={BIN}:$PATH; {found[2]}"], check=True)
    assert len(doctor()["pins"]) == 1


@pytest.mark.parametrize("first", ["kabpf", "the neighbour"])
def test_neighbour_at_the_root_is_told(cgroup, kabpfctl, neighbour, doctor, first):
    """A program of others on our hook is named, with its place before kabpf's or after."""
    if first == "kabpf":
        kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    neighbour(cgroup_root())
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    (found,) = _about("neighbour ", doctor)
    place = "after kabpf's, and may replace what kabpf's set"
    grade, place = ("warning", place) if first == "kabpf" else ("note", "before kabpf's")
    assert found[0] == grade
    assert found[1].endswith(f" at {cgroup_root()} runs {place}")
    id = found[2].removeprefix("bpftool prog show id ")
    assert found[1].startswith(f"sock_ops: neighbour (id {id})")


def test_neighbour_below_is_told(cgroup, kabpfctl, neighbour, doctor):
    """A program of others in a cgroup below the root runs before kabpf's."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    neighbour(cgroup)
    (found,) = _about("neighbour ", doctor)
    assert found[0] == "note"
    assert found[1].endswith(f" at {path_of(cgroup)} runs before kabpf's")


def _about(name, doctor):
    """Whatever else has programs on the machine's cgroups is left out."""
    return [each for each in doctor()["neighbours"] if name in each[1]]


def test_setsockopt_program_of_others_is_told(others_program, cgroup, doctor):
    """The other hook is looked at as well."""
    others_program("rewriter.bpf.c", cgroup, "setsockopt")
    (found,) = _about("rewriter ", doctor)
    assert found[0] == "note"
    assert found[1].endswith(f" at {path_of(cgroup)} runs before kabpf's")


def test_wrong_file_is_told(applied, write_policy, doctor):
    """Each finding of kabpfctl check is an error, and the checks that need the policies say so."""
    file = write_policy("b.yaml", "select: [{cgroup: /b}]\nkeepalive: {idle: never, probes: 200}\n")
    found = doctor()
    assert [each[0] for each in found["policy files"]] == ["error"]
    assert found["policy files"][0][1].startswith(f"{file}:2: keepalive.idle: never, expected")
    unknown = ("note", "skipped: the policy files are wrong", "")
    assert found["selectors"] == [unknown]
    assert found["pins"][0][0] == "ok"


def test_file_of_somebody_else_is_told(applied, doctor):
    """A file that others may write is an error."""
    applied.chmod(0o666)
    (found,) = doctor()["policy files"]
    text = f"{applied}: mode 0666, expected one that root alone can write"
    assert found == ("error", text, "correct it, then: kabpfctl apply")


def test_contradiction_is_told(applied, doctor):
    """What kabpfctl check warns of is a warning here."""
    select = applied.read_text().splitlines()[0]
    applied.write_text(f"{select}\nkeepalive: {{idle: 61, interval: 10, user_timeout: 20s}}\n")
    grade, text, _ = doctor()["policy files"][0]
    assert grade == "warning"
    assert text.startswith(f"{applied}:2: keepalive.user_timeout: 20 s is below idle + interval")


def test_change_that_is_not_in_force_is_told(applied, doctor, kabpfctl):
    """A policy file that was changed, and not applied, is a warning until it is."""
    applied.write_text(applied.read_text().replace("61", "62"))
    text = "the policy files changed since the last apply"
    assert doctor()["active"] == [("warning", text, APPLY)]
    kabpfctl("apply")
    assert doctor()["active"][0][0] == "ok"


def test_refusal_of_the_last_apply_is_told(applied, doctor):
    """What the kernel refused is an error until an apply goes through."""
    note = Path("/run/kabpf/applied.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"refused": "enter net:[1]: no"}))
    assert doctor()["active"] == [("error", "the kernel refused: enter net:[1]: no", APPLY)]


def test_shadowed_file_and_unknown_unit_are_told(applied, write_policy, doctor):
    """A drop-in that a stronger one replaces, and one of a unit that nobody knows."""
    RUNTIME.mkdir(exist_ok=True)
    (RUNTIME / "a.yaml").write_text("{}")
    file = write_policy(
        "kabpf-has-no-such.service.yaml", "keepalive: {idle: 60, user_timeout: off}"
    )
    write_policy("b.yml", "")
    found = doctor()
    assert [each[1] for each in found["file names"]] == [
        f"{DROP_INS}/b.yml is not read",
        f"{applied} takes the place of {RUNTIME}/a.yaml",
    ]
    assert found["selectors"][0][:2] == (
        "warning",
        f"{file}:1: unit kabpf-has-no-such.service of policy kabpf-has-no-such.service: no such"
        " unit, running or installed",
    )


def test_daemon_is_told_and_missed_where_it_is_needed(cgroup, write_policy, kabpfd, doctor):
    """A running daemon is named; without one, new cgroups wait if the kernel has no room for globs
    of theirs."""
    dear = ", ".join(f'{{cgroup: "{path_of(cgroup)}-*a{n}-*b{n}-*"}}' for n in range(100))
    write_policy("a.yaml", f"select: [{dear}]\nkeepalive: {{idle: 61, user_timeout: off}}\n")
    daemon = kabpfd()
    found = doctor()
    assert "resolved by kabpfd: cgroup" in found["policy files"][0][1]
    (found,) = found["daemon"]
    assert found[0] == "ok"
    assert found[1].startswith(f"process {daemon.process.pid}")
    daemon.process.kill()
    daemon.process.wait()
    (found,) = doctor()["daemon"]
    assert found[0] == "warning"
    assert found[1].startswith("not running, and some new cgroups wait for it")


def test_daemon_that_has_pins_elsewhere_is_told(applied, kabpfd, doctor):
    """Where bpffs was unmounted below a kabpfd that has its own mount of it, doctor tells the two
    apart, and how to bring them together."""
    daemon = kabpfd()
    script = 'umount /sys/fs/bpf && exec "$0" "$@"'
    (found,) = doctor("unshare", "--mount", "--propagation", "private", "sh", "-c", script)[
        "daemon"
    ]
    assert found == (
        "error",
        f"process {daemon.process.pid} has a /sys/fs/bpf of its own, which can't be seen here",
        "systemctl restart kabpf",
    )


@pytest.mark.parametrize(
    ("script", "check", "expected"),
    [
        (WITHOUT_BTF, "BTF", "/sys/kernel/btf/vmlinux is missing"),
        ("mount -t tmpfs none /sys", "bpffs", "/sys/fs/bpf is missing"),
        ("mount -t tmpfs none /sys", "cgroup2", "no cgroup2 tree is mounted whose root"),
        ("mount -t tmpfs none /proc", "cgroup2", "/proc is not mounted"),
        ("mount --bind /dev/null $libbpf", "libraries", "libbpf.so.1 is missing; install"),
        ("mount -o remount,ro,bind /sys/fs/bpf", "bpffs", "/sys/fs/bpf can't be written to"),
    ],
)
def test_what_the_machine_lacks_is_told(applied, doctor, script, check, expected):
    """Each lack is an error of its own check, and the others go on."""
    library = "libbpf=$(/sbin/ldconfig -p | sed -n 's/.*libbpf.so.1 .*=> //p' | head -n 1)"
    shell = ["unshare", "--mount", "sh", "-ec", f'{library}; {script}; exec "$@"', "sh"]
    found = doctor(*shell)
    (wrong,) = [each for each in found[check] if each[0] == "error"]
    assert wrong[1].startswith(expected)
    assert wrong[2]
    assert [each[0] for each in found["policy files"]] == ["ok"]


def _listening_for_another(peer, holding, opened):
    """A peer that moves to a cgroup with a listener of another one; the port."""
    inside = peer(opened)
    _, address = inside.listener()
    (holding / "cgroup.procs").write_text(str(inside.process.pid))
    wait_until(lambda: not (opened / "cgroup.procs").read_text(), "the move")
    return inside.process.pid, address[1]


def test_listener_of_another_cgroup_is_told(make_cgroup, peer, write_policy, kabpfctl, doctor):
    """With process and port, where a unit has a policy and the listener none: what to select, and
    whether it is removed. One with a policy of its own is a note, one with the same is nothing."""
    covered, other = make_cgroup("app.service"), make_cgroup("front.service")
    write_policy("app.service.yaml", "keepalive: {idle: 61}\n")
    kabpfctl("apply")
    assert doctor()["listeners"] == [("ok", "those of units have the policies of these", "")]
    process, port = _listening_for_another(peer, covered, other)
    text = (
        f"app.service has listeners of another cgroup: process {process} listens at port {port}"
        f" for {path_of(other)}, which has "
    )
    advice = "select unit: front.service"
    assert doctor()["listeners"] == [("warning", f"{text}no policy", advice)]
    write_policy("front.service.yaml", "keepalive: {idle: 62}\n")
    kabpfctl("apply")
    explain = f"kabpfctl explain {process}"
    assert doctor()["listeners"] == [("note", f"{text}policy front.service", explain)]
    write_policy("front.service.yaml", "")
    kabpfctl("apply")
    marked = text.replace(", which", " (removed), which")
    other.rmdir()
    assert doctor()["listeners"] == [("warning", f"{marked}no policy", advice)]
    selected = "select: [{unit: app.service}, {unit: front.service}]\nkeepalive: {idle: 61}\n"
    write_policy("app.service.yaml", selected)
    kabpfctl("apply")
    assert [grade for grade, *_ in doctor()["listeners"]] == ["ok"]


def test_listener_of_an_unknown_cgroup_is_told(make_cgroup, peer, write_policy, kabpfctl, doctor):
    """No policy reaches it, as it was removed before kabpf was loaded: the unit has to listen
    anew. In a cgroup namespace, as here, it may as well be outside."""
    covered, other = make_cgroup("app.service"), make_cgroup("gone")
    process, port = _listening_for_another(peer, covered, other)
    other.rmdir()
    write_policy("app.service.yaml", "keepalive: {idle: 61}\n")
    kabpfctl("apply")
    text = (
        f"app.service has listeners of another cgroup: process {process} listens at port {port}"
        " for an unknown cgroup, which has no policy"
    )
    advice = "systemctl stop app.service; systemctl start app.service"
    assert doctor()["listeners"] == [("warning", text, advice)]


@pytest.mark.parametrize(
    ("command", "check", "expected"),
    [
        (("setpriv", "--bounding-set", "-bpf", "--inh-caps", "-bpf"), "capabilities",
         "CAP_BPF missing"),
        (("unshare", "--user", "--map-root-user"), "capabilities",
         "root in a user namespace lacks"),
    ],
    ids=["no CAP_BPF", "a user namespace"],
)  # fmt: skip
def test_rights_that_are_missing_are_told(doctor, command, check, expected):
    """Root that may not do everything is told so, once."""
    found = doctor(*command)
    ((grade, text, _),) = found[check]
    assert grade == "error"
    assert text.startswith(expected)
    assert [each[0] for each in found["bpf(2)"]] == ["note"]


def test_filtered_system_call_is_told(doctor):
    """Where a seccomp filter refuses bpf(2), that is an error, and no check fails of it."""
    found = doctor(preexec_fn=refuse_bpf)
    ((grade, text, _),) = found["bpf(2)"]
    assert grade == "error"
    assert text.startswith("the kernel refuses bpf(2) to root")
    assert found["neighbours"][0][:2] == (
        "warning",
        "skipped: list the programs of a cgroup: Operation not permitted",
    )


def test_keepalive_time_of_the_network_namespace_is_told(cgroup, namespace, write_policy, doctor):
    """What options fall back to is read where the command runs."""
    set_sysctl(namespace, "tcp_keepalive_time", "50")
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: on\n")
    found = doctor("ip", "netns", "exec", namespace)["fallbacks"]
    assert [each[0] for each in found] == ["note", "note"]
    assert found[0][1].startswith("no idle in a: the first probe comes after 50 s")


def test_too_many_policies_are_told(applied, write_policy, doctor):
    """More policies than the kernel has room for are right, and can't be active."""
    lines = [f"  p{n}: {{select: [{{cgroup: /p{n}}}], keepalive: off}}" for n in range(4100)]
    for part in range(5):
        write_policy(
            f"p{part}.yaml", "\n".join(["policies:", *lines[part * 820 : part * 820 + 820]])
        )
    found = doctor()
    assert found["policy files"] == [("ok", "4101 policies in 6 files", "")]
    for check in ("active", "selectors"):
        ((grade, text, _),) = found[check]
        assert (grade, text.partition(";")[0]) == ("warning", "skipped: too many policies")


def test_thousand_cgroups_are_looked_at_in_half_a_second(make_cgroup, applied, doctor):
    """Half a second of the processor's."""
    for number in range(1000):
        make_cgroup(f"many/{number}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert doctor()["selectors"][0][0] == "ok"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.5 * PATIENCE
