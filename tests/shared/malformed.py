"""Policy files that are wrong, and what is said of each."""

from __future__ import annotations

from kabpf.policy.presets import presets

POLICY_KEYS = "select, keepalive, mode, direction, destinations, loopback, existing, log, offered"
OPTIONS = (
    "idle, interval, probes, user_timeout, jitter, syn_retries, connect_timeout, preset, timeout"
)
KEEPALIVE = "off, on, or options (idle, interval, ...)"
SECONDS = "a time in seconds (60, 90s, 5m, 1h) or a range (30s..5m)"
TIMEOUT = "a time (30, 30s, 1500ms, 5m), a range (30s..2m), auto or off"
PROBES = "a number, 1 to 127, or a range (3..9)"
LIST = "a list such as [{unit: nginx.service}]"
NAME = "a unit's name with its type, as nginx.service"
NAMES = "a path of printable names without '.', '..' and empty ones"
NO_SELECT = "no select, expected a list of selectors or a file named after a unit"
LONG = "x" * 256
LAUGHS = """\
a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]
policies: *c
"""

# A file's text, and the message without the file's name, from the line number on.
SYNTAX = [
    ("keepalive: {idle: 60", "1: not YAML: did not find expected ',' or '}'"),
    ("keepalive: {idle: 60\n", "1: not YAML: did not find expected ',' or '}'"),
    ("policies: [", "1: not YAML: did not find expected node content"),
    ("keepalive: 'on", "1: not YAML: found unexpected end of stream"),
    ("keepalive: on: off", "1: not YAML: mapping values are not allowed in this context"),
    ("keepalive: on\n  idle: 5", "2: not YAML: mapping values are not allowed in this context"),
    ("keepalive:\n  - idle\n probes: 6", "3: not YAML: did not find expected key"),
    ("keepalive:\n\tidle: 5", "2: not YAML: found character that cannot start any token"),
    ("keepalive: @on", "1: not YAML: found character that cannot start any token"),
    ("keepalive: `on`", "1: not YAML: found character that cannot start any token"),
    ('keepalive: "\\q"', "1: not YAML: found unknown escape character"),
    ('keepalive: "\\ud800"', "1: not YAML: found invalid Unicode character escape code"),
    ("%FOO x\n---\nkeepalive: on", "1: not YAML: found unknown directive name"),
    ("keepalive: on\n---\nkeepalive: off", "2: a second document, expected one"),
    ("---\n---\n", "2: a second document, expected one"),
    ("keepalive: on\n...\nmore", "3: not YAML: did not find expected <document start>"),
    (b"\xff\xfek\x00e\x00", "1: not UTF-8, expected UTF-8 text"),
    (b"keepalive: on\n# caf\xe9\n", "2: not UTF-8, expected UTF-8 text"),
    (b"keepalive: on\nx: \xed\xa0\x80\n", "2: not UTF-8, expected UTF-8 text"),
    ("# é\nkeepalive: \x1b[31mon", "2: not YAML: control characters are not allowed"),
    ("keepalive: on\n\0", "2: not YAML: control characters are not allowed"),
    ("keepalive: on # \x9b31m", "1: not YAML: control characters are not allowed"),
]
SCALARS = "expected one line of at most 4095 printable characters"
FEATURES = [
    (LAUGHS, "1: a: &a: an anchor, expected the value alone"),
    ("keepalive: &x on", "1: keepalive: &x: an anchor, expected the value alone"),
    ("&x keepalive: on", "1: &x: an anchor, expected the value alone"),
    ("policies:\n  a: *b", "2: policies.a: *b: an alias, expected the value itself"),
    ("*b : on", "1: *b: an alias, expected the value itself"),
    ("keepalive: !!bool on", "1: keepalive: !!bool: a tag, expected the value alone"),
    ("keepalive: !on on", "1: keepalive: !on: a tag, expected the value alone"),
    ("keepalive: ! on", "1: keepalive: !: a tag, expected the value alone"),
    ("keepalive: !<x%1b[31m> on", "1: keepalive: x\\x1b[31m: a tag, expected the value alone"),
    (
        "!!python/object/apply:os.system [id]",
        "1: !!python/object/apply:os.system: a tag, expected the value alone",
    ),
    (
        "defaults:\n  idle: !!python/name:os.system",
        "2: defaults.idle: !!python/name:os.system: a tag, expected the value alone",
    ),
    (
        "keepalive: {<<: {idle: 5}}",
        f"1: keepalive.<<: unknown key, expected one of {OPTIONS}",
    ),
    ("a: " + "[" * 8, "1: a[0][0][0][0][0][0][0]: nested too deep, expected at most 8 levels"),
    ("[" * 60_000, "1: [0][0][0][0][0][0][0][0]: nested too deep, expected at most 8 levels"),
    ("? " * 9 + "x", "1: nested too deep, expected at most 8 levels"),
    ('keepalive: "\\e[31m"', f"1: keepalive: {SCALARS}"),
    ("keepalive: |\n  on\n", f"1: keepalive: {SCALARS}"),
    ('"a\\nb": on', f"1: {SCALARS}"),
    ("keepalive: " + "x" * 4096, f"1: keepalive: {SCALARS}"),
]
KEYS = [
    ("keepalive: on\nkeepalive: off", "2: keepalive: given twice, first in line 1"),
    (
        "policies:\n  a: {keepalive: on}\n  b: {keepalive: on}\n  a: {keepalive: off}",
        "4: policies.a: given twice, first in line 2",
    ),
    ("keepalive:\n  idle: 5\n  idle: 5", "3: keepalive.idle: given twice, first in line 2"),
    (
        "select: [{unit: a.service, unit: b.service}]",
        "1: select[0].unit: given twice, first in line 1",
    ),
    ("defalts: {}", "1: defalts: unknown key, did you mean defaults?"),
    ("Keepalive: on", "1: Keepalive: unknown key, did you mean keepalive?"),
    (
        "app: fill",
        "1: app: unknown key, expected one of defaults, policies, users, containers,"
        f" {POLICY_KEYS}",
    ),
    (
        "'': x",
        f"1: '': unknown key, expected one of defaults, policies, users, containers, {POLICY_KEYS}",
    ),
    ("policies: {a: {selct: []}}", "1: policies.a.selct: unknown key, did you mean select?"),
    (
        "policies: {a: {defaults: {}}}",
        f"1: policies.a.defaults: unknown key, expected one of {POLICY_KEYS}",
    ),
    ("keepalive:\n  idel: 5", "2: keepalive.idel: unknown key, did you mean idle?"),
    (
        "keepalive: {user-timeout: 5}",
        "1: keepalive.user-timeout: unknown key, did you mean user_timeout?",
    ),
    ("keepalive: {probe: 5}", "1: keepalive.probe: unknown key, did you mean probes?"),
    ("keepalive: {intervall: 5}", "1: keepalive.intervall: unknown key, did you mean interval?"),
    ("defaults: {idle:5}", "1: defaults.idle:5: unknown key, did you mean idle?"),
    ("[a]: on", "1: a list as a key, expected a word"),
    ("policies: {{a: b}: on}", "1: policies: a mapping as a key, expected a word"),
    (
        "defaults: {}\nkeepalive: on",
        "1: defaults: beside keepalive, expected a file of its own",
    ),
    (
        "keepalive: on\npolicies: {}",
        "2: policies: beside keepalive, expected a file of its own",
    ),
]
TYPES = [
    ("app", f"1: app, expected keys (defaults, policies, users, containers, {POLICY_KEYS})"),
    ("- app", f"1: a list, expected keys (defaults, policies, users, containers, {POLICY_KEYS})"),
    ("~", f"1: ~, expected keys (defaults, policies, users, containers, {POLICY_KEYS})"),
    ("defaults:", f"1: defaults: nothing, expected keys ({OPTIONS})"),
    ("defaults: []", f"1: defaults: a list, expected keys ({OPTIONS})"),
    ("policies:", "1: policies: nothing, expected names with their policies"),
    ("policies: [a]", "1: policies: a list, expected names with their policies"),
    ("policies: {a: on}", f"1: policies.a: on, expected keys ({POLICY_KEYS})"),
    ("policies: {a: }", f"1: policies.a: nothing, expected keys ({POLICY_KEYS})"),
    ("keepalive:", f"1: keepalive: nothing, expected {KEEPALIVE}"),
    ("keepalive: [idle]", f"1: keepalive: a list, expected {KEEPALIVE}"),
    ("keepalive: 60s", f"1: keepalive: 60s, expected {KEEPALIVE}"),
    ("keepalive: {idle}", f"1: keepalive.idle: nothing, expected {SECONDS}"),
    ("keepalive: {idle: [5]}", f"1: keepalive.idle: a list, expected {SECONDS}"),
    ("keepalive: {interval: {s: 5}}", f"1: keepalive.interval: a mapping, expected {SECONDS}"),
    ("keepalive: {interval: ''}", f"1: keepalive.interval: nothing, expected {SECONDS}"),
    ("keepalive: {probes: []}", f"1: keepalive.probes: a list, expected {PROBES}"),
    ("keepalive: {probes: six}", f"1: keepalive.probes: six, expected {PROBES}"),
    ("keepalive: {user_timeout: {}}", f"1: keepalive.user_timeout: a mapping, expected {TIMEOUT}"),
]
CONTAINER = "name, image, label, annotation, engine"
POD = "namespace, name, label, container"
SELECTORS = [
    ("a.service", f"1: select: a.service, expected {LIST}"),
    ("", f"1: select: nothing, expected {LIST}"),
    ("[]", f"1: select: nothing, expected {LIST}"),
    ("{unit: a.service}", f"1: select: a mapping, expected {LIST}"),
    (
        "[a.service]",
        "1: select[0]: a.service, expected keys (unit, user_unit, cgroup, container, pod)",
    ),
    ("[[a]]", "1: select[0]: a list, expected keys (unit, user_unit, cgroup, container, pod)"),
    ("[{}]", "1: select[0]: 0 keys, expected one: unit, user_unit, cgroup, container or pod"),
    (
        "\n  - unit: a.service\n  - unit: b.service\n    cgroup: /b",
        "3: select[1]: 2 keys, expected one: unit, user_unit, cgroup, container or pod",
    ),
    (
        "[{foo: a}]",
        "1: select[0].foo: unknown key, expected one of unit, user_unit, cgroup, container, pod",
    ),
    ("[{container: web}]", f"1: select[0].container: web, expected keys ({CONTAINER})"),
    ("[{container: }]", f"1: select[0].container: nothing, expected keys ({CONTAINER})"),
    ("[{container: {}}]", f"1: select[0].container: no keys, expected at least one of {CONTAINER}"),
    ("[{pod: {}}]", f"1: select[0].pod: no keys, expected at least one of {POD}"),
    ("[{pod: {nam: a}}]", "1: select[0].pod.nam: unknown key, did you mean name?"),
    (
        "[{pod: {image: a}}]",
        f"1: select[0].pod.image: unknown key, expected one of {POD}",
    ),
    (
        "[{container: {pod: a}}]",
        f"1: select[0].container.pod: unknown key, expected one of {CONTAINER}",
    ),
    (
        "[{container: {name: }}]",
        "1: select[0].container.name: nothing, expected a text or a glob",
    ),
    (
        "[{container: {image: [a, b]}}]",
        "1: select[0].container.image: a list, expected a text or a glob",
    ),
    (
        "[{container: {engine: pdman}}]",
        "1: select[0].container.engine: pdman, expected podman, docker, containerd or crio, or a"
        " glob",
    ),
    (
        "[{container: {label: web}}]",
        "1: select[0].container.label: web, expected labels with their values, as {app: web}",
    ),
    (
        "[{container: {annotation: {}}}]",
        "1: select[0].container.annotation: no annotations, expected at least one, as {app: web}",
    ),
    (
        "[{pod: {label: {app: }}}]",
        "1: select[0].pod.label.app: nothing, expected a text or a glob",
    ),
    (
        "[{pod: {label: {'': web}}}]",
        "1: select[0].pod.label.'': no name, expected that of labels",
    ),
    (
        "\n  - pod:\n      label:\n        app: [web]",
        "4: select[0].pod.label.app: a list, expected a text or a glob",
    ),
    ("[{user_unit: nginx}]", f"1: select[0].user_unit: nginx, expected {NAME}"),
    ("[{unit: }]", "1: select[0].unit: nothing, expected a unit's name, as nginx.service"),
    (
        "[{cgroup: [/a]}]",
        "1: select[0].cgroup: a list, expected a cgroup path, as /system.slice/nginx.service",
    ),
]
NEVER = "for no probes at all write keepalive: off with mode: override or enforce"
VALUES = [
    ("keepalive: {idle: 0}", "1: keepalive.idle: 0 is not in 1 to 32767 seconds"),
    (
        "keepalive: {idle: 32768}",
        f"1: keepalive.idle: 32768 is not in 1 to 32767 seconds; {NEVER}",
    ),
    ("keepalive: {idle: 10h}", f"1: keepalive.idle: 10h is not in 1 to 32767 seconds; {NEVER}"),
    ("keepalive: {interval: 0s}", "1: keepalive.interval: 0s is not in 1 to 32767 seconds"),
    ("defaults: {interval: 1d}", "1: defaults.interval: 1d is not in 1 to 32767 seconds"),
    ("keepalive: {probes: 0}", "1: keepalive.probes: 0 is not in 1 to 127"),
    ("keepalive: {probes: 128}", "1: keepalive.probes: 128 is not in 1 to 127"),
    (
        "keepalive: {user_timeout: 0}",
        "1: keepalive.user_timeout: 0 is not in 1 to 2147483647 ms",
    ),
    (
        "keepalive: {user_timeout: 2147483648ms}",
        "1: keepalive.user_timeout: 2147483648ms is not in 1 to 2147483647 ms",
    ),
    (
        "keepalive: {user_timeout: 2147484}",
        "1: keepalive.user_timeout: 2147484 is not in 1 to 2147483647 ms",
    ),
    ("keepalive: {idle: 1000ms}", f"1: keepalive.idle: 1000ms, expected {SECONDS}"),
    ("keepalive: {idle: 5 m}", f"1: keepalive.idle: 5 m, expected {SECONDS}"),
    ("keepalive: {idle: 5M}", f"1: keepalive.idle: 5M, expected {SECONDS}"),
    ("keepalive: {idle: 1m30s}", f"1: keepalive.idle: 1m30s, expected {SECONDS}"),
    ("keepalive: {idle: 5min}", f"1: keepalive.idle: 5min, expected {SECONDS}"),
    ("keepalive: {idle: 1.5}", f"1: keepalive.idle: 1.5, expected {SECONDS}"),
    ("keepalive: {idle: -5}", f"1: keepalive.idle: -5, expected {SECONDS}"),
    ("keepalive: {idle: +5}", f"1: keepalive.idle: +5, expected {SECONDS}"),
    ("keepalive: {idle: ٣}", f"1: keepalive.idle: ٣, expected {SECONDS}"),
    ("keepalive: {idle: off}", f"1: keepalive.idle: off, expected {SECONDS}"),
    ("keepalive: {idle: auto}", f"1: keepalive.idle: auto, expected {SECONDS}"),
    ("keepalive: {idle: 30s..5m..1h}", f"1: keepalive.idle: 30s..5m..1h, expected {SECONDS}"),
    ("keepalive: {probes: 6s}", f"1: keepalive.probes: 6s, expected {PROBES}"),
    ("keepalive: {user_timeout: on}", f"1: keepalive.user_timeout: on, expected {TIMEOUT}"),
    ("keepalive: {user_timeout: Auto}", f"1: keepalive.user_timeout: Auto, expected {TIMEOUT}"),
    ("keepalive: {user_timeout: OFF}", f"1: keepalive.user_timeout: OFF, expected {TIMEOUT}"),
]
RANGES = [
    (
        "keepalive: {idle: 5m..30s}",
        "1: keepalive.idle: 5m..30s, expected the lower bound first (30s..5m)",
    ),
    (
        "keepalive: {probes: 9..3}",
        "1: keepalive.probes: 9..3, expected the lower bound first (3..9)",
    ),
    ("keepalive: {idle: 0..5m}", "1: keepalive.idle: 0 is not in 1 to 32767 seconds"),
    ("keepalive: {interval: 5m..10h}", "1: keepalive.interval: 10h is not in 1 to 32767 seconds"),
    ("keepalive: {probes: 3..128}", "1: keepalive.probes: 128 is not in 1 to 127"),
    (
        "keepalive: {user_timeout: 0..1s}",
        "1: keepalive.user_timeout: 0 is not in 1 to 2147483647 ms",
    ),
    (
        "keepalive: {idle: 60s..60s}",
        "1: keepalive.idle: 60s..60s is a range of one value, expected 60s,"
        " in a policy file with mode: enforce",
    ),
    (
        "defaults: {interval: 1m..60}",
        "1: defaults.interval: 1m..60 is a range of one value, expected 1m,"
        " in a policy file with mode: enforce",
    ),
    (
        "keepalive: {idle: 1..10h}",
        f"1: keepalive.idle: 10h is not in 1 to 32767 seconds; {NEVER}",
    ),
    ("keepalive: {idle: 30s..}", f"1: keepalive.idle: 30s.., expected {SECONDS}"),
    ("keepalive: {idle: ..5m}", f"1: keepalive.idle: ..5m, expected {SECONDS}"),
    ("keepalive: {idle: ..}", f"1: keepalive.idle: .., expected {SECONDS}"),
    ("keepalive: {idle: 30s - 5m}", f"1: keepalive.idle: 30s - 5m, expected {SECONDS}"),
    ("keepalive: {idle: 30s .. 5m}", f"1: keepalive.idle: 30s .. 5m, expected {SECONDS}"),
    ("keepalive: {idle: auto..5m}", f"1: keepalive.idle: auto..5m, expected {SECONDS}"),
    ("keepalive: {probes: 3...9}", f"1: keepalive.probes: 3...9, expected {PROBES}"),
    (
        "keepalive: {user_timeout: 30s..auto}",
        f"1: keepalive.user_timeout: 30s..auto, expected {TIMEOUT}",
    ),
    (
        "keepalive: {user_timeout: off..2m}",
        f"1: keepalive.user_timeout: off..2m, expected {TIMEOUT}",
    ),
]
JITTER = "a percentage, 0% to 50%"
CONNECT = "a time of at least a second (10, 10s, 2500ms, 1m) or off"
IDLE_TIMEOUT = "the idle timeout of a middlebox in seconds (350, 350s, 4m, 1h)"
PRESETS = ", ".join(presets())
MORE_OPTIONS = [
    ("keepalive: {syn_retries: 0}", "1: keepalive.syn_retries: 0 is not in 1 to 127"),
    ("keepalive: {syn_retries: 128}", "1: keepalive.syn_retries: 128 is not in 1 to 127"),
    (
        "keepalive: {syn_retries: 3..4}",
        "1: keepalive.syn_retries: 3..4, expected a number, 1 to 127",
    ),
    (
        "defaults: {syn_retries: }",
        "1: defaults.syn_retries: nothing, expected a number, 1 to 127",
    ),
    (
        "keepalive: {connect_timeout: 500ms}",
        "1: keepalive.connect_timeout: 500ms is not in 1000 to 2147483647 ms",
    ),
    (
        "keepalive: {connect_timeout: 5..10}",
        f"1: keepalive.connect_timeout: 5..10, expected {CONNECT}",
    ),
    (
        "keepalive: {connect_timeout: auto}",
        f"1: keepalive.connect_timeout: auto, expected {CONNECT}",
    ),
    ("keepalive: {timeout: 11s}", "1: keepalive.timeout: 11s is not in 12 to 432000 seconds"),
    ("keepalive: {timeout: 6d}", "1: keepalive.timeout: 6d is not in 12 to 432000 seconds"),
    ("keepalive: {timeout: 350ms}", f"1: keepalive.timeout: 350ms, expected {IDLE_TIMEOUT}"),
    ("defaults: {timeout: off}", f"1: defaults.timeout: off, expected {IDLE_TIMEOUT}"),
    ("keepalive: {timeout: 1m..2m}", f"1: keepalive.timeout: 1m..2m, expected {IDLE_TIMEOUT}"),
    ("keepalive: {timeout: [350]}", f"1: keepalive.timeout: a list, expected {IDLE_TIMEOUT}"),
    (
        "keepalive: {preset: aws-nlb, timeout: 350}",
        "1: keepalive.timeout: beside preset, expected one of the two",
    ),
    (
        "defaults:\n  timeout: 350\n  preset: aws-nlb",
        "2: defaults.timeout: beside preset, expected one of the two",
    ),
    (
        "keepalive: {preset: aws-alb}",
        "1: keepalive.preset: aws-alb closes a connection after 60 s without data, and keepalive"
        " sends none (Elastic Load Balancing, Application Load Balancers: connection idle timeout);"
        " let the application send some in time",
    ),
    ("keepalive: {jitter: 10}", f"1: keepalive.jitter: 10, expected {JITTER}"),
    ("keepalive: {jitter: 10%%}", f"1: keepalive.jitter: 10%%, expected {JITTER}"),
    ("keepalive: {jitter: 1.5%}", f"1: keepalive.jitter: 1.5%, expected {JITTER}"),
    ("keepalive: {jitter: -5%}", f"1: keepalive.jitter: -5%, expected {JITTER}"),
    ("keepalive: {jitter: 10 %}", f"1: keepalive.jitter: 10 %, expected {JITTER}"),
    ("keepalive: {jitter: 51%}", "1: keepalive.jitter: 51% is not in 0% to 50%"),
    ("keepalive: {jitter: 5%..10%}", f"1: keepalive.jitter: 5%..10%, expected {JITTER}"),
    ("keepalive: {preset: aws-nbl}", "1: keepalive.preset: aws-nbl, did you mean aws-nlb?"),
    ("keepalive: {preset: f5}", f"1: keepalive.preset: f5, expected one of {PRESETS}"),
    ("defaults: {preset: }", "1: defaults.preset: nothing, expected the name of a preset"),
    ("keepalive: {preset: [ipvs]}", "1: keepalive.preset: a list, expected the name of a preset"),
]
WORDS_OF_A_POLICY = [
    ("mode: full", "1: mode: full, expected fill, override or enforce"),
    ("mode: Fill", "1: mode: Fill, expected fill, override or enforce"),
    ("mode: ", "1: mode: nothing, expected fill, override or enforce"),
    ("mode: [fill]", "1: mode: a list, expected fill, override or enforce"),
    ("direction: outgoing", "1: direction: outgoing, expected both, in or out"),
    ("direction: {in: on}", "1: direction: a mapping, expected both, in or out"),
    ("loopback: no", "1: loopback: no, expected true or false"),
    ("loopback: off", "1: loopback: off, expected true or false"),
    ("loopback: True", "1: loopback: True, expected true or false"),
    ("existing: 0", "1: existing: 0, expected true or false"),
    ("existing: ~", "1: existing: ~, expected true or false"),
    ("log: true", "1: log: true, expected off or sockets"),
    ("mod: fill", "1: mod: unknown key, did you mean mode?"),
    ("destination: []", "1: destination: unknown key, did you mean destinations?"),
]
NETWORK = "a network or an address, as 10.0.0.0/8 or 2001:db8::1"
TO = [
    ("any", f"any, expected {NETWORK}"),
    ("''", f"nothing, expected {NETWORK}"),
    ("[10.0.0.0/8]", f"a list, expected {NETWORK}"),
    ("10.0.0.0/33", f"10.0.0.0/33, expected {NETWORK}"),
    ("10.0.0/8", f"10.0.0/8, expected {NETWORK}"),
    ("10.0.0.256", f"10.0.0.256, expected {NETWORK}"),
    ("010.0.0.1", f"010.0.0.1, expected {NETWORK}"),
    ("10.0.0.0/255.0.0.0", f"10.0.0.0/255.0.0.0, expected {NETWORK}"),
    ("10.0.0.0/", f"10.0.0.0/, expected {NETWORK}"),
    ("10.0.0.0/+8", f"10.0.0.0/+8, expected {NETWORK}"),
    ("10.0.0.1:5432", f"10.0.0.1:5432, expected {NETWORK}"),
    ("'fe80::1%eth0'", f"fe80::1%eth0, expected {NETWORK}"),
    ("'[::1]'", f"[::1], expected {NETWORK}"),
    ("'::/129'", f"::/129, expected {NETWORK}"),
    ("example.com", f"example.com, expected {NETWORK}"),
    ("10.1.2.3/8", "10.1.2.3/8 has bits set beyond its prefix, expected 10.0.0.0/8"),
    ("10.0.0.1/0", "10.0.0.1/0 has bits set beyond its prefix, expected 0.0.0.0/0"),
    ("'2001:db8::1/32'", "2001:db8::1/32 has bits set beyond its prefix, expected 2001:db8::/32"),
    (
        "'::ffff:10.0.0.1/104'",
        "::ffff:10.0.0.1/104 has bits set beyond its prefix, expected 10.0.0.0/8",
    ),
]
PORT = "a port, 1 to 65535"
PORTS = [
    ("5432", "ports: 5432, expected a list of ports, as [5432]"),
    ("", "ports: nothing, expected a list of ports, as [5432]"),
    ("[]", "ports: nothing, expected a list of ports, as [5432]"),
    ("{5432: }", "ports: a mapping, expected a list of ports, as [5432]"),
    ("[postgresql]", f"ports[0]: postgresql, expected {PORT}"),
    ("[80, 80-90]", f"ports[1]: 80-90, expected {PORT}"),
    ("[[80]]", f"ports[0]: a list, expected {PORT}"),
    ("[0]", "ports[0]: 0 is not in 1 to 65535"),
    ("[80, 65536]", "ports[1]: 65536 is not in 1 to 65535"),
    ("[80, 443, 080]", "ports[2]: 080 is given twice, expected each port once"),
]
DESTINATION_KEYS = f"to, ports, keepalive, {OPTIONS}"
DESTINATIONS = [
    ("", "1: destinations: nothing, expected a list such as [{to: 10.0.0.0/8, keepalive: off}]"),
    (
        "{to: 10.0.0.0/8}",
        "1: destinations: a mapping, expected a list such as [{to: 10.0.0.0/8, keepalive: off}]",
    ),
    ("[10.0.0.0/8]", f"1: destinations[0]: 10.0.0.0/8, expected keys ({DESTINATION_KEYS})"),
    ("[{keepalive: off}]", f"1: destinations[0]: no to, expected {NETWORK}"),
    ("[{to: '::', port: [1]}]", "1: destinations[0].port: unknown key, did you mean ports?"),
    (
        "[{to: fd00::1, mode: fill}]",
        f"1: destinations[0].mode: unknown key, expected one of {DESTINATION_KEYS}",
    ),
    (
        "\n  - {to: fd00::1, idle: 5}\n  - {to: fd00::2, ports: [80]}",
        "3: destinations[1]: no options, expected keepalive: off, or options (idle, interval, ...)",
    ),
    (
        "[{to: fd00::1, keepalive: maybe}]",
        "1: destinations[0].keepalive: maybe, expected on or off",
    ),
    (
        "[{to: fd00::1, keepalive: {idle: 5}}]",
        "1: destinations[0].keepalive: a mapping, expected on or off",
    ),
    (
        "[{to: fd00::1, keepalive: off, idle: 5}]",
        "1: destinations[0].idle: beside keepalive, expected one of the two",
    ),
    ("[{to: fd00::1, idle: 0}]", "1: destinations[0].idle: 0 is not in 1 to 32767 seconds"),
    (
        "[{to: 10.0.0.0/8, idle: 5, user_timeout: auto}]",
        "1: destinations[0].user_timeout: auto without interval, probes in policy app.service to"
        " 10.0.0.0/8 or in defaults, expected all of idle, interval and probes",
    ),
    *((f"[{{to: {to}, idle: 5}}]", f"1: destinations[0].to: {problem}") for to, problem in TO),
    *(
        (f"[{{to: fd00::1, ports: {ports}, idle: 5}}]", f"1: destinations[0].{problem}")
        for ports, problem in PORTS
    ),
]
YAML_1_1 = [
    ("keepalive: yes", f"1: keepalive: yes, expected {KEEPALIVE}"),
    ("keepalive: no", f"1: keepalive: no, expected {KEEPALIVE}"),
    ("keepalive: true", f"1: keepalive: true, expected {KEEPALIVE}"),
    ("keepalive: On", f"1: keepalive: On, expected {KEEPALIVE}"),
    ("keepalive: null", f"1: keepalive: null, expected {KEEPALIVE}"),
    ("keepalive: {idle: 1:30}", f"1: keepalive.idle: 1:30, expected {SECONDS}"),
    ("keepalive: {idle: 0x10}", f"1: keepalive.idle: 0x10, expected {SECONDS}"),
    ("keepalive: {idle: 0b11}", f"1: keepalive.idle: 0b11, expected {SECONDS}"),
    ("keepalive: {idle: 1_000}", f"1: keepalive.idle: 1_000, expected {SECONDS}"),
    ("keepalive: {idle: 1e3}", f"1: keepalive.idle: 1e3, expected {SECONDS}"),
    ("keepalive: {idle: ~}", f"1: keepalive.idle: ~, expected {SECONDS}"),
    ("keepalive: {idle: .inf}", f"1: keepalive.idle: .inf, expected {SECONDS}"),
    ("keepalive: {probes: 0x6}", f"1: keepalive.probes: 0x6, expected {PROBES}"),
    ("keepalive: {probes: 1_0}", f"1: keepalive.probes: 1_0, expected {PROBES}"),
    ("keepalive: {probes: no}", f"1: keepalive.probes: no, expected {PROBES}"),
    ("keepalive: {user_timeout: no}", f"1: keepalive.user_timeout: no, expected {TIMEOUT}"),
    ("keepalive: {user_timeout: 1:30}", f"1: keepalive.user_timeout: 1:30, expected {TIMEOUT}"),
    ("keepalive: {user_timeout: .NAN}", f"1: keepalive.user_timeout: .NAN, expected {TIMEOUT}"),
]
UNITS = [
    (f"[{{unit: '{unit}'}}]", f"1: select[0].unit: {unit}, expected {NAME}")
    for unit in (
        "nginx", "nginx.conf", ".service", "@.service", "a b.service", "a/b.service", "a.*",
        "é.service", "a,b.service", f"{LONG}.service",
    )
]  # fmt: skip
PATHS = [
    ("a", "a path that starts with / at the cgroup2 root"),
    ("a.slice/b", "a path that starts with / at the cgroup2 root"),
    ("/a/../b", NAMES),
    ("/..", NAMES),
    ("/a/./b", NAMES),
    ("//a", NAMES),
    ("/a//b", NAMES),
    ("/a//", NAMES),
    ("//", NAMES),
    (f"/a/{LONG}", "names of at most 255 bytes"),
    ("/" + "é" * 128, "names of at most 255 bytes"),
    ("/a**", "** between slashes, alone"),
    ("/a/b**c/d", "** between slashes, alone"),
    ("/***", "** between slashes, alone"),
]
CGROUPS = [
    (f"[{{cgroup: '{path}'}}]", f"1: select[0].cgroup: {path}, expected {problem}")
    for path, problem in PATHS
]
POLICIES = [
    ("select: [{unit: a.service}]", f"1: no keepalive, expected {KEEPALIVE}"),
    (
        "policies:\n  a:\n    select: [{unit: a.service}]",
        f"2: policies.a: no keepalive, expected {KEEPALIVE}",
    ),
    ("policies: {a: {keepalive: on}}", f"1: policies.a: {NO_SELECT} (nginx.service.yaml)"),
    (
        "policies: {'': {keepalive: on}}",
        "1: policies.'': '', expected a name of 1 to 255 printable bytes",
    ),
    (
        f"policies: {{{LONG}: {{keepalive: on}}}}",
        f"1: policies.{LONG}: '{LONG}', expected a name of 1 to 255 printable bytes",
    ),
    (
        "policies: {%s: {keepalive: on}}" % ("é" * 128),
        f"1: policies.{'é' * 128}: '{'é' * 128}', expected a name of 1 to 255 printable bytes",
    ),
    (
        "policies:\n  a:\n    select:\n      - cgroup: /a\n      - cgroup: a\n    keepalive: on",
        "5: policies.a.select[1].cgroup: a, expected a path that starts with / at the cgroup2 root",
    ),
    (
        "keepalive: {user_timeout: auto}",
        "1: keepalive.user_timeout: auto without idle, interval, probes in policy app.service or in"
        " defaults, expected all of idle, interval and probes",
    ),
    (
        "keepalive:\n  idle: 5m\n  probes: 6\n  user_timeout: auto",
        "4: keepalive.user_timeout: auto without interval in policy app.service or in defaults,"
        " expected all of idle, interval and probes",
    ),
    (
        "defaults: {user_timeout: auto}\n"
        "policies: {a: {select: [{cgroup: /a}], keepalive: {idle: 5, interval: 5}}}",
        "1: defaults.user_timeout: auto without probes in policy a or in defaults,"
        " expected all of idle, interval and probes",
    ),
    (
        "keepalive: {idle: 32767, interval: 32767, probes: 127, user_timeout: auto}",
        "1: keepalive.user_timeout: auto makes 4194176000 ms in policy app.service, expected at"
        " most 2147483647",
    ),
]
MALFORMED = [
    *(*SYNTAX, *FEATURES, *KEYS, *TYPES, *VALUES, *RANGES, *MORE_OPTIONS, *YAML_1_1, *POLICIES),
    *((f"keepalive: on\n{text}", f"2{message[1:]}") for text, message in WORDS_OF_A_POLICY),
    *((f"destinations: {text}\nkeepalive: on", message) for text, message in DESTINATIONS),
]
