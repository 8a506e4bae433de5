"""A user's own podman: no `container:` names its containers, and what is said names what does."""

import json

from container_engines import compile_first
from machine import KEEPALIVE

IDLE = 61


def test_container_of_a_user_is_covered_by_what_explain_names(machine, tmp_path):
    """Its store is the user's, so neither its name nor what it asks for counts; the hook lets it
    start, `explain` and `doctor` name a selector, and with that it is covered from its first
    connection."""
    machine.run("useradd", "--create-home", "alice")
    for ids in ("/etc/subuid", "/etc/subgid"):  # alice has her own alone, which needs no newuidmap
        machine.write(ids, "")
    uid = machine.run("id", "--user", "alice")
    machine.run("systemctl", "start", f"user@{uid}.service")
    compile_first(machine.root / "home/alice")
    machine.run("chown", "-R", "alice:", "/home/alice/image")
    as_alice = (
        *("runuser", "--user=alice", "--", "env", "-C", "/home/alice", "HOME=/home/alice"),
        *(f"XDG_RUNTIME_DIR=/run/user/{uid}", "podman", "--storage-driver=vfs", "run"),
        *("--network=none", "--pids-limit=0"),
    )
    image = ("--label=io.kabpf.keepalive=idle=62", "--rootfs", "/home/alice/image", "/first")

    def first(name):
        return machine.run(*as_alice, "--rm", f"--name={name}", *image)

    select = "select: [{container: {name: '*'}}]\n"
    machine.drop_in("containers.yaml", select + KEEPALIVE)
    machine.drop_in("wishes.yaml", "containers: on\n")
    assert first("app").split()[1] == "-1"
    machine.run(*as_alice, "--detach", "--name=stays", *image, "stay")
    manager = f"/user.slice/user-{uid}.slice/user@{uid}.service/"
    found = (machine.cgroups / manager[1:]).rglob("libpod-*.scope")
    (scope,) = [each for each in found if "conmon" not in each.name]
    path = f"/{scope.relative_to(machine.cgroups)}"
    explained = json.loads(machine.run("kabpfctl", "explain", "--json", path))
    assert explained["cgroups"][0]["policy"] is None
    (found,) = explained["elsewhere"]
    assert found["found"].startswith(f"{path} is a container of user {uid}, whose engine's store")
    selector = found["fix"].removeprefix("select ")
    assert selector.startswith(f"cgroup: {manager}")
    notes = json.loads(machine.attempt("kabpfctl", "doctor", "--json").stdout)["findings"]
    assert (found["found"], found["fix"]) in [(each["found"], each["fix"]) for each in notes]
    key, _, glob = selector.partition(": ")
    machine.drop_in("containers.yaml", f'select: [{{{key}: "{glob}"}}]\n{KEEPALIVE}')
    assert first("other").split() == [str(IDLE), "0"]
