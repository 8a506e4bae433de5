"""The language of policy files: from the text of files to policies.

A file holds either `defaults` and `policies`, or one policy (`select`, `keepalive` and so on) that
takes its name, and where `select` is missing its unit, from the file's name. What commands write
for one cgroup into /run has two keys more, which say with which cgroup it ends, and whose it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import NamedTuple

from kabpf.errors import PolicyError, collected
from kabpf.policy import destinations as tables
from kabpf.policy import limits, options, selectors, wishes, yaml
from kabpf.policy.model import (
    ASKED,
    Destination,
    Direction,
    Limits,
    Mode,
    Options,
    Origin,
    Policy,
    Rules,
    Selector,
    Until,
    is_asked,
    network_text,
)
from kabpf.policy.of_commands import RUNTIME, TRANSIENT
from kabpf.policy.options import Draft
from kabpf.policy.selectors import NAME_BYTES_MAX
from kabpf.policy.yaml import Node

FILE_KEYS = ("defaults", "policies", "users", "containers")
POLICY_KEYS = (
    "select", "keepalive", "mode", "direction", "destinations", "loopback", "existing", "log",
    "offered",
)  # fmt: skip
RUNTIME_KEYS = ("until", "owner")  # that files of commands may have beside these
UNTIL_KEYS = ("cgroup", "id")
ID_MAX = 2**64 - 1  # of a cgroup
OWNER_MAX = 2**32 - 2  # of a user
DESTINATION_KEYS = ("to", "ports", "keepalive", *options.KEYS)
ROWS_MAX = 32768  # half of what the kernel's tables hold: for old and new policies at once
KEEPALIVE = "off, on, or options (idle, interval, ...)"
PORT_MAX = 65535
PORT = f"a port, 1 to {PORT_MAX}"
NETWORK = "a network or an address, as 10.0.0.0/8 or 2001:db8::1"


class DestinationDraft(NamedTuple):
    """A destination before its policy fills in what it leaves out; `to` as it was written."""

    to: str
    network: IPv6Network
    ports: tuple[int, ...]
    keepalive: bool
    options: Draft


class PolicyDraft(NamedTuple):
    """A policy before defaults are filled in: one without numbers, and the numbers given."""

    policy: Policy
    options: Draft
    destinations: tuple[DestinationDraft, ...]


class PolicyFile(NamedTuple):
    """What one file says, before `combine` fills in what other files' defaults say."""

    defaults: Draft
    policies: tuple[PolicyDraft, ...]
    users: Limits | None = None
    containers: Limits | None = None


def parse(content: bytes, path: str, *, is_policy: bool = True) -> PolicyFile:
    """What the text of one file says; `path` names it in messages, and a policy without a name.
    Raises PolicyError, which shows nothing of a text that may be no policy file but the keys and
    values of one."""
    policy_keys = (
        (*POLICY_KEYS, *RUNTIME_KEYS) if Path(path).parent in (RUNTIME, TRANSIENT) else POLICY_KEYS
    )
    keys = (*FILE_KEYS, *policy_keys)
    try:
        root = yaml.parse(content.decode(), path, None if is_policy else keys)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{path}:{line}: not UTF-8, expected UTF-8 text") from None
    if root is None:
        return PolicyFile(options.NOTHING, ())
    top = root.mapping(keys)
    if own := [key for key in top if key in policy_keys]:
        for key in FILE_KEYS:
            if key in top:
                raise top[key].error(f"beside {own[0]}, expected a file of its own")
        stem = Path(path).stem
        own_unit = selectors.named_by(stem, path)
        policy = _policy(root, _name(root, stem), own_unit, policy_keys)
        return PolicyFile(options.NOTHING, (policy,))
    defaults = options.NOTHING
    if "defaults" in top:
        defaults = options.parse(top["defaults"].mapping(options.KEYS), "defaults")
    named = top["policies"].named("names with their policies") if "policies" in top else {}
    return PolicyFile(
        defaults,
        tuple(_policy(node, _name(node, name), ()) for name, node in named.items()),
        limits.parse(top["users"]) if "users" in top else None,
        limits.parse(top["containers"]) if "containers" in top else None,
    )


def defaults_of(parsed: Iterable[PolicyFile]) -> Draft:
    """The defaults of files in the order they were read: a later one wins, key by key."""
    defaults = options.NOTHING
    for file in parsed:
        defaults = options.over(file.defaults, defaults)
    return defaults


def users_of(parsed: Iterable[PolicyFile]) -> Limits:
    """What these files let users have: the last word counts, whole."""
    return next((file.users for file in reversed([*parsed]) if file.users), limits.ANY)


def containers_of(parsed: Iterable[PolicyFile]) -> Limits:
    """What these files let containers ask for: as above, but nothing by default."""
    given = (file.containers for file in reversed([*parsed]) if file.containers)
    return next(given, limits.NONE)


def combine(parsed: list[PolicyFile]) -> tuple[Policy, ...]:
    """Merge files in the order they were read: a later default and a later policy of the same name
    win. A policy that its owner may not have does not count. Raises PolicyError where
    `user_timeout: auto` has nothing to be computed from."""
    defaults, allowed = defaults_of(parsed), users_of(parsed)
    drafts: dict[str, PolicyDraft] = {}
    for file in parsed:
        for draft in file.policies:
            drafts.pop(draft.policy.name, None)
            drafts[draft.policy.name] = draft
    policies: list[Policy] = []
    findings: list[str] = []
    for draft in drafts.values():
        with collected(findings):
            policies.append(_finished(draft, defaults))
    with collected(findings):
        _check_rows(policies)
    if findings:
        raise PolicyError(*findings)
    counting = [policy for policy in policies if not limits.denial(policy, allowed)]
    asked = containers_of(parsed)
    return (*counting, wishes.template(asked)) if asked.allowed else tuple(counting)


def _check_rows(policies: list[Policy]) -> None:
    rows = 0
    for policy in policies:
        if policy.rules.destinations:
            table = tables.table(policy.rules.destinations)
            rows += max(len(table.nodes), len(table.options))
            if rows > ROWS_MAX:
                raise PolicyError(
                    f"{policy.source}: the destinations of policy {policy.name} and of those read"
                    f" before make {rows} rows, expected at most {ROWS_MAX}"
                )


def _finished(draft: PolicyDraft, defaults: Draft) -> Policy:
    policy = draft.policy
    whose = f"policy {policy.name}"
    own, origins = policy.rules.options, policy.origins
    # What ends with a cgroup says all of it; what its maker took from the defaults is in it.
    filled = draft.options if policy.until else options.over(draft.options, defaults)
    contradictions: list[options.Contradiction] = []
    if own.keepalive:
        own, option_origins = options.finish(filled, whose)
        origins = {**origins, **option_origins}
        contradictions = list(options.contradictions(filled, own))
    warnings = [each.text(whose) for each in contradictions]
    destinations: list[Destination] = []
    for each in draft.destinations:
        given = Options(keepalive=False)
        if each.keepalive:
            theirs = options.over(each.options, filled)
            given, _ = options.finish(theirs, f"{whose} to {each.to}")
            warnings += [
                contradiction.text(f"{whose} to {each.to}")
                for contradiction in options.contradictions(theirs, given)
                if contradiction not in contradictions
            ]
        destinations.append(Destination(each.network, each.ports, given))
    rules = policy.rules._replace(options=own, destinations=tuple(destinations))
    return policy._replace(rules=rules, origins=origins, warnings=tuple(warnings))


def _name(node: Node, name: str) -> str:
    if not name or not name.isprintable() or len(name.encode()) > NAME_BYTES_MAX:
        raise node.error(f"{name!r}, expected a name of 1 to {NAME_BYTES_MAX} printable bytes")
    if is_asked(name):
        raise node.error(f"{name!r} begins with {ASKED}, expected another name")
    return name


def _policy(
    node: Node, name: str, own_unit: tuple[Selector, ...], known: tuple[str, ...] = POLICY_KEYS
) -> PolicyDraft:
    keys = node.mapping(known)
    if "keepalive" not in keys:
        raise node.error(f"no keepalive, expected {KEEPALIVE}")
    selected = selectors.parse(keys["select"]) if "select" in keys else own_unit
    offered = _choice(keys, "offered", ("false", "true")) == "true"
    if not selected and not offered:
        raise node.error(
            "no select, expected a list of selectors or a file named after a unit"
            " (nginx.service.yaml)"
        )
    draft = options.NOTHING
    if isinstance(keys["keepalive"].value, dict):
        on = True
        draft = options.parse(keys["keepalive"].mapping(options.KEYS))
    else:
        on = _choice(keys, "keepalive", ("on", "off"), KEEPALIVE) == "on"
    rules = Rules(
        Options(keepalive=on),
        Mode(_choice(keys, "mode", tuple(Mode))),
        Direction(_choice(keys, "direction", tuple(Direction))),
        _choice(keys, "loopback", ("true", "false")) == "true",
    )
    existing = _choice(keys, "existing", ("true", "false")) == "true"
    log = _choice(keys, "log", ("off", "sockets")) == "sockets"
    origins: dict[str, Origin] = {
        key: Origin(keys[key].source)
        for key in ("offered", "keepalive", "mode", "direction", "loopback", "existing", "log")
        if key in keys
    }
    until = _until(keys["until"]) if "until" in keys else None
    owner = _integer(keys["owner"], "a user's id", OWNER_MAX) if "owner" in keys else None
    if owner is not None and until is None:
        raise keys["owner"].error("without until, expected the cgroup that it is about")
    policy = Policy(
        name, selected, rules, node.source, existing, log, until, owner, origins, offered=offered
    )
    return PolicyDraft(policy, draft, _destinations(keys))


def _until(node: Node) -> Until:
    keys = node.mapping(UNTIL_KEYS)
    if missing := [key for key in UNTIL_KEYS if key not in keys]:
        raise node.error(f"no {missing[0]}, expected {' and '.join(UNTIL_KEYS)}")
    path = keys["cgroup"].word("a cgroup path")
    return Until(path, _integer(keys["id"], "a cgroup's id", ID_MAX))


def _integer(node: Node, expected: str, limit: int) -> int:
    word = node.word(expected)
    if not re.fullmatch(r"[0-9]{1,20}", word) or int(word) > limit:
        raise node.expected(expected)
    return int(word)


def _choice(keys: Mapping[str, Node], key: str, words: tuple[str, ...], expected: str = "") -> str:
    """The word given, or the first of the words."""
    if key not in keys:
        return words[0]
    expected = expected or f"{', '.join(words[:-1])} or {words[-1]}"
    word = keys[key].word(expected)
    if word not in words:
        raise keys[key].expected(expected)
    return word


def _destinations(keys: Mapping[str, Node]) -> tuple[DestinationDraft, ...]:
    if "destinations" not in keys:
        return ()
    items = keys["destinations"].items("a list such as [{to: 10.0.0.0/8, keepalive: off}]")
    return tuple(_destination(item) for item in items)


def _destination(node: Node) -> DestinationDraft:
    keys = node.mapping(DESTINATION_KEYS)
    if "to" not in keys:
        raise node.error(f"no to, expected {NETWORK}")
    given = {key: value for key, value in keys.items() if key in options.KEYS}
    if "keepalive" not in keys and not given:
        raise node.error("no options, expected keepalive: off, or options (idle, interval, ...)")
    for value in given.values():
        if "keepalive" in keys:
            raise value.error("beside keepalive, expected one of the two")
    return DestinationDraft(
        keys["to"].word(NETWORK),
        _network(keys["to"]),
        _ports(keys["ports"]) if "ports" in keys else (),
        _choice(keys, "keepalive", ("on", "off")) == "on",
        options.parse(given),
    )


def _network(node: Node) -> IPv6Network:
    word = node.word(NETWORK)
    # Without the netmasks and zones that ipaddress would take.
    if not re.fullmatch(r"[0-9A-Fa-f:.]+(/[0-9]{1,3})?", word):
        raise node.expected(NETWORK)
    try:
        network = ip_network(word, strict=False)
    except ValueError:
        raise node.expected(NETWORK) from None
    if network.network_address != ip_network(word.partition("/")[0]).network_address:
        raise node.error(f"{node} has bits set beyond its prefix, expected {network_text(network)}")
    if isinstance(network, IPv4Network):
        return IPv6Network((f"::ffff:{network.network_address}", 96 + network.prefixlen))
    return network


def _ports(node: Node) -> tuple[int, ...]:
    ports: set[int] = set()
    for item in node.items("a list of ports, as [5432]"):
        word = item.word(PORT)
        if not re.fullmatch(r"[0-9]+", word):
            raise item.expected(PORT)
        port = int(word)
        if not 1 <= port <= PORT_MAX:
            raise item.error(f"{item} is not in 1 to {PORT_MAX}")
        if port in ports:
            raise item.error(f"{item} is given twice, expected each port once")
        ports.add(port)
    return tuple(sorted(ports))
