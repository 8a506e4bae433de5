"""Killed before any step that changes the kernel's state, kabpf leaves the old state or the new,
and the next command completes what was begun."""

import itertools
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import held
import pytest
from harness import BIN, PINS, UNTOUCHED, changed, path_of

NAMES = ("one", "two")


def _idle(seconds):
    return UNTOUCHED | {"keepalive": 1, "idle": seconds}


# What each cgroup's file says, and what connections have by it.
NOTHING = {"one": ("", UNTOUCHED), "two": ("", UNTOUCHED)}
PLAIN = {"one": ("keepalive: {idle: 61}", _idle(61)), "two": ("keepalive: {idle: 62}", _idle(62))}
SWAPPED = {"one": PLAIN["two"], "two": PLAIN["one"]}
LESS = {"one": ("keepalive: {idle: 63}", _idle(63)), "two": NOTHING["two"]}
ENFORCED = {
    "one": ("keepalive: {idle: 64}\nmode: enforce", _idle(64)),
    "two": ("keepalive: {idle: 65..66}", _idle(66)),
}
DESTINATIONS = {
    "one": ("keepalive: {idle: 99}\ndestinations: [{to: 127.0.0.0/8, idle: 67}]", _idle(67)),
    "two": (
        "keepalive: {idle: 98}\n"
        "destinations: [{to: 127.0.0.1, ports: [1], idle: 97}, {to: 127.0.0.1, idle: 68}]",
        _idle(68),
    ),
}


class World:
    """Two cgroups, each with a policy file, a client and an open connection; and one client more
    for cgroups that are born below the first."""

    def __init__(self, make_cgroup, write_policy, peer):
        self.make_cgroup, self.write_policy = make_cgroup, write_policy
        self.cgroups = {name: make_cgroup(name) for name in NAMES}
        self.clients = {name: peer(cgroup) for name, cgroup in self.cgroups.items()}
        self.migrant = peer()
        _, self.address = peer().listener()
        self.open = {}
        self.births = itertools.count()

    def say(self, policies):
        """Writes the policy files."""
        for name, cgroup in self.cgroups.items():
            text, _ = policies[name]
            selected = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\n{text}\n' if text else ""
            self.write_policy(f"{name}.yaml", selected)

    def connect(self):
        """Opens a connection from each cgroup; the options of each."""
        for name, client in self.clients.items():
            if name in self.open:
                client.close(self.open[name])
            self.open[name] = client.connection(self.address)
        return self.open_options()

    def open_options(self):
        """The options of each cgroup's open connection."""
        return {name: self.clients[name].options(number) for name, number in self.open.items()}

    def options_of_born(self):
        """The options of a new connection from a new cgroup below the first."""
        born = self.make_cgroup(f"one/born-{next(self.births)}")
        (born / "cgroup.procs").write_text(str(self.migrant.process.pid))
        number = self.migrant.connection(self.address)
        options = self.migrant.options(number)
        self.migrant.close(number)
        return options


@pytest.fixture
def world(make_cgroup, write_policy, peer):
    return World(make_cgroup, write_policy, peer)


def _expected(policies):
    return {name: options for name, (_, options) in policies.items()}


def _traced(stderr):
    """The steps in their order, as KABPF_FAULT has them."""
    points = re.findall(r"^fault point: (.*)$", stderr, re.M)
    assert points
    return points


def _moments(points):
    """Those to die at: of a run of equal steps the first, one within, and the last. What comes
    before a program works with the new maps is one run."""
    steps = [point.rpartition(",")[0] for point in points]
    turns = [
        n for n, step in enumerate(steps) if step in ("attach kabpf_sockops", "update the link")
    ]
    turn = max(turns, default=0)
    moments = []
    for _, run in itertools.groupby(
        range(len(points)), lambda number: "load" if number < turn else steps[number]
    ):
        numbers = list(run)
        moments += sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
    return [points[number] for number in moments]


def _pins():
    return [name for name in os.listdir(PINS.parent) if name.startswith("kabpf")]


def _kill(version, moment, *arguments):
    status = version.run(*arguments, KABPF_FAULT=moment).returncode
    # Cgroups and namespaces of others that are gone by now, and policies that are kept already,
    # leave less to do.
    spared = ("write ", "delete from ", "retrofit", "rename the last good policies")
    assert status == -signal.SIGKILL or (status == 0 and moment.startswith(spared))


def _check_status(version):
    """It works, or says in a line what is up."""
    done = version.run("status")
    assert done.returncode == 0 or re.fullmatch(r"kabpfctl: .*; try: .*\n", done.stderr)


def _check_between(world, before, after):
    """New connections have the old options or the new ones, from a new cgroup as well."""
    found = world.connect()
    for name in NAMES:
        assert found[name] in (before[name][1], after[name][1])
    assert world.options_of_born() in (before["one"][1], after["one"][1])


def _check_complete(world, version, policies):
    """Everything is as the files say, and nothing is beside it."""
    still_open = world.open_options()
    for name, (text, options) in policies.items():
        assert not text or still_open[name] == options
    assert world.connect() == _expected(policies)
    assert changed(version.kabpfctl) == {}
    assert _pins() == ["kabpf"]


def test_killed_first_apply_is_completed(world, version):
    """Where nothing was loaded."""
    this = version("this")
    world.say(PLAIN)
    steps = _traced(this.kabpfctl("apply", fault="trace").stderr)
    for moment in _moments(steps):
        this.kabpfctl("detach", "--all")
        world.connect()
        _kill(this, moment, "apply")
        _check_status(this)
        _check_between(world, NOTHING, PLAIN)
        this.kabpfctl("apply")
        _check_complete(world, this, PLAIN)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PLAIN, SWAPPED),
        (PLAIN, LESS),
        (PLAIN, DESTINATIONS),
        (DESTINATIONS, ENFORCED),
        (ENFORCED, PLAIN),
    ],
    ids=["other numbers", "one removed", "destinations", "enforce comes", "enforce goes"],
)
def test_killed_change_is_completed(world, version, before, after):
    """Where a policy was active, each connection has the old options or the new ones."""
    this = version("this")
    world.say(before)
    this.kabpfctl("apply")
    world.say(after)
    steps = _traced(this.kabpfctl("apply", fault="trace").stderr)
    for moment in _moments(steps):
        world.say(before)
        this.kabpfctl("apply")
        assert world.connect() == _expected(before)
        world.say(after)
        _kill(this, moment, "apply")
        _check_status(this)
        _check_between(world, before, after)
        this.kabpfctl("apply")
        _check_complete(world, this, after)


def test_killed_change_of_globs_is_completed(world, version):
    """Where globs change, a cgroup born meanwhile has what the old ones say or the new ones; at the
    end nothing is left of the old ones."""
    this = version("this")
    world.say(PLAIN)
    inside = path_of(world.cgroups["one"])
    before = (f'{{cgroup: "{inside}/born-*"}}', 71)
    after = (f'{{cgroup: "{inside}/b*n-[0-9]*"}}, {{unit: "born@*.service"}}', 72)

    def say(selectors, idle):
        world.write_policy("glob.yaml", f"select: [{selectors}]\nkeepalive: {{idle: {idle}}}\n")

    def apply(glob):
        say(*glob)
        this.kabpfctl("apply")
        assert world.options_of_born() == _idle(glob[1])
        again = json.loads(this.kabpfctl("apply", "--json").stdout)["changes"]
        assert (len(_globs()), any(again.values())) == (1, False)

    apply(before)
    say(*after)
    steps = _traced(this.kabpfctl("apply", fault="trace").stderr)
    moments = _moments(steps)
    assert {"write kabpf_globs", "write kabpf_digests", "delete from kabpf_globs"} <= {
        moment.rpartition(",")[0] for moment in moments
    }
    for moment in moments:
        apply(before)
        say(*after)
        _kill(this, moment, "apply")
        _check_status(this)
        assert world.options_of_born() in (_idle(71), _idle(72))
        assert world.connect() == _expected(PLAIN)
        apply(after)


def _globs():
    """The generations of globs that have an automaton, by other eyes than kabpf's."""
    return held.listed("map", "dump", "pinned", str(PINS / "kabpf_globs"))


@pytest.mark.parametrize(
    ("other", "completes"),
    [
        ("rebuilt", "the new version"),
        ("relaid", "the old version"),
        ("no-exchange", "the new version"),
    ],
)
def test_killed_upgrade_is_completed(world, version, other, completes):
    """Where another version was active, with other numbers, and whichever goes on: each
    connection has the old options or the new ones."""
    old, new = version("this"), version(other)
    before, after = PLAIN, SWAPPED
    world.say(before)
    old.kabpfctl("apply")
    assert world.connect() == _expected(before)
    steps = _traced(new.kabpfctl("apply", fault="trace").stderr)
    old.kabpfctl("apply")
    for moment in _moments(steps):
        last = new if completes == "the new version" else old
        world.say(after)
        _kill(new, moment, "apply")
        _check_status(last)
        _check_between(world, before, after)
        last.kabpfctl("apply")
        if other == "relaid":  # what sockets have from former policies is not read back then
            world.connect()
        _check_complete(world, last, after)
        before, after = after, before
        if last is new:
            old.kabpfctl("apply")


@pytest.mark.parametrize("other", ["rebuilt", "no-exchange"])
def test_killed_upgrade_is_unloaded(world, version, kabpfd, other):
    """kabpfctl detach --all takes both versions out of the kernel, and so does kabpfd as it stops;
    what sockets have from policies is known at the next start."""
    old, new = version("this"), version(other)
    world.say(PLAIN)
    old.kabpfctl("apply")
    steps = _traced(new.kabpfctl("apply", fault="trace").stderr)
    update = steps.index("update the link, 1")
    for turn, moment in enumerate(steps[update : update + 4]):
        new.kabpfctl("detach", "--all")
        world.say(PLAIN)
        old.kabpfctl("apply")
        daemon = kabpfd(*old.command("daemon"))
        assert world.connect() == _expected(PLAIN)
        _kill(new, moment, "apply")
        if turn % 2:
            new.kabpfctl("detach", "--all")
            daemon.stop(signal.SIGKILL)
        else:
            assert daemon.stop() == 0
        assert _pins() == []
        world.say(SWAPPED)
        new.kabpfctl("apply")
        _check_complete(world, new, SWAPPED)


@pytest.mark.parametrize("verb", ["detach --all", "stop"])
def test_killed_lift_is_completed(world, version, kabpfd, verb):
    """What was unloaded by half is unloaded by the next detach --all, and by the next apply loaded
    again, which tells what sockets have from policies."""
    this = version("this")

    def unload(fault):
        this.kabpfctl("apply")
        world.connect()
        if verb == "stop":
            daemon = kabpfd(*this.command("daemon", fault=fault))
            daemon.stop()
            return daemon.process.stderr.read()
        command = this.command("cli", "detach", "--all", fault=fault)
        return subprocess.run(command, capture_output=True, text=True).stderr

    world.say(PLAIN)
    steps = _traced(unload("trace"))
    assert _pins() == []
    for turn, moment in enumerate(_moments(steps)):
        unload(moment)
        assert _pins() != []
        _check_status(this)
        if turn % 2:
            this.kabpfctl("detach", "--all")
            assert _pins() == []
            assert world.open_options() == _expected(PLAIN)
        world.say(SWAPPED)
        this.kabpfctl("apply")
        _check_complete(world, this, SWAPPED)
        world.say(PLAIN)


def test_more_policies_than_are_remembered_are_unloaded_and_start_again(world, version):
    """After a stop a cgroup with as many former policies as it can have is loaded again, and the
    latest values are known as kabpf's."""
    this = version("this")
    for keys in ("interval: 11", "probes: 5", "user_timeout: 30", "idle: 60", "idle: 61"):
        world.say(dict.fromkeys(NAMES, (f"keepalive: {{{keys}}}", None)))
        this.kabpfctl("apply")
        world.connect()
    this.kabpfctl("detach", "--all")
    world.say(SWAPPED)
    this.kabpfctl("apply")
    _check_complete(world, this, SWAPPED)


@pytest.mark.parametrize("content", ["", "[" * 100_000], ids=["empty", "too deep"])
def test_damaged_note_of_former_policies_keeps_nobody_from_starting(world, version, content):
    """What sockets have counts as their own then, and new connections have their options."""
    this = version("this")
    world.say(PLAIN)
    this.kabpfctl("apply")
    world.connect()
    this.kabpfctl("detach", "--all")
    for note in ("former.json", "applied.json"):
        Path("/run/kabpf", note).write_text(content)
    world.say(SWAPPED)
    this.kabpfctl("status")
    this.kabpfctl("apply")
    assert world.open_options() == _expected(PLAIN)
    assert world.connect() == _expected(SWAPPED)
    assert changed(this.kabpfctl) == {}


@pytest.mark.core
def test_status_knows_what_a_killed_apply_left_out(cgroup, write_policy, kabpfctl):
    """What was applied before it was unloaded is not taken for what a killed apply activated."""
    write_policy("a.yaml", f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: on\n')
    kabpfctl("apply")
    kabpfctl("detach", "--all")
    killed = {**os.environ, "KABPF_FAULT": "write kabpf_births, 1"}
    subprocess.run([BIN / "kabpfctl", "apply"], env=killed)
    assert "policy files: changed since the last apply" in kabpfctl("status").stdout
