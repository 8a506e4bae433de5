"""What policies ask for that the data plane without BTF can't do, by file and line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kabpf.errors import PolicyError
from kabpf.policy.model import Mode, Options, Policy, Range, ranges
from kabpf.policy.yaml import Source


def require(policies: Iterable[Policy]) -> None:
    """Raise PolicyError with all that the bcc loader can't do."""
    if problems := findings(policies):
        raise PolicyError(*problems)


def findings(policies: Iterable[Policy]) -> list[str]:
    """All that the bcc loader can't do, as `file:line: key: what, what was expected`."""
    return list(dict.fromkeys(text for policy in policies for text in _findings(policy)))


def _findings(policy: Policy) -> Iterator[str]:
    if policy.owner is not None:
        what = f"a policy of uid {policy.owner}"
        yield _text(policy.source, what, "policies of root alone (kabpfctl detach)")
        return
    for selector in policy.selectors:
        if selector.kind != "cgroup" or selector.is_glob:
            what = f"{selector.kind}: {selector.text}"
            yield _text(selector.source, what, "cgroup: with the whole path")
    if policy.wishes:
        yield _text(policy.source, "containers", "containers: off")
    if policy.offered:
        yield _text(_line(policy, "offered"), "offered: true", "offered: false")
    if policy.rules.mode == Mode.ENFORCE:
        yield _text(_line(policy, "mode"), "mode: enforce", "fill or override")
    if policy.existing and "existing" in policy.origins:
        expected = "existing: false, or the key left out"
        yield _text(_line(policy, "existing"), "existing: true", expected)
    if policy.log:
        yield _text(_line(policy, "log"), "log: sockets", "log: off")
    connect_timeout = policy.rules.options.connect_timeout_ms
    if connect_timeout:
        source = _line(policy, "connect_timeout")
        yield _text(source, "connect_timeout", "syn_retries in its place")
    for destination in policy.rules.destinations:
        if destination.options.connect_timeout_ms not in (None, connect_timeout):
            what = f"connect_timeout to {destination.to}"
            yield _text(policy.source, what, "syn_retries in its place")
    own = _ranges(policy.rules.options)
    for key, value in own.items():
        if not (key in policy.origins and policy.origins[key].note):  # derived from another one
            yield _text(_line(policy, key), f"{key}: the range {value}", "one value")
    for destination in policy.rules.destinations:
        for key, value in _ranges(destination.options).items():
            if value != own.get(key):
                what = f"{key}: the range {value} to {destination.to}"
                yield _text(policy.source, what, "one value")


def _ranges(options: Options) -> dict[str, Range]:
    return {key: value for key, value in ranges(options).items() if value.low != value.high}


def _line(policy: Policy, key: str) -> Source:
    origin = policy.origins.get(key)
    return origin.source if origin else policy.source


def _text(source: Source, what: str, expected: str) -> str:
    return f"{source}: {what} needs BTF, which the bcc loader does without, expected {expected}"
