"""The bcc loader: when it is chosen, what it does otherwise than libbpf's, and what it refuses.

What both do alike is tested where libbpf's is, under the mark `loaders`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from importlib.util import find_spec

import pytest
from harness import (
    BIN,
    PINS,
    UNTOUCHED,
    WATCHED,
    options_of_new,
    path_of,
    pinned,
    wait_until,
)
from test_modes import EXACT, OUTCOMES

from kabpf.apply import single
from kabpf.kernel import bcc_compile, cgroups, loading, mountinfo
from kabpf.policy.model import Options, Policy, Rules
from kabpf.policy.yaml import Source

BCC = pytest.mark.parametrize("loader", ["bcc"], indirect=True)
IDLE_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}
IDLE_62 = IDLE_61 | {"idle": 62}

NEEDS_BTF = "needs BTF, which the bcc loader does without"


def _loader(kabpfctl):
    """The loader in use, and whether anything is loaded."""
    status = json.loads(kabpfctl("status", "--json").stdout)
    return status["loader"], status["loaded"]


@pytest.fixture
def links(own_objects):
    """The programs that this test's links have."""
    return lambda: sorted(own_objects()["link"].values())


@pytest.fixture
def policies(write_policy):
    """Writes policies, each given the cgroup that it names and its other keys in one text."""

    def write(*named):
        lines = ["policies:"]
        for number, (cgroup, keys) in enumerate(named):
            lines.append(f"  p{number}: {{select: [{{cgroup: {path_of(cgroup)}}}], {keys}}}")
        write_policy("some.yaml", "\n".join(lines))

    return write


@pytest.mark.core
@BCC
def test_loader_without_btf_is_bcc(kabpfctl, cgroup, peer):
    """Where the kernel has no BTF bcc is chosen; where it has some again, what is loaded stays."""
    assert _loader(kabpfctl) == ("bcc", False)
    said = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61).stdout
    assert said.endswith("; open sockets unchanged\n")
    assert _loader(kabpfctl) == ("bcc", True)
    assert options_of_new(peer, cgroup) == IDLE_61
    subprocess.run(["umount", "/sys/kernel/btf"], check=True)
    kabpfctl("apply")
    assert _loader(kabpfctl) == ("bcc", True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/sys/kernel/btf"], check=True)


def test_loader_is_the_one_asked_for(lent_headers, kabpfctl, cgroup, peer, links):
    """One loader takes the place of the other between two connections; libbpf then gives open
    sockets what they are owed."""
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--loader", "bcc")
    assert _loader(kabpfctl) == ("bcc", True)
    assert client.options(number) == UNTOUCHED
    assert options_of_new(peer, cgroup) == IDLE_61
    kabpfctl("apply", "--loader", "libbpf")
    assert _loader(kabpfctl) == ("libbpf", True)
    assert client.options(number) == IDLE_61
    assert options_of_new(peer, cgroup) == IDLE_61
    kabpfctl("apply", "--loader", "bcc")
    assert _loader(kabpfctl) == ("bcc", True)
    assert options_of_new(peer, cgroup) == IDLE_61
    assert links() == ["kabpf_setsockop", "kabpf_sockops"]


@BCC
def test_innermost_policy_wins(make_cgroup, policies, kabpfctl, peer):
    """Of policies for cgroups above each other the innermost alone acts on a socket, in whatever
    order they come and go; one that is off is no exception."""
    outer, middle = make_cgroup("outer"), make_cgroup("outer/middle")
    inner, plain = make_cgroup("outer/middle/inner"), make_cgroup("outer/plain")
    masked = make_cgroup("outer/masked")
    by = {
        outer: "keepalive: {idle: 61, probes: 7}, mode: override",
        middle: "keepalive: {idle: 62}, mode: override",
        inner: "keepalive: {idle: 63}",
        masked: "keepalive: off",
    }
    wide = UNTOUCHED | {"keepalive": 1, "idle": 61, "probes": 7}
    # Which have a policy, and what idle comes of it in outer, middle and inner.
    for named, (middles, inners) in (
        ((inner,), (None, 63)),
        ((outer, inner), (61, 63)),
        ((outer, middle, inner, masked), (62, 63)),
        ((outer, middle, masked), (62, 62)),
        ((outer, masked), (61, 61)),
        ((middle, masked), (62, 62)),
        ((outer, middle, inner, masked), (62, 63)),
    ):
        policies(*((cgroup, by[cgroup]) for cgroup in named))
        kabpfctl("apply")
        for cgroup in (outer, plain):
            assert options_of_new(peer, cgroup) == (wide if outer in named else UNTOUCHED)
        for cgroup, idle in ((middle, middles), (inner, inners)):
            narrow = UNTOUCHED | {"keepalive": 1, "idle": idle}
            expected = {None: UNTOUCHED, 61: wide}.get(idle, narrow)
            for one in _both_ends(peer, cgroup):
                assert one == expected
        if masked in named:
            assert options_of_new(peer, masked) == UNTOUCHED


def _both_ends(peer, cgroup):
    """The options of a new listener, of what it accepted, and of the other end, in a cgroup."""
    server, client = peer(cgroup), peer(cgroup)
    listener, address = server.listener()
    number = client.connection(address)
    accepted = server.accept(listener)
    return server.options(listener), server.options(accepted), client.options(number)


@BCC
def test_new_cgroup_below_is_covered(make_cgroup, kabpfctl, peer):
    """A cgroup that is made later has the policy of the one that it is in."""
    outer = make_cgroup("outer")
    kabpfctl("attach", "--cgroup", outer, "--idle", 61)
    assert options_of_new(peer, make_cgroup("outer/new/newer")) == IDLE_61


@BCC
@pytest.mark.parametrize(("name", "when"), OUTCOMES)
def test_outcome_is_that_of_the_table(make_cgroup, policies, kabpfctl, compiled, peer, name, when):
    """What the applications of test_modes.py ask for has the same outcome under `fill` and
    `override`, on outgoing and on accepted connections."""
    program, other = compiled("runtime.c"), peer()
    _, (_, port) = other.listener()
    expected = dict(zip(("fill", "override"), OUTCOMES[name, when], strict=False))
    cgroups = {mode: make_cgroup(mode) for mode in expected}
    policies(
        *((cgroup, f"mode: {mode}, keepalive: {{{EXACT}}}") for mode, cgroup in cgroups.items())
    )
    kabpfctl("apply")

    def outcome(cgroup, to):
        with subprocess.Popen(
            [program, name, when, str(to)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0"),
        ) as process:
            if not to:
                other.connection(["127.0.0.1", int(process.stdout.readline())])
            found = json.loads(process.stdout.readline())
        assert found.pop("refused") == 0
        return tuple(found.values())

    for to in (port, 0):
        assert {mode: outcome(cgroup, to) for mode, cgroup in cgroups.items()} == expected


@BCC
def test_accepted_socket_keeps_what_its_listener_chose(cgroup, kabpfctl, peer):
    """What an application sets on a listener counts as its own on what that accepts."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, "--probes", 5)
    server, client = peer(cgroup), peer()
    listener, address = server.listener()
    server.set_option(listener, "idle", 15)
    client.connection(address)
    assert server.options(server.accept(listener)) == IDLE_61 | {"idle": 15, "probes": 5}
    server.set_option(listener, "keepalive", 0)
    client.connection(address)
    assert server.options(server.accept(listener))["keepalive"] == 0


@BCC
def test_listener_from_before_accepts_covered_connections(cgroup, kabpfctl, peer):
    """A listener that was open keeps what it has; what it accepts is new."""
    server, client = peer(cgroup), peer()
    listener, address = server.listener()
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    client.connection(address)
    assert server.options(listener) == UNTOUCHED
    assert server.options(server.accept(listener)) == IDLE_61


@BCC
def test_jitter_spreads_idle_of_new_connections(cgroup, kabpfctl, policies, peer):
    """Each connection has an idle time of its own, below the policy's."""
    policies((cgroup, "keepalive: {idle: 100, jitter: 20%}"))
    kabpfctl("apply")
    client = peer(cgroup)
    _, address = peer().listener()
    found = {client.options(client.connection(address))["idle"] for _ in range(100)}
    assert len(found) > 10
    assert min(found) >= 80
    assert max(found) <= 100


@BCC
def test_what_needs_btf_is_refused_by_name(cgroup, kabpfctl, write_policy, peer):
    """check, apply, plan and doctor name file, line and key, and what is active stays. attach
    leaves the file waiting."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    file = write_policy(
        "web.yaml",
        "select:\n- unit: web.service\n- cgroup: /web/*\n"
        "keepalive:\n  idle: 30s..5m\nmode: enforce\nexisting: true\n",
    )
    expected = [
        f"{file}:{line} {NEEDS_BTF}, expected {instead}"
        for line, instead in (
            ("2: unit: web.service", "cgroup: with the whole path"),
            ("3: cgroup: /web/*", "cgroup: with the whole path"),
            ("6: mode: enforce", "fill or override"),
            ("7: existing: true", "existing: false, or the key left out"),
            ("5: idle: the range 30..300", "one value"),
        )
    ]
    assert kabpfctl("check", status=1).stderr.splitlines() == expected
    for command in ("apply", "plan"):
        said = kabpfctl(command, status=1).stderr
        assert said == "\n".join([f"kabpfctl: {expected[0]}", *expected[1:], ""])
    assert options_of_new(peer, cgroup) == IDLE_61
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62)
    assert options_of_new(peer, cgroup) == IDLE_62
    errors = [one for one in _findings(kabpfctl, 1) if one["status"] == "error"]
    assert [one["found"] for one in errors if one["check"] == "policy files"] == expected
    file.unlink()
    assert kabpfctl("check", "--loader", "bcc").stdout == "policy files: ok, 1 policy\n"


def test_check_tells_what_bcc_would_refuse(kabpfctl, write_policy):
    """`check --loader bcc` says it on a machine with BTF as well."""
    write_policy("web.service.yaml", "keepalive: on\n")
    kabpfctl("check")
    assert NEEDS_BTF in kabpfctl("check", "--loader", "bcc", status=1).stderr


def _findings(kabpfctl, status=0):
    return json.loads(kabpfctl("doctor", "--json", status=status).stdout)["findings"]


@BCC
def test_log_and_monitor_are_refused_by_name(cgroup, kabpfctl, write_policy):
    """Nothing tells what happens to sockets; that it is asked for is one error."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    said = kabpfctl("monitor", status=1).stderr
    assert said == f"kabpfctl: monitor {NEEDS_BTF}; try: kabpfctl apply --loader libbpf\n"
    file = write_policy(
        "log.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: on\nlog: sockets\n"
    )
    said = kabpfctl("apply", status=1).stderr
    assert said == f"kabpfctl: {file}:3: log: sockets {NEEDS_BTF}, expected log: off\n"


@BCC
def test_sockets_says_what_it_can_not_show(cgroup, kabpfctl, peer):
    """The list of sockets has no options, and says why."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    _, address = peer().listener()
    peer(cgroup).connection(address)
    done = kabpfctl("sockets", "--cgroup", cgroup)
    assert f"it {NEEDS_BTF}" in done.stderr
    assert f":{address[1]}" in done.stdout


@BCC
def test_cgroup_that_is_made_again_is_covered_by_the_next_apply(make_cgroup, kabpfctl, peer, links):
    """A removed cgroup takes its attachment along; doctor tells of one at its place."""
    cgroup = make_cgroup("service")
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    cgroup.rmdir()
    make_cgroup("service")
    assert options_of_new(peer, cgroup) == UNTOUCHED
    found = [one["found"] for one in _findings(kabpfctl)]
    assert f"made since the last apply: {path_of(cgroup)}" in found
    kabpfctl("apply")
    assert options_of_new(peer, cgroup) == IDLE_61
    assert len(links()) == 2


@BCC
@pytest.mark.parametrize("pin", ["kabpf_sockops", "kabpf_setsockopt"])
def test_attachment_that_others_took_away_is_put_back(cgroup, kabpfctl, peer, pin):
    """What somebody else detached, the next apply attaches again."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    link = PINS / f"{pin}-{cgroup.stat().st_ino}"
    subprocess.run(["bpftool", "link", "detach", "pinned", link], check=True)
    kabpfctl("apply")
    assert pinned("link")[link.name]["cgroup_id"] == cgroup.stat().st_ino
    assert options_of_new(peer, cgroup) == IDLE_61


@BCC
def test_cgroup_that_was_known_before_run_entered_it_is_attached(
    cgroup, other_cgroup, kabpfctl, write_policy, peer
):
    """The short way of run does not do for a scope that another command has seen meanwhile."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    tree = cgroups.find_tree(mountinfo.own_mounts())
    entered = tree.find(str(other_cgroup))
    policy = Policy("run", (), Rules(Options()), Source("", 1))
    with loading.open_if_loaded(PINS, tree) as loaded:
        assert loaded.entries([entered.id])
        assert not single.add(policy, entered, loaded, ("", ""))


@BCC
def test_daemon_covers_a_cgroup_that_is_made_again(make_cgroup, kabpfctl, kabpfd, peer):
    """kabpfd looks for such cgroups whenever systemd's watchdog has it wake up."""
    cgroup = make_cgroup("service")
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    kabpfd(*WATCHED)
    cgroup.rmdir()
    make_cgroup("service")
    wait_until(lambda: options_of_new(peer, cgroup) == IDLE_61, "the daemon's beat")


@BCC
def test_compiler_runs_once(cgroup, other_cgroup, kabpfctl, peer, tmp_path):
    """A policy that changes, a second cgroup, and a load until the next boot take no compiler."""
    bcc_compile.KEPT.unlink(missing_ok=True)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 62)
    assert bcc_compile.KEPT.exists()
    with _bcc_is(tmp_path, "raise ImportError('no bcc')\n"):
        kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
        kabpfctl("attach", "--cgroup", other_cgroup, "--idle", 61)
        assert options_of_new(peer, other_cgroup) == IDLE_61
        kabpfctl("detach", "--all")
        kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    assert options_of_new(peer, cgroup) == IDLE_61


@BCC
def test_refused_programs_are_compiled_again(cgroup, kabpfctl, peer):
    """What was kept and is refused by the kernel is not kept any longer."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    kabpfctl("detach", "--all")
    kept = json.loads(bcc_compile.KEPT.read_text())
    for name, code in kept["programs"].items():
        kept["programs"][name] = code[: len(code) // 32 * 16]
    bcc_compile.KEPT.write_text(json.dumps(kept))
    said = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, status=1).stderr
    assert said.startswith("kabpfctl: load the BPF programs: ")
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    assert options_of_new(peer, cgroup) == IDLE_61


@BCC
def test_compiler_that_is_killed_is_said(cgroup, kabpfctl, tmp_path):
    """A compiler that ran out of memory is not taken for one that lacks headers."""
    bcc_compile.KEPT.unlink(missing_ok=True)
    with _bcc_is(tmp_path, "import os\nos.kill(os.getpid(), 9)\n"):
        said = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, status=1).stderr
    source = bcc_compile.SOURCES / bcc_compile.SOURCE
    memory = "the compiler needs 150 MB of memory"
    assert said == f"kabpfctl: compile {source}: SIGKILL; {memory}\n"
    assert not PINS.exists()


@BCC
def test_daemon_takes_what_was_compiled_before(cgroup, write_policy, kabpfd, peer):
    """`kabpfd --compile`, which kabpf-compile.service runs, leaves to the daemon what takes no
    headers, and loads nothing."""
    bcc_compile.KEPT.unlink(missing_ok=True)
    subprocess.run([BIN / "kabpfd", "--compile"], check=True)
    assert not PINS.exists()
    write_policy("a.yaml", f"select: [{{cgroup: {path_of(cgroup)}}}]\nkeepalive: {{idle: 61}}\n")
    with _headers_hidden():
        kabpfd()
        assert options_of_new(peer, cgroup) == IDLE_61


@contextlib.contextmanager
def _headers_hidden():
    subprocess.run(["mount", "-t", "tmpfs", "none", "/lib/modules"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/lib/modules"], check=True)


@contextlib.contextmanager
def _bcc_is(directory, source):
    """In the place of bcc's package a module of this source; the compiler obeys no PYTHONPATH."""
    (directory / "__init__.py").write_text(source)
    (place,) = find_spec("bcc").submodule_search_locations
    subprocess.run(["mount", "--bind", directory, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@BCC
def test_missing_compiler_is_named(cgroup, kabpfctl, tmp_path):
    """Without headers attach and doctor say what to install; what bcc says is passed on."""
    bcc_compile.KEPT.unlink(missing_ok=True)
    with _headers_hidden():
        package = f"linux-headers-{os.uname().release}"
        done = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, status=1)
        assert done.stderr == (
            "kabpfctl: /sys/kernel/btf/vmlinux is missing; boot a kernel with"
            " CONFIG_DEBUG_INFO_BTF; for the bcc loader, which does without, the kernel's headers"
            f" are missing; install the package {package}\n"
        )
        (found,) = [one for one in _findings(kabpfctl, 1) if one["check"] == "BTF"]
        assert found["status"] == "error"
        assert found["fix"].endswith(f"apt install {package}")
    with _bcc_is(tmp_path, "raise ImportError('no bcc')\n"):
        done = kabpfctl("attach", "--cgroup", cgroup, "--idle", 61, status=1)
    assert done.stderr.startswith("kabpfctl: bcc can't compile ")
    assert "ImportError: no bcc" in done.stderr
    assert not PINS.exists()


@BCC
def test_program_of_others_goes_on(make_cgroup, kabpfctl, neighbour, peer):
    """Somebody else's program on the same cgroup runs before and after, and doctor tells of it."""
    cgroup = make_cgroup("shared")
    seen = neighbour(cgroup)
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    before = seen()
    assert options_of_new(peer, cgroup) == IDLE_61
    assert seen() > before
    found = [one["found"] for one in _findings(kabpfctl) if one["check"] == "neighbours"]
    assert not any("another kabpf" in one for one in found)


@BCC
def test_program_that_keeps_ours_out_is_told(make_cgroup, cgroup, kabpfctl, neighbour, peer):
    """Where somebody else's program allows none beside it, attach says so, and other cgroups are
    served; their own goes on."""
    taken = make_cgroup("taken")
    seen = neighbour(taken, ())
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    before = seen()
    said = kabpfctl("attach", "--cgroup", taken, "--idle", 61, status=1).stderr
    assert said.startswith(
        f"kabpfctl: attach kabpf_sockops to {path_of(taken)}: Operation not permitted"
    )
    assert options_of_new(peer, cgroup) == IDLE_61
    assert options_of_new(peer, taken) == UNTOUCHED
    assert seen() > before


@BCC
def test_killed_command_is_completed(cgroup, other_cgroup, policies, run_kabpfctl, peer, links):
    """Wherever an apply dies, a first one or one by which attachments come and go, the next one
    completes it."""
    nested = other_cgroup / "nested"
    nested.mkdir()
    first, second = {cgroup: 61}, {other_cgroup: 62, nested: 63}
    for before, after in (({}, first), (first, first | second), (first | second, second)):
        for fault in _faults(run_kabpfctl, policies, before, after):
            _put(run_kabpfctl, policies, before)
            _write(policies, after)
            run_kabpfctl("apply", KABPF_FAULT=fault)
            run_kabpfctl("apply").check_returncode()
            for one in (cgroup, other_cgroup, nested):
                expected = IDLE_61 | {"idle": after[one]} if one in after else UNTOUCHED
                assert options_of_new(peer, one) == expected, fault
            assert len(links()) == 2 * len(after), fault


def _put(run_kabpfctl, policies, idle):
    run_kabpfctl("detach", "--all").check_returncode()
    if idle:
        _write(policies, idle)
        run_kabpfctl("apply").check_returncode()


def _write(policies, idle):
    policies(*((cgroup, f"keepalive: {{idle: {seconds}}}") for cgroup, seconds in idle.items()))


def _faults(run_kabpfctl, policies, before, after):
    """Every few of the steps at which an apply may die."""
    _put(run_kabpfctl, policies, before)
    _write(policies, after)
    traced = run_kabpfctl("apply", KABPF_FAULT="trace").stderr
    found = re.findall("fault point: (.*)", traced)
    assert len(found) > 5
    return found[::4] + [one for one in found if "attach" in one or "detach" in one]


@BCC
def test_upgrade_replaces_the_programs(cgroup, version, kabpfctl, peer, own_objects, links):
    """Another build's apply takes the place of what is loaded; the same policies are active."""
    kabpfctl("attach", "--cgroup", cgroup, "--idle", 61)
    before = set(own_objects()["prog"])
    version("rebuilt").kabpfctl("apply")
    assert not before & set(own_objects()["prog"])
    assert _loader(version("rebuilt").kabpfctl) == ("bcc", True)
    assert options_of_new(peer, cgroup) == IDLE_61
    assert len(links()) == 2
