"""A real Prometheus server that scrapes kabpf, over HTTP and through node_exporter."""

import itertools
import json
import re
import socket
import urllib.parse
from pathlib import Path

import pytest
from harness import wait_until
from machine import Inside

pytestmark = pytest.mark.parametrize("layers", ["monitoring"], indirect=True)

MONITORING = Path(__file__).parents[2] / "monitoring"
CONFIGURATION = """
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [/etc/prometheus/kabpf.rules.yaml]
scrape_configs:
  - job_name: kabpf
    params: {sockets: [""]}
    static_configs: [{targets: ["127.0.0.1:9843"]}]
  - job_name: node
    static_configs: [{targets: ["127.0.0.1:9100"]}]
"""
POLICY = """
select: [{unit: app.service}]
keepalive: {idle: 1s, interval: 1s, probes: 1}
"""
PORT = "[Socket]\nListenStream=127.0.0.1:9843\n"
SOON = "[Timer]\nOnUnitActiveSec=\nOnActiveSec=0\nOnUnitActiveSec=1s\nAccuracySec=1ms\n"
NEIGHBOUR = (
    "ip netns add far && ip link add near type veth peer name far netns far"
    " && ip addr add 10.9.0.1/24 dev near && ip link set near up"
    " && ip -n far addr add 10.9.0.2/24 dev far && ip -n far link set far up"
)
GET = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())
"""


@pytest.fixture
def server(machine):
    """Starts the server and what it scrapes; a function that asks it for the value of a query."""
    machine.write("/etc/systemd/system/kabpf-metrics.socket.d/port.conf", PORT)
    machine.write("/etc/systemd/system/kabpf-textfile.timer.d/soon.conf", SOON)
    machine.write("/etc/prometheus/prometheus.yml", CONFIGURATION)
    for name in ("kabpf.rules.yaml", "kabpf.rules.test.yaml"):
        machine.write(f"/etc/prometheus/{name}", (MONITORING / name).read_text())
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "kabpf.service")
    units = ("kabpf-metrics.socket", "kabpf-textfile.timer", "prometheus-node-exporter.service")
    machine.run("systemctl", "start", *units)
    machine.run("systemctl", "start", "prometheus.service")

    def query(expression):
        """The value of each series, by its labels without instance."""
        quoted = urllib.parse.quote(expression)
        answer = ask(machine, f"/api/v1/query?query={quoted}")
        return {
            frozenset((k, v) for k, v in each["metric"].items() if k != "instance"): float(
                each["value"][1]
            )
            for each in answer["result"]
        }

    wait_until(lambda: up(machine), "both jobs to be up", seconds=60)
    return query


def up(machine):
    done = machine.attempt("python3", "-c", GET, "http://127.0.0.1:9090/api/v1/query?query=up")
    if done.returncode:
        return False
    return [each["value"][1] for each in json.loads(done.stdout)["data"]["result"]] == ["1", "1"]


def ask(machine, path):
    answer = json.loads(machine.run("python3", "-c", GET, f"http://127.0.0.1:9090{path}"))
    assert answer["status"] == "success"
    return answer["data"]


def labels(**pairs):
    return frozenset(pairs.items())


def test_server_sees_what_happens_to_services(machine, service, server):
    """Both ways: connections that were established, and one whose peer died."""
    machine.run("sh", "-c", NEIGHBOUR)
    machine.drop_in("app.service.yaml", POLICY)
    far = Inside(machine, "ip", "netns", "exec", "far")
    number = far.open_socket(socket.AF_INET)
    far.listen(number, ["10.9.0.2", 9000])
    app = service("app.service")
    connections = [app.connection(["10.9.0.2", 9000]) for _ in range(3)]
    machine.run("ip", "link", "set", "near", "down")
    assert app.receive(connections[0], 30) == "ETIMEDOUT"
    policy = "app.service"
    for job in ("kabpf", "node"):
        expected = {
            'kabpf_connections_established_total{job="%s"}': (labels(policy=policy), 3),
            'kabpf_connections_timed_out_total{job="%s", reason="keepalive"}': (
                labels(policy=policy, reason="keepalive"),
                3,
            ),
            'kabpf_cgroups{job="%s"}': (labels(policy=policy), 1),
        }
        for expression, (which, value) in expected.items():

            def seen(expression=expression % job, which=which, value=value):
                found = {frozenset(p for p in k if p[0] not in ("job", "__name__")): v
                         for k, v in server(expression).items()}  # fmt: skip
                return found.get(which) == value

            wait_until(seen, expression % job, seconds=30)
    app.end()
    far.end()


def test_queries_of_the_dashboard_and_rules_are_evaluated(machine, service, server):
    """None is wrong, and each shows something where everything happens; no rule is unhealthy."""
    machine.drop_in("app.service.yaml", POLICY)
    app = service("app.service")
    app.pair()
    dashboard = json.loads((MONITORING / "kabpf.dashboard.json").read_text())
    values = {"$instance": ".*", "$policy": ".*", "$__rate_interval": "30s"}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 12
    for expression in expressions:
        filled = re.sub(r"\$\w+", lambda name: values[name[0]], expression)
        # There are no series of what the kernel refused, and of connections without keepalive,
        # where there are none.
        if "failures" in filled or "without_keepalive" in filled:
            server(filled)
        else:
            wait_until(lambda filled=filled: server(filled), filled, seconds=30)
    groups = ask(machine, "/api/v1/rules")["groups"]
    rules = [*itertools.chain.from_iterable(group["rules"] for group in groups)]
    assert len(rules) == 9
    wait_until(
        lambda: (
            {
                rule["health"]
                for group in ask(machine, "/api/v1/rules")["groups"]
                for rule in group["rules"]
            }
            == {"ok"}
        ),
        "every rule to be evaluated",
        seconds=30,
    )
    app.end()


def test_promtool_finds_nothing_wrong(machine):
    """In the metrics' names, and in the rules; each alert comes when it should and only then."""
    for name in ("kabpf.rules.yaml", "kabpf.rules.test.yaml"):
        machine.write(f"/etc/prometheus/{name}", (MONITORING / name).read_text())
    machine.run("sh", "-c", "kabpfctl metrics --sockets | promtool check metrics")
    machine.run("promtool", "check", "rules", "/etc/prometheus/kabpf.rules.yaml")
    machine.run("promtool", "test", "rules", "/etc/prometheus/kabpf.rules.test.yaml")


def test_scrape_is_hardened(machine):
    """`systemd-analyze security` gives the units of metrics an exposure of at most 1.5."""
    command = ("systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=15")
    for unit in ("kabpf-metrics@.service", "kabpf-textfile.service"):
        done = machine.attempt(*command, unit)
        assert done.returncode == 0, done.stdout + done.stderr


def test_scrapers_at_their_worst_delay_no_apply(machine):
    """A thousand come at once and say nothing; strangers may not connect."""
    machine.run("systemctl", "start", "kabpf-metrics.socket")
    silent = machine.start(
        "python3", "-c",
        "import socket, sys\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(1000)]\n"
        "for one in held:\n"
        "    one.setblocking(False)\n"
        "    try: one.connect('/run/kabpf/metrics.socket')\n"
        "    except OSError: pass\n"
        "print('connected', flush=True)\n"
        "sys.stdin.read()",
        stdin=-1, stdout=-1,
    )  # fmt: skip
    with silent:
        assert silent.stdout.readline() == "connected\n"
        machine.drop_in("app.service.yaml", POLICY)
        assert (
            len(
                machine.run(
                    "systemctl", "list-units", "--no-legend", "kabpf-metrics@*"
                ).splitlines()
            )
            <= 4
        )
        silent.stdin.close()
    stranger = machine.attempt(
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
        "python3", "-c",
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/kabpf/metrics.socket')",
    )  # fmt: skip
    assert "PermissionError" in stranger.stderr
