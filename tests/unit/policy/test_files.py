"""Policy files: which of them count, who may own them, what is read again, and how they merge."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kabpf.errors import PolicyError
from kabpf.policy import files, parser
from kabpf.policy.files import Directories
from kabpf.policy.model import Options, Policy

UNIT = b"select: [{unit: a.service}]\nkeepalive: {idle: %d}\n"


def test_strongest_directory_wins_for_a_name(tmp_path: Path) -> None:
    """Of files of one name that in the strongest directory counts, as systemd.unit(5) has it."""
    where = directories(tmp_path)
    for strength, directory in enumerate(reversed(where.drop_ins)):
        put(directory / "a.yaml", UNIT % (strength + 1))
        assert files.paths(where) == [directory / "a.yaml"]
        assert idles(parser.combine(read_all(where))) == [strength + 1]


def test_drop_ins_are_sorted_by_name_across_directories(tmp_path: Path) -> None:
    """The main file comes first; then names decide, bytewise, wherever the file is."""
    where = directories(tmp_path)
    etc, run, local, usr = where.drop_ins
    paths = [where.main, local / "10-z.yaml", etc / "9.yaml", usr / "B.yaml", run / "a.yaml"]
    for path in [*paths, run / "ä.yaml"]:
        put(path, UNIT % 1)
    assert files.paths(where) == [*paths, run / "ä.yaml"]


@pytest.mark.parametrize("mask", ["empty", "null"])
def test_mask_hides_weaker_files(tmp_path: Path, mask: str) -> None:
    """An empty file and a link to /dev/null hide files of their name in weaker directories."""
    where = directories(tmp_path)
    etc, run, _, usr = where.drop_ins
    put(usr / "a.yaml", UNIT % 1)
    put(usr / "b.yaml", UNIT % 2)
    if mask == "empty":
        put(run / "a.yaml", b"")
    else:
        (run / "a.yaml").symlink_to("/dev/null")
    assert files.paths(where) == [usr / "b.yaml"]
    assert [each.name for each in parser.combine(read_all(where))] == ["b"]
    put(etc / "a.yaml", UNIT % 3)
    assert idles(parser.combine(read_all(where))) == [3, 2]


def test_texts_are_those_of_the_files_that_were_marked(tmp_path: Path) -> None:
    """A file that another one has replaced since is not taken for it; a mask says nothing."""
    where = directories(tmp_path)
    mask = where.drop_ins[0] / "a.yaml"
    mask.symlink_to("/dev/null")
    put(where.main, UNIT % 4)
    marks = files.lasting(where, files.marks(where))
    assert files.texts(marks) == ((str(where.main), (UNIT % 4).decode()), (str(mask), ""))
    fresh = tmp_path / "fresh"
    put(fresh, UNIT % 5)
    fresh.rename(where.main)
    assert files.texts(marks) is None


def test_masked_main_file_says_nothing(tmp_path: Path) -> None:
    """The main file may be a link to /dev/null."""
    where = directories(tmp_path)
    where.main.symlink_to("/dev/null")
    assert files.paths(where) == []


def test_other_files_of_a_directory_are_not_read(tmp_path: Path) -> None:
    """Hidden files, and files that do not end in .yaml, are none of ours."""
    where = directories(tmp_path)
    for name in (".a.yaml", ".yaml", "a.yml", "a.yaml~", "a.yaml.dpkg-old", "a.YAML", "README"):
        put(where.drop_ins[0] / name, b"!")
    assert files.paths(where) == []


def test_missing_directories_are_fine(tmp_path: Path) -> None:
    """Nothing has to exist."""
    where = Directories(tmp_path / "none/policy.yaml", (tmp_path / "a", tmp_path / "b/c"))
    assert files.paths(where) == []
    assert files.load(where) == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"#" * 65537, ": 65537 bytes, expected at most 65536"),
        (b"policies: maybe", ":1: policies: maybe, expected names with their policies"),
    ],
    ids=["too large", "wrong"],
)
def test_reading_a_bad_file_names_it(tmp_path: Path, content: bytes, problem: str) -> None:
    """A file that can be checked by itself is refused with its own name."""
    put(tmp_path / "a.yaml", content)
    with pytest.raises(PolicyError) as raised:
        files.read(tmp_path / "a.yaml")
    assert str(raised.value) == f"{tmp_path}/a.yaml{problem}"


def test_file_of_64_kib_is_read_whole(tmp_path: Path) -> None:
    """The largest file that is taken is read to its end."""
    text = b"keepalive: off"
    put(tmp_path / "a.service.yaml", b"#" * (65536 - len(text) - 1) + b"\n" + text)
    (found,) = parser.combine([files.read(tmp_path / "a.service.yaml")])
    assert found.rules.options == Options(keepalive=False)


@pytest.mark.usefixtures("deadline")
def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    """A FIFO, which nobody writes to, is refused at once; so is a directory."""
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "directory.yaml").mkdir()
    for name in ("fifo.yaml", "directory.yaml"):
        with pytest.raises(PolicyError) as raised:
            files.read(tmp_path / name)
        assert str(raised.value) == (
            f"{tmp_path}/{name}: not a regular file, expected a policy file"
        )


NUMBERS = st.integers(1, 100)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "idle": NUMBERS,
        "interval": NUMBERS,
        "probes": NUMBERS,
        "preset": st.sampled_from(["aws-nlb", "azure-lb"]),
    },
)
POLICY = st.fixed_dictionaries(
    {
        "select": st.sampled_from("ab").map(lambda name: [{"cgroup": f"/{name}"}]),
        "keepalive": st.one_of(st.just("off"), st.just("on"), OPTIONS),
    }
)
SEVERAL = st.fixed_dictionaries(
    {}, optional={"defaults": OPTIONS, "policies": st.dictionaries(st.sampled_from("pqx"), POLICY)}
)
CONTENT = st.one_of(st.sampled_from(["empty", "null"]), POLICY, SEVERAL)
NAMES = ("x.yaml", "p.yaml", "10-z.yaml", "Y.yaml", ".h.yaml", "n.yml")
FILES = st.dictionaries(
    st.one_of(
        st.just(("main", "policy.yaml")),
        st.tuples(st.sampled_from(["etc", "run", "local", "usr"]), st.sampled_from(NAMES)),
    ),
    CONTENT,
)


@settings(max_examples=200)
@given(FILES)
def test_any_tree_of_files_is_merged_by_the_rules(content: dict[tuple[str, str], Any]) -> None:
    """Whatever files there are, what comes of them is what the rules say when they are followed
    step by step."""
    with tempfile.TemporaryDirectory() as directory:
        where = directories(Path(directory))
        for (parent, name), text in content.items():
            path = Path(directory, parent, name)
            if text == "null":
                path.symlink_to("/dev/null")
            else:
                path.write_text("" if text == "empty" else json.dumps(text))
        found = parser.combine(read_all(where))
    assert [
        (each.name, each.selectors[0].text, numbers(each.rules.options)) for each in found
    ] == merged(content)


def merged(content: dict[tuple[str, str], Any]) -> list[tuple[str, str, Any]]:
    """Name, selector and numbers of each policy, or None where it is off."""
    strongest = {}
    for parent in ("usr", "local", "run", "etc"):
        for name in ("x.yaml", "p.yaml", "10-z.yaml", "Y.yaml"):
            if (parent, name) in content:
                strongest[name] = content[parent, name]
    read = [("policy.yaml", content.get(("main", "policy.yaml"), "null"))]
    read += [(name, strongest[name]) for name in ("10-z.yaml", "Y.yaml", "p.yaml", "x.yaml")
             if name in strongest]  # fmt: skip
    defaults: dict[str, int] = {}
    policies: list[tuple[str, Any]] = []
    for file, text in read:
        if text in ("empty", "null"):
            continue
        defaults = {**defaults, **spelled_out(text.get("defaults", {}))}
        own = {file.removesuffix(".yaml"): text} if "keepalive" in text else {}
        for name, policy in (text.get("policies", {}) | own).items():
            policies = [each for each in policies if each[0] != name] + [(name, policy)]
    return [
        (
            name,
            policy["select"][0]["cgroup"],
            None
            if policy["keepalive"] == "off"
            else {
                **defaults,
                **spelled_out({} if policy["keepalive"] == "on" else policy["keepalive"]),
            },
        )
        for name, policy in policies
    ]


def spelled_out(options: dict[str, Any]) -> dict[str, int]:
    """With a preset's numbers in its place."""
    given = {key: value for key, value in options.items() if key != "preset"}
    if "preset" not in options:
        return given
    idle, interval = {"aws-nlb": (175, 29), "azure-lb": (120, 20)}[options["preset"]]
    return {"idle": idle, "interval": interval, "probes": 5, **given}


def numbers(options: Options) -> dict[str, int] | None:
    """The options that are given, by their keys."""
    given = {"idle": options.idle_s, "interval": options.interval_s, "probes": options.probes}
    return {key: value.high for key, value in given.items() if value} if options.keepalive else None


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="it needs root to own the files")


@needs_root
@pytest.mark.parametrize("where", ["of commands", "of an administrator"])
def test_file_that_vanishes_while_files_are_read_was_never_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Commands remove theirs at any time; of another's, a weaker one of its name counts then."""
    directories_ = directories(tmp_path)
    etc, run, _, usr = directories_.drop_ins
    monkeypatch.setattr(files, "ENDING", (run,))
    put(usr / "b.yaml", UNIT % 1)
    fleeting = run / "a.yaml" if where == "of commands" else etc / "b.yaml"
    script = "while :; do cp $0 $1.new; mv $1.new $1; rm $1; done"
    source = tmp_path / "source"
    put(source, UNIT % 2)
    with subprocess.Popen(["sh", "-c", script, source, fleeting]) as writer:
        try:
            seen = {tuple(idles(files.load(directories_))) for _ in range(500)}
        finally:
            writer.kill()
    assert seen <= ({(1,), (2, 1)} if where == "of commands" else {(1,), (2,)})


@needs_root
def test_file_that_is_made_again_when_opening_it_has_failed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is removed and made again was there all the time, whatever comes between."""
    where = directories(tmp_path)
    path = where.drop_ins[0] / "a.yaml"
    put(path, UNIT % 1)
    opened = os.open

    def opened_between(name: Any, *rest: int) -> int:
        if name != path:
            return opened(name, *rest)
        monkeypatch.setattr(os, "open", opened)
        path.unlink()
        try:
            return opened(name, *rest)
        finally:
            put(path, UNIT % 2)

    monkeypatch.setattr(os, "open", opened_between)
    assert idles(files.load(where)) == [2]


@needs_root
@pytest.mark.parametrize("content", [UNIT % 1, b""], ids=["policy", "mask"])
@pytest.mark.parametrize(
    ("uid", "mode", "problem"),
    [
        (65534, 0o644, "owned by uid 65534, expected root"),
        (0, 0o664, "mode 0664, expected one that root alone can write"),
        (0, 0o646, "mode 0646, expected one that root alone can write"),
    ],
)
def test_file_that_others_can_change_is_refused(
    tmp_path: Path, uid: int, mode: int, problem: str, content: bytes
) -> None:
    """A policy file, also one that only masks another, belongs to root and is writable by root
    alone."""
    where = directories(tmp_path)
    path = where.drop_ins[1] / "a.yaml"
    put(path, content)
    os.chown(path, uid, 0)
    path.chmod(mode)
    assert findings(where) == [f"{path}: {problem}"]


@needs_root
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
@pytest.mark.parametrize("mask", [False, True])
def test_directory_that_others_can_change_is_refused(tmp_path: Path, mode: int, mask: bool) -> None:
    """Who may write to a directory may put a file there, or a link that masks one elsewhere."""
    where = directories(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        put(where.drop_ins[3] / name, UNIT % 1)
        if mask:
            (where.drop_ins[0] / name).symlink_to("/dev/null")
        else:
            put(where.drop_ins[0] / name, UNIT % 1)
    where.drop_ins[0].chmod(mode)
    problem = f"mode {mode:04o}, expected one that root alone can write"
    assert findings(where) == [f"{where.drop_ins[0]}: {problem}"]


@needs_root
@pytest.mark.parametrize(
    ("level", "options", "accepted"), [(0, "ro", True), (0, "rw", False), (1, "ro", False)]
)
def test_directory_that_is_mounted_read_only_may_have_any_mode(
    tmp_path: Path, level: int, options: str, accepted: bool
) -> None:
    """As Kubernetes mounts a ConfigMap: nobody can write to it there, whatever its mode says. That
    all above it is read-only to this process, as under ProtectSystem=, says nothing of others."""
    where = directories(tmp_path)
    put(where.drop_ins[0] / "a.yaml", UNIT % 1)
    where.drop_ins[0].chmod(0o777)
    load = "from kabpf.policy import files; from pathlib import Path;"
    load += f" print(len(files.load({where!r})))"
    script = load.replace("Directories(", "files.Directories(").replace("PosixPath(", "Path(")
    mounted = (where.drop_ins[0], where.drop_ins[0].parent)[level]
    mount = f"mount --bind -o {options} {mounted} {mounted}"
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" -P -c "$1"']
    done = subprocess.run([*command, sys.executable, script], capture_output=True, text=True)
    assert done.stdout == ("1\n" if accepted else "")
    assert ("mode 0777, expected one that root alone can write" in done.stderr) != accepted


@needs_root
def test_directory_of_someone_else_is_refused(tmp_path: Path) -> None:
    """The owner of a directory can replace what is in it, the main file included."""
    where = directories(tmp_path)
    os.chown(where.main.parent, 65534, 0)
    os.chown(where.drop_ins[2], 65534, 0)
    problem = "owned by uid 65534, expected root"
    assert findings(where) == [f"{where.main.parent}: {problem}", f"{where.drop_ins[2]}: {problem}"]


@needs_root
def test_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    """A link is followed, and the file at its end has to be root's."""
    where = directories(tmp_path)
    put(tmp_path / "target", UNIT % 7)
    (where.drop_ins[0] / "a.yaml").symlink_to(tmp_path / "target")
    assert idles(files.load(where)) == [7]
    os.chown(tmp_path / "target", 65534, 0)
    path = where.drop_ins[0] / "a.yaml"
    assert findings(where) == [f"{path}: owned by uid 65534, expected root"]


@needs_root
@pytest.mark.parametrize("way", ["file", "directory", "chain", "above", "missing", "relative"])
def test_link_that_the_service_can_not_follow_is_refused(tmp_path: Path, way: str) -> None:
    """What leads through a tree that kabpf.service does not see is wrong for whoever reads it, also
    where the target is somewhere else in the end."""
    where = directories(tmp_path)._replace(hidden=("/none", str(tmp_path / "root")))
    etc, seen = where.drop_ins[0], tmp_path / "seen"
    (tmp_path / "root/d").mkdir(parents=True)
    seen.mkdir()
    put(seen / "a.yaml", UNIT % 7)
    target = tmp_path / "root/d/a.yaml"
    path = wrong = etc / "a.yaml"
    if way == "directory":
        put(target, UNIT % 7)
        etc.rmdir()
        etc.symlink_to(tmp_path / "root/d")
        target, wrong = tmp_path / "root", etc
    elif way == "above":
        (seen / "up").symlink_to(tmp_path / "root/d")
        path.symlink_to(seen / "up/../../seen/a.yaml")
        target = tmp_path / "root"
    elif way == "relative":
        put(target, UNIT % 7)
        path.symlink_to(os.path.relpath(target, etc))
        target = tmp_path / "root"
    else:
        path.symlink_to(target)
        if way == "chain":
            target.symlink_to(seen / "a.yaml")
        elif way == "file":
            put(target, UNIT % 7)
        target = tmp_path / "root"
    assert findings(where) == [
        f"{wrong}: leads to {target}, which kabpf.service can't see, expected a file outside of"
        f" /none, {tmp_path}/root"
    ]
    if way != "missing":
        assert idles(files.load(where._replace(hidden=()))) == [7]


@needs_root
def test_link_beside_a_hidden_tree_is_followed(tmp_path: Path) -> None:
    """A name that only begins like that of the tree is another one; a link may lead to itself."""
    where = directories(tmp_path)._replace(hidden=(str(tmp_path / "root"),))
    (tmp_path / "rootless").mkdir()
    put(tmp_path / "rootless/a.yaml", UNIT % 7)
    (where.drop_ins[0] / "a.yaml").symlink_to(tmp_path / "rootless/a.yaml")
    assert idles(files.load(where)) == [7]
    path = where.drop_ins[0] / "b.yaml"
    path.symlink_to("b.yaml")
    assert findings(where) == [f"{path}: cannot be read: Too many levels of symbolic links"]


@needs_root
def test_error_tells_since_when_files_are_wrong(tmp_path: Path) -> None:
    """It is the change of the first file that is wrong; of files that contradict one another it is
    the last change."""
    where = directories(tmp_path)
    etc = where.drop_ins[0]
    put(etc / "a.service.yaml", b"keepalive: maybe\n")
    changed = (etc / "a.service.yaml").stat().st_ctime
    time.sleep(0.05)
    put(etc / "b.service.yaml", b"keepalive: maybe\n")
    put(etc / "c.service.yaml", b"keepalive: off\n")
    with pytest.raises(PolicyError) as raised:
        files.load(where)
    assert (raised.value.since, len(raised.value.findings)) == (changed, 2)
    put(etc / "a.service.yaml", b"keepalive: {user_timeout: auto}\n")
    (etc / "b.service.yaml").unlink()
    with pytest.raises(PolicyError) as raised:
        files.load(where)
    assert raised.value.since == max(path.stat().st_ctime for path in etc.iterdir())


@needs_root
def test_link_is_wrong_since_it_was_made(tmp_path: Path) -> None:
    """A link may be younger than the file that it leads to, and that be missing."""
    where = directories(tmp_path)
    path = where.drop_ins[0] / "a.yaml"
    path.symlink_to("nowhere")
    with pytest.raises(PolicyError) as raised:
        files.load(where)
    assert raised.value.since == path.lstat().st_ctime


@needs_root
@pytest.mark.usefixtures("deadline")
def test_what_cannot_be_read_is_reported(tmp_path: Path) -> None:
    """A dangling link, a FIFO and a directory are findings, each by its name; nothing waits."""
    where = directories(tmp_path)
    etc = where.drop_ins[0]
    (etc / "a.yaml").symlink_to("nowhere")
    os.mkfifo(etc / "b.yaml")
    (etc / "c.yaml").mkdir()
    (etc / "d.yaml").symlink_to("d.yaml")
    assert findings(where) == [
        f"{etc}/a.yaml: cannot be read: No such file or directory",
        f"{etc}/b.yaml: not a regular file, expected a policy file",
        f"{etc}/c.yaml: not a regular file, expected a policy file",
        f"{etc}/d.yaml: cannot be read: Too many levels of symbolic links",
    ]


@needs_root
def test_file_in_place_of_a_directory_is_reported(tmp_path: Path) -> None:
    """A drop-in directory that is none is a finding."""
    where = directories(tmp_path)
    where.drop_ins[0].rmdir()
    put(where.drop_ins[0], b"")
    assert findings(where) == [f"{where.drop_ins[0]}: cannot be read: Not a directory"]


@needs_root
def test_all_bad_files_are_reported(tmp_path: Path) -> None:
    """One look finds every bad file, a line for each; the good ones change nothing about it."""
    where = directories(tmp_path)
    etc, run, *_ = where.drop_ins
    put(where.main, b"policies: [")
    put(etc / "b.service.yaml", b"keepalive: maybe\nselect: wrong")
    put(run / "a.service.yaml", b"keepalive: on")
    put(run / "c.service.yaml", b"\nkeepalive: {probes: 200}")
    assert findings(where) == [
        f"{where.main}:1: not YAML: did not find expected node content",
        f"{etc}/b.service.yaml:2: select: wrong, expected a list such as [{{unit: nginx.service}}]",
        f"{run}/c.service.yaml:2: keepalive.probes: 200 is not in 1 to 127",
    ]


@needs_root
def test_file_that_changes_while_it_is_read_has_another_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot's stamp is taken first, so that a change during the look is not missed."""
    where = directories(tmp_path)
    path = where.drop_ins[0] / "a.yaml"
    put(path, UNIT % 5)
    lasting = files.digest(files.lasting(where, files.marks(where)))
    assert files.snapshot(where) == (files.stamp(where), files.load(where), lasting, None)

    def load_late(*arguments: object) -> tuple[Policy, ...]:
        put(path, UNIT % 66)
        return load(*arguments)

    load = files.load
    monkeypatch.setattr(files, "load", load_late)
    stamp, policies, *_ = files.snapshot(where)
    assert idles(policies) == [66]
    assert stamp != files.stamp(where)


@needs_root
def test_unchanged_file_is_not_parsed_again(tmp_path: Path) -> None:
    """With a cache, a second load parses what changed and nothing else."""
    where = directories(tmp_path)
    kept, changed, gone = (where.drop_ins[0] / name for name in ("k.yaml", "c.yaml", "g.yaml"))
    for path in (kept, changed, gone):
        put(path, UNIT % 5)
    cache: files.Cache = {}
    first = files.load(where, cache)
    before = dict(cache)
    assert files.load(where, cache) == first
    assert all(cache[path] is before[path] for path in (kept, changed, gone))
    put(changed, UNIT % 66)
    gone.unlink()
    assert idles(files.load(where, cache)) == [66, 5]
    assert cache.keys() == {kept, changed}
    assert cache[kept] is before[kept]


@needs_root
@pytest.mark.parametrize("way", ["in place", "renamed"])
def test_change_of_the_same_size_and_time_is_noticed(tmp_path: Path, way: str) -> None:
    """A file that was changed is read again, though its size and its mtime be what they were."""
    where = directories(tmp_path)
    path = where.drop_ins[0] / "a.yaml"
    put(path, UNIT % 5)
    cache: files.Cache = {}
    files.load(where, cache)
    before = path.stat()
    fresh = path if way == "in place" else path.with_name(".fresh")
    deadline = time.monotonic() + 5
    while True:
        put(fresh, UNIT % 6)
        os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
        # The clock of file times may stand still for some milliseconds.
        if fresh.stat().st_ctime_ns != before.st_ctime_ns or time.monotonic() > deadline:
            break
    fresh.rename(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert idles(files.load(where, cache)) == [6]


@needs_root
def test_bad_file_keeps_the_cache(tmp_path: Path) -> None:
    """A load that fails leaves the cache as it was, and a file made wrong is not served from it."""
    where = directories(tmp_path)
    path = where.drop_ins[0] / "a.yaml"
    put(path, UNIT % 5)
    cache: files.Cache = {}
    files.load(where, cache)
    before = dict(cache)
    put(path, b"wrong")
    assert findings(where, cache)
    assert cache == before
    assert findings(where, cache)
    put(path, UNIT % 5)
    path.chmod(0o666)
    assert findings(where, cache) == [f"{path}: mode 0666, expected one that root alone can write"]


def test_links_whose_targets_nobody_watches_are_told(tmp_path: Path) -> None:
    """Those that lead out of the directories; not a ConfigMap's, whose links are replaced there."""
    where = directories(tmp_path)
    etc, run, *_ = where.drop_ins
    outside = tmp_path / "elsewhere.yaml"
    for path in (outside, run / "b.yaml", etc / "own.yaml"):
        put(path, UNIT % 1)
    (etc / "..data").mkdir()
    put(etc / "..data/map.yaml", UNIT % 1)
    for name, target in (("out", outside), ("b2", run / "b.yaml"), ("map", "..data/map.yaml")):
        (etc / f"{name}.yaml").symlink_to(target)
    (etc / "mask.yaml").symlink_to("/dev/null")
    (line,) = files.unwatched(where)
    assert line.startswith(f"{etc}/out.yaml: is a link to {outside}, whose changes ")


@pytest.fixture
def deadline() -> Iterator[None]:
    """Five seconds, in which what does not wait for anything is done."""

    def late(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def directories(tmp_path: Path) -> Directories:
    """A main file's directory and four drop-in directories, empty, for their owner alone."""
    drop_ins = tuple(tmp_path / name for name in ("etc", "run", "local", "usr"))
    for directory in (*drop_ins, tmp_path / "main"):
        directory.mkdir(mode=0o755)
    return Directories(tmp_path / "main/policy.yaml", drop_ins)


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)


def idles(policies: tuple[Policy, ...]) -> list[int]:
    return [each.rules.options.idle_s.high for each in policies if each.rules.options.idle_s]


def read_all(where: Directories) -> list[parser.PolicyFile]:
    """What load reads, whoever owns it."""
    return [files.read(path) for path in files.paths(where)]


def findings(where: Directories, cache: files.Cache | None = None) -> list[str]:
    with pytest.raises(PolicyError) as raised:
        files.load(where, cache)
    return list(raised.value.findings)
