"""What engines have on disk: golden folders of tests/engines, from real ones or their sources.

A folder has the engine's files below root/, databases compressed, and the facts that they tell."""

import dataclasses
import gzip
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
import yaml

from kabpf.containers import names
from kabpf.engines import engines, files, storage
from kabpf.engines.engines import Engines, Found

CASES = sorted((Path(__file__).parents[2] / "engines").iterdir())


@pytest.fixture
def unpacked(tmp_path):
    """The root directory of a case."""

    def unpack(case: Path) -> Path:
        root = tmp_path / case.name
        shutil.copytree(case / "root", root)
        for packed in root.rglob("*.gz"):
            packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        return root

    return unpack


def case(name):
    return next(each for each in CASES if each.name == name)


def expected(case):
    return yaml.safe_load((case / "facts.yaml").read_text())["containers"]


def asked(root, path):
    found = Engines(root).facts(path, names.identify(path).id)
    if found is None:
        return None
    return {"cgroup": path} | {k: v for k, v in dataclasses.asdict(found).items() if k != "id"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_facts_are_those_on_disk(case, unpacked):
    """Names, images, labels, annotations and pods, of every engine and both cgroup drivers."""
    root = unpacked(case)
    assert [asked(root, each["cgroup"]) for each in expected(case)] == expected(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cgroup_elsewhere_with_the_name_of_a_container_is_nobody_s(case, unpacked):
    """A user and a container may give their cgroups such names, and get nothing by it."""
    root = unpacked(case)
    for each in expected(case):
        name = each["cgroup"].rpartition("/")[2]
        for above in ("/user.slice/user-7.slice/user@7.service", each["cgroup"], ""):
            path = f"{above}/{name}"
            assert path == each["cgroup"] or asked(root, path) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_is_found(case, unpacked):
    """The one whose files are there, and no other."""
    engine = expected(case)[0]["engine"]
    assert Engines(unpacked(case)).found() == [Found(engine)]


def test_machine_without_an_engine_has_none(tmp_path):
    """Nothing is found, and a cgroup with an engine's name is nobody's."""
    assert Engines(tmp_path).found() == []
    assert Engines(tmp_path).facts(f"/system.slice/docker-{'0' * 64}.scope", "0" * 64) is None


def test_id_that_the_path_does_not_have_is_nobody_s(unpacked):
    """An id that somebody hands over is no path into the engine's directory."""
    root, [path] = docker(unpacked)
    assert Engines(root).facts(path, "../" * 21 + "a") is None


def test_database_that_can_not_be_read_is_said(unpacked):
    """What an engine can't tell comes with the reason."""
    root = unpacked(case("podman-5.4"))
    database = root / "var/lib/containers/storage/db.sql"
    database.unlink()
    database.symlink_to("elsewhere")
    reason = "Too many levels of symbolic links"
    assert Engines(root).found() == [Found("podman", f"{database}: {reason}")]


def docker(unpacked):
    """Docker's root directory and its container's cgroup."""
    return unpacked(case("docker-26.1")), [each["cgroup"] for each in expected(case("docker-26.1"))]


def rewrite(root, change):
    """Change a JSON file of Docker's container; returns the file."""
    [file] = root.glob("var/lib/docker/containers/*/config.v2.json")
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return file


def test_data_root_is_where_docker_s_settings_say(unpacked):
    """daemon.json(5) may move it."""
    root, [path] = docker(unpacked)
    (root / "srv").mkdir()
    (root / "var/lib/docker").rename(root / "srv/docker")
    (root / "etc/docker").mkdir(parents=True)
    (root / "etc/docker/daemon.json").write_text('{"data-root": "/srv/docker"}')
    assert asked(root, path)["name"] == "dock-1"


def test_podman_that_writes_keeps_nobody_waiting(unpacked):
    """A container starts while another one's removal has the database locked."""
    root = unpacked(case("podman-5.4"))
    database = sqlite3.connect(root / "var/lib/containers/storage/db.sql")
    database.execute("BEGIN EXCLUSIVE")
    try:
        assert asked(root, expected(case("podman-5.4"))[0]["cgroup"])["name"] == "cfs"
    finally:
        database.close()


def test_locked_database_of_podman_s_costs_one_wait(unpacked):
    """Not one for each container: root's commands hold a lock meanwhile."""
    root = unpacked(case("podman-5.4"))
    database = sqlite3.connect(root / "var/lib/containers/storage/db.sql")
    database.execute("BEGIN EXCLUSIVE")
    path = expected(case("podman-5.4"))[0]["cgroup"]
    id = names.identify(path).id
    looks = Engines(root)
    try:
        assert all(looks.facts(path, id).name == "cfs" for _ in range(100))
    finally:
        database.close()
    assert looks._budget.waits_s == 0


def test_query_without_end_uses_up_one_budget(unpacked):
    """What is in podman's database takes no longer than all looks at it together may."""
    root = unpacked(case("podman-5.4"))
    database = sqlite3.connect(root / "var/lib/containers/storage/db.sql")
    database.executescript(
        "ALTER TABLE ContainerConfig RENAME TO Former;"
        " CREATE VIEW ContainerConfig AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1"
        " FROM n) SELECT i || '' AS ID, 'x' AS PodID, i AS JSON FROM n;"
    )
    database.close()
    path = expected(case("podman-5.4"))[0]["cgroup"]
    id = names.identify(path).id
    looks = Engines(root, seconds=0.05)
    began = time.thread_time()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            looks.facts(path, id)
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize("place", ["etc", "usr/share"])
def test_graph_root_is_where_podman_s_settings_say(unpacked, place):
    """containers-storage.conf(5) may move it."""
    root = unpacked(case("podman-5.4"))
    (root / "srv").mkdir()
    (root / "var/lib/containers/storage").rename(root / "srv/containers")
    (root / place / "containers").mkdir(parents=True)
    settings = '[storage]\ngraphroot = "/srv/containers"\n'
    (root / place / "containers/storage.conf").write_text(settings)
    assert asked(root, expected(case("podman-5.4"))[0]["cgroup"])["name"] == "cfs"
    (root / "srv/containers").rename(root / "srv/moved")
    settings = settings.replace("containers", "moved")  # and may be changed at any time
    (root / place / "containers/storage.conf").write_text(settings)
    assert asked(root, expected(case("podman-5.4"))[0]["cgroup"])["name"] == "cfs"


def test_settings_are_parsed_once(unpacked, monkeypatch):
    """Whatever the number of containers: that takes longer than all else that is read."""
    root = unpacked(case("podman-5.4"))
    (root / "etc/containers").mkdir(parents=True)
    (root / "etc/containers/storage.conf").write_text(f"[storage] # {root}\n")
    parsed = []
    loads = storage.tomllib.loads
    monkeypatch.setattr(storage.tomllib, "loads", lambda text: parsed.append(text) or loads(text))
    for each in expected(case("podman-5.4")):
        assert asked(root, each["cgroup"]) == each
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "settings",
    [
        '[storage]\ngraphroot = "/srv/\\u0000"',
        f"a = {'[' * 50_000}",
        "[storage]\ngraphroot = 7",
        "[",
    ],
    ids=["NUL", "deep", "number", "cut"],
)
def test_settings_that_are_wrong_raise_nothing(unpacked, settings):
    """Those of podman; a container is unknown, or its store where it mostly is."""
    root = unpacked(case("podman-5.4"))
    (root / "etc/containers").mkdir(parents=True)
    (root / "etc/containers/storage.conf").write_text(settings)
    found = asked(root, expected(case("podman-5.4"))[0]["cgroup"])
    assert (found and found["name"]) == (None if "srv" in settings else "cfs")


def test_row_above_the_bound_is_not_read(unpacked):
    """podman's database has no more room for a container than a file has."""
    root = unpacked(case("podman-5.4"))
    with sqlite3.connect(root / "var/lib/containers/storage/db.sql") as database:
        database.execute("UPDATE ContainerConfig SET JSON = JSON || printf('%.*c', 5000000, ' ')")
    assert asked(root, expected(case("podman-5.4"))[0]["cgroup"]) is None
    database.close()


def test_file_of_a_mebibyte_is_read(unpacked):
    """An engine's file may hold a long label."""
    root, [path] = docker(unpacked)
    rewrite(root, lambda config: config["Config"]["Labels"].update(long="x" * (1 << 20)))
    assert len(asked(root, path)["labels"]["long"]) == 1 << 20


def test_file_above_the_bound_is_not_read(unpacked):
    """It costs no more memory than the bound."""
    root, [path] = docker(unpacked)
    rewrite(root, lambda config: config["Config"]["Labels"].update(long="x" * files.BYTES_MAX))
    assert asked(root, path) is None


def test_odd_bytes_come_through(unpacked):
    """Each text has bytes again, as a cgroup's path does."""
    root, [path] = docker(unpacked)
    odd = "\0 \n\t'\"\\\x7f\x85\u2028é\U0001f600"
    file = rewrite(root, lambda config: config["Config"]["Labels"].update(odd=odd, half="\ud83d"))
    file.write_bytes(file.read_bytes().replace(b"payments", b"pay\xff"))
    labels = asked(root, path)["labels"]
    assert labels["odd"] == odd
    assert os.fsencode(labels["team"]) == b"pay\xff"
    assert os.fsencode(labels["half"]) == b"\xed\xa0\xbd"


def test_image_s_labels_make_no_pod(unpacked):
    """Who made an image does not say that its containers are in Kubernetes."""
    root, [path] = docker(unpacked)
    labels = {f"io.kubernetes.pod.{name}": "web" for name in ("namespace", "name", "uid")}
    labels["io.kubernetes.container.name"] = "main"
    rewrite(root, lambda config: config["Config"]["Labels"].update(labels))
    found = asked(root, path)
    assert (found["name"], found["pod"], found["labels"]) == (
        "dock-1",
        None,
        {"team": "payments", **labels},
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b'{"Config": 7}x', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000],
    ids=["empty", "list", "null", "cut", "more", "deep list", "deep object", "number"],
)
def test_file_that_is_no_object_is_nobody_s(unpacked, content):
    """Whatever is in it, nothing is raised."""
    root, [path] = docker(unpacked)
    [file] = root.glob("var/lib/docker/containers/*/config.v2.json")
    file.write_bytes(content)
    assert asked(root, path) is None


@pytest.mark.parametrize("value", [None, 7, "text", [], {"Labels": ["a"], "Image": {}}])
def test_value_of_another_type_is_as_if_it_were_missing(unpacked, value):
    """Another version's file is not this one's."""
    root, [path] = docker(unpacked)
    rewrite(root, lambda config: config.update(Config=value, Name=value))
    assert (asked(root, path)["image"], asked(root, path)["labels"]) == ("", {})


def replaced_by_a_link(file):
    file.rename(file.with_name("real"))
    file.symlink_to("real")


def replaced_by_a_fifo(file):
    file.unlink()
    os.mkfifo(file)


def directory_replaced_by_a_link(file):
    file.parent.rename(file.parent.with_name("real"))
    file.parent.symlink_to("real")


@pytest.mark.parametrize(
    "replace", [replaced_by_a_link, replaced_by_a_fifo, directory_replaced_by_a_link]
)
def test_nothing_is_followed_or_waited_for(unpacked, replace):
    """Neither a symbolic link nor a FIFO is read."""
    root, [path] = docker(unpacked)
    [file] = root.glob("var/lib/docker/containers/*/config.v2.json")
    replace(file)
    assert asked(root, path) is None


def test_engines_are_all_asked():
    """Each engine's name has its module."""
    assert set(engines.ENGINES) == set(engines._FACTS) == set(engines._LACKS)
