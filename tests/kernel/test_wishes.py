"""Containers have the options that they ask for, from kabpfd and from apply alike."""

import json

from harness import UNTOUCHED, options_of_new, wait_until

BOUNDS = "containers: {idle: 30s..1h}\n"
KEY = "io.kabpf.keepalive"


def records(kabpfctl):
    """How many cgroups have each policy, by its name."""
    found = json.loads(kabpfctl("status", "--json").stdout)["policies"]
    return {each["policy"]: (each["cgroups"], each["source"]) for each in found}


def test_containers_have_what_they_ask_for(container, write_policy, kabpfd, kabpfctl, peer):
    """By births: equal wishes are one policy. A restart of kabpfd and an apply change nothing, and
    where they may not ask any more they have none."""
    file = write_policy("a.yaml", BOUNDS)
    daemon = kabpfd()
    first = container(labels={KEY: "idle=61s"}).start()
    second = container("db", labels={KEY: "idle=61"}).start()
    other = container("x", labels={KEY: "idle=62s,probes=3"}).start()
    idle_61 = UNTOUCHED | {"keepalive": 1, "idle": 61}
    idle_62 = UNTOUCHED | {"keepalive": 1, "idle": 62, "probes": 3}
    for cgroup, expected in ((first, idle_61), (second, idle_61), (other, idle_62)):
        wait_until(lambda: options_of_new(peer, cgroup) == expected, "the container")  # noqa: B023
    source = f"{file}:1"
    expected = {"container:idle=61s": (2, source), "container:idle=62s,probes=3": (1, source)}
    assert records(kabpfctl) == expected
    assert not json.loads(kabpfctl("plan", "--json").stdout)["changes"]["policies"]
    daemon.process.kill()
    daemon.process.wait()
    daemon = kabpfd()
    assert records(kabpfctl) == expected
    kabpfctl("apply")
    assert records(kabpfctl) == expected
    (why,) = json.loads(kabpfctl("explain", "db", "--json").stdout)["cgroups"]
    assert (why["policy"], why["active"], why["refusal"]) == ("container:idle=61s", True, None)
    assert why["selector"] == {"container": f'{{label: {{{KEY}: "idle=61"}}}}', "source": source}
    file.write_text("policies: {}\n")
    daemon.reload()
    assert records(kabpfctl) == {}
    assert options_of_new(peer, first) == UNTOUCHED
    (why,) = json.loads(kabpfctl("explain", "db", "--json").stdout)["cgroups"]
    assert why["policy"] is None and why["refusal"].startswith("no policy file lets containers")


def test_apply_gives_running_containers_what_they_ask_for(
    container,
    write_policy,
    kabpfctl,
    peer,
):
    """Without kabpfd, and open sockets, too; a wish beyond the bounds does not count."""
    cgroups = [container(f"c{idle}", labels={KEY: f"idle={idle}"}).start() for idle in (61, 29)]
    _, address = peer().listener()
    clients = [peer(each) for each in cgroups]
    numbers = [each.connection(address) for each in clients]
    file = write_policy("a.yaml", BOUNDS)
    assert "1 policy active, covering 1 of" in kabpfctl("apply").stdout
    found = [one.options(number) for one, number in zip(clients, numbers, strict=True)]
    assert found == [UNTOUCHED | {"keepalive": 1, "idle": 61}, UNTOUCHED]
    text = f"{KEY} does not count: idle: 29 s is not in 30..3600 s ({file}:1)"
    assert text in " ".join(kabpfctl("explain", "c29").stdout.split())
    assert "container:idle=61s" in kabpfctl("sockets").stdout


def test_wrong_wish_is_one_line_in_the_log(container, write_policy, kabpfd, peer):
    """However often kabpfd looks again; and what else selects the container covers it."""
    write_policy("a.yaml", BOUNDS)
    write_policy("b.yaml", "select: [{cgroup: '/**'}]\nkeepalive: {idle: 63}\n")
    daemon = kabpfd()
    odd = "idle=\n60\x1b[2J"
    wrong = container("web", labels={KEY: odd}).start()
    expected = UNTOUCHED | {"keepalive": 1, "idle": 63}
    wait_until(lambda: options_of_new(peer, wrong) == expected, "the container")
    for _ in range(2):
        daemon.reload()
    daemon.stop()
    (line,) = [each for each in daemon.process.stderr.read().splitlines() if KEY in each]
    assert "container web of docker: io.kabpf.keepalive: idle: " in line
    assert line.isprintable()


def test_many_wishes_are_bounded_and_released(
    container,
    write_policy,
    kabpfd,
    kabpfctl,
    peer,
):
    """Of a stranger's containers 256 have what they ask for, the oldest; when some of these have
    gone, those that wait have, and new ones."""
    file = write_policy("a.yaml", "containers: on\n")
    daemon = kabpfd()
    made = [container(f"c{idle}", labels={KEY: f"idle={idle}"}) for idle in range(1000, 1260)]
    cgroups = [each.start() for each in made]
    probe = UNTOUCHED | {"keepalive": 1, "idle": 1255}
    wait_until(lambda: options_of_new(peer, cgroups[255]) == probe, "the last that has room")
    daemon.reload()
    assert len(records(kabpfctl)) == 256
    assert options_of_new(peer, cgroups[256]) == UNTOUCHED
    (why,) = json.loads(kabpfctl("explain", "c1256", "--json").stdout)["cgroups"]
    assert (why["policy"], why["active"]) == (None, True)
    assert why["refusal"].startswith("containers have 256 others already")
    kabpfctl("apply")
    assert options_of_new(peer, cgroups[0])["idle"] == 1000
    assert len(records(kabpfctl)) == 256
    for cgroup in cgroups[1:11]:
        cgroup.rmdir()

    def last_has_its_own():
        daemon.reload()
        return options_of_new(peer, cgroups[-1])["idle"] == 1259

    wait_until(last_has_its_own, "the kernel to release the removed cgroups")
    fresh = container("fresh", labels={KEY: "idle=77"}).start()
    wait_until(lambda: options_of_new(peer, fresh)["idle"] == 77, "a new container")
    assert len(records(kabpfctl)) == 251
    file.write_text("containers: off\n")
    daemon.reload()
    assert records(kabpfctl) == {}
