"""kabpfctl metrics, read by Prometheus's own parser, and as a scraper meets it."""

import socket
import subprocess
from pathlib import Path

import pytest
from harness import BIN, path_of
from measured import measured
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as prometheus

from kabpf import __version__
from kabpf.observe.exposition import OPENMETRICS

pytestmark = pytest.mark.kernel

POLICY = """policies:
  web:
    select: [{{cgroup: {path}}}]
    mode: enforce
    keepalive: {{idle: 61s, interval: 10s, probes: 6}}
"""


@pytest.fixture
def values(kabpfctl):
    """What kabpfctl metrics prints, by name and labels."""
    return lambda *options: by_name(prometheus(kabpfctl("metrics", *options).stdout))


def by_name(families):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def policy(cgroup):
    Path("/etc/kabpf/policy.yaml").write_text(POLICY.format(path=path_of(cgroup)))


def test_metrics_count_what_a_policy_did(policy, cgroup, kabpfctl, peer, values):
    kabpfctl("apply")
    before = values()
    _, address = peer().listener()
    client = peer(cgroup)
    number = client.connection(address)
    client.set_option(number, "idle", 15)  # ignored
    after = values()
    web = ("policy", "web")
    rose = {
        name: after[name] - before[name]
        for name in after
        if web in name and after[name] != before[name]
    }
    assert rose == {
        ("kabpf_connections_established_total", web): 1,
        ("kabpf_setsockopt_ignored_total", web): 1,
    }
    assert after["kabpf_cgroups", web] == 1
    assert after["kabpf_build_info", ("version", __version__)] == 1
    assert after["kabpf_data_plane_active",] == after["kabpf_policy_files_active",] == 1


def test_metrics_tell_when_the_last_apply_was_and_how_long_it_took(policy, kabpfctl, values):
    kabpfctl("apply")
    first = values()
    kabpfctl("apply")
    second = values()
    assert (
        second["kabpf_last_apply_timestamp_seconds",]
        > first["kabpf_last_apply_timestamp_seconds",]
        > 1e9
    )
    assert 0 < second["kabpf_last_apply_duration_seconds",] < 60


def test_metrics_without_a_data_plane_say_so(policy, values):
    assert values()["kabpf_data_plane_active",] == 0
    assert values()["kabpf_policy_files_active",] == 0


def test_metrics_count_wrong_files(policy, kabpfctl, values):
    kabpfctl("apply")
    Path("/etc/kabpf/policy.yaml").write_text("policies: 3\n")
    assert values()["kabpf_policy_errors",] == 1
    assert values()["kabpf_policy_files_active",] == 0


def test_metrics_count_open_sockets_once(policy, cgroup, kabpfctl, peer, values):
    """Also where several processes have them."""
    _, address = peer().listener()
    client = peer(cgroup)
    client.connection(address)
    kabpfctl("attach", "--cgroup", cgroup, "--new-only", "--idle", 61)
    client.connection(address)
    with_policy = {
        dict(name[1:])["keepalive"]: value
        for name, value in values("--sockets").items()
        if name[0] == "kabpf_sockets" and dict(name[1:])["policy"]
    }
    assert with_policy == {"on": 1, "off": 1}


def test_metrics_of_run_have_no_label_of_their_own(kabpfctl, values):
    """A name for each command that ever ran would never end."""
    kabpfctl("apply")
    with subprocess.Popen(
        [BIN / "kabpfctl", "run", "--idle", "61", "sh", "-c", "echo; read line"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as running:  # fmt: skip
        running.stdout.readline()
        during = values()
        running.communicate(b"\n")
    assert during["kabpf_cgroups", ("policy", "(run)")] == 1
    assert not any("run-" in str(name) for name in during)


@pytest.fixture
def scrape():
    """Send bytes to kabpfctl metrics --http as systemd starts it; what it answers."""

    def send(request, *, then_close=True):
        ours, theirs = socket.socketpair()
        with (
            ours,
            subprocess.Popen(
                [BIN / "kabpfctl", "metrics", "--http"], stdin=theirs, stderr=subprocess.PIPE
            ) as process,
        ):
            theirs.close()
            ours.sendall(request)
            if then_close:
                ours.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: ours.recv(65536), b""))
            assert process.wait() == 0
            assert process.stderr.read() == b""
        return answer

    return send


def test_scrape_is_answered_in_the_format_that_is_asked_for(policy, kabpfctl, scrape):
    kabpfctl("apply")
    accept = b"application/openmetrics-text; version=1.0.0"
    head, _, text = scrape(
        b"GET /metrics?sockets HTTP/1.1\r\nHost: a\r\nAccept: " + accept + b"\r\n\r\n",
        then_close=False,
    ).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\r\nContent-Type: application/openmetrics-text" in head
    assert ("kabpf_data_plane_active",) in by_name(openmetrics(text.decode()))
    _, _, text = scrape(b"GET /metrics HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert ("kabpf_data_plane_active",) in by_name(prometheus(text.decode()))


def test_scrape_costs_little(make_cgroup, write_policy, kabpfctl, peer):
    """With 100 policies, 1,000 cgroups and 10,000 connections, whose both ends are here. The least
    of some scrapes counts, as the machine may be busy. It takes some seconds to make all that."""
    places = [make_cgroup(f"m{number}.service") for number in range(1000)]
    write_policy(
        "a.yaml",
        "policies:\n"
        + "".join(
            f"  p{number}: {{select: [{{cgroup: '{path_of(place)}'}}], keepalive: {{idle: 61s}}}}\n"
            for number, place in enumerate(places[:100])
        ),
    )
    kabpfctl("apply")
    server, client = peer(), peer(places[0])
    listener, address = server.listener()
    for _ in range(100):
        client.tell("connect_many", address, 100)
        server.accept_many(listener, 100)
        client.answer()

    def least(query):
        """Of three scrapes: seconds of processor, and megabytes; how many lines they answered."""
        scrapes, answers = [], []
        for _ in range(3):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                ours.sendall(
                    f"GET /metrics{query} HTTP/1.0\r\nAccept: {OPENMETRICS}\r\n\r\n".encode()
                )
                scrapes.append(measured(BIN / "kabpfctl", "metrics", "--http", stdin=theirs))
                theirs.close()
                answers.append(b"".join(iter(lambda ours=ours: ours.recv(65536), b"")))
        assert {scrape.status for scrape in scrapes} == {0}
        seconds, megabytes = (
            min(each) for each in zip(*((s[1], s[2]) for s in scrapes), strict=True)
        )
        return (
            seconds,
            megabytes,
            by_name(openmetrics(answers[-1].partition(b"\r\n\r\n")[2].decode())),
        )

    seconds, megabytes, found = least("")
    assert (seconds < 0.1, megabytes < 60) == (True, True), (seconds, megabytes)
    assert found["kabpf_connections_established_total", ("policy", "p0")] == 10_000
    seconds, megabytes, found = least("?sockets")
    assert (seconds < 0.3, megabytes < 60) == (True, True), (seconds, megabytes)
    assert found["kabpf_sockets", ("keepalive", "on"), ("policy", "p0")] == 10_000


def test_scraper_that_says_nothing_is_left_after_a_while(scrape):
    assert scrape(b"GET /metrics HTTP/1.1\r\n", then_close=False) == b""


def test_textfile_is_replaced_as_one(policy, kabpfctl, tmp_path):
    file = tmp_path / "kabpf.prom"
    file.symlink_to("/etc/passwd")
    before = Path("/etc/passwd").read_bytes()
    kabpfctl("metrics", "--textfile", file)
    assert not file.is_symlink()
    assert Path("/etc/passwd").read_bytes() == before
    assert ("kabpf_data_plane_active",) in by_name(prometheus(file.read_text()))
    assert [each.name for each in tmp_path.iterdir()] == ["kabpf.prom"]
