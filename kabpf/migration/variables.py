"""The environment variables of libkeepalive, libdontdie and msantos/libkeepalive, as options.

What is unset, or set to nothing, means the system's default; so does a 0 of msantos/libkeepalive,
but for the user timeout, which it turns off. Anything else that those libraries would silently
ignore is an error, except a KEEPALIVE, which other software has, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from kabpf.errors import PolicyError, collected
from kabpf.policy.model import BY_KEY
from kabpf.policy.options import TIMERS

# By what they give; each in the order of the libraries above.
VARIABLES = {
    "keepalive": ("KEEPALIVE", "DD_USE_KEEPALIVE"),
    "idle": ("KEEPIDLE", "DD_TCP_KEEPALIVE_TIME", "TCP_KEEPIDLE"),
    "interval": ("KEEPINTVL", "DD_TCP_KEEPALIVE_INTVL", "TCP_KEEPINTVL"),
    "probes": ("KEEPCNT", "DD_TCP_KEEPALIVE_PROBES", "TCP_KEEPCNT"),
    "user_timeout": ("TCP_USER_TIMEOUT",),
    "syn_retries": ("TCP_SYNCNT",),
    "debug": ("DD_DEBUG",),
    "once": ("DD_EVAL_ENVIRONMENT_ONCE",),
}

# Of msantos/libkeepalive, what no policy has.
WITHOUT_COUNTERPART = ("TCP_NODELAY", "TCP_DEFER_ACCEPT", "TCP_MAXSEG", "TCP_WINDOW_CLAMP")

_DERIVED = "-1"  # the user timeout that is idle + interval * probes
_SWITCH = {"off": "off", "on": "on"}  # libkeepalive's, which compares in any case


class Asked(NamedTuple):
    """What an environment asks for; the options are spelled as in policy files."""

    keepalive: bool = True
    options: Mapping[str, str] = MappingProxyType({})
    debug: bool = False  # a line in the journal for each socket
    warnings: tuple[str, ...] = ()  # of variables that are probably other software's


def read(environment: Mapping[str, str], decided: Collection[str] = ()) -> Asked:
    """What `environment` asks for. Variables that give one of the keys `decided`, which are those
    of VARIABLES, are not looked at.

    Raises PolicyError with one finding for each variable that is wrong, and for those that
    contradict each other.
    """
    findings: list[str] = []
    warnings: list[str] = []
    found: dict[str, str] = {}
    for key, names in VARIABLES.items():
        if key in decided:
            continue
        given = {name: environment[name] for name in names if environment.get(name)}
        if key == "keepalive" and (foreign := _foreign(given)):
            del given["KEEPALIVE"]
            warnings.append(foreign)
        values: list[str] = []
        for name, text in given.items():
            with collected(findings):
                values.append(_value(name, key, text))
        if len(set(values)) > 1:
            both = " and ".join(f"{name}={_shown(text)}" for name, text in given.items())
            findings.append(f"{both} contradict each other, expected one of them")
        elif values and values[0]:
            found[key] = values[0]
    keepalive = found.pop("keepalive", "on") == "on"
    debug = found.pop("debug", "off") == "on"
    if found.pop("once", "on") == "off":
        findings.append(
            "DD_EVAL_ENVIRONMENT_ONCE: 0 works only inside the process, expected 1, and a policy"
            " with destinations where the sockets of one process are to differ"
        )
    if keepalive and found.get("user_timeout") == "auto":
        timers = [key for key in TIMERS if key not in (*found, *decided)]
        if timers:
            findings.append(
                f"TCP_USER_TIMEOUT: {_DERIVED} without {', '.join(timers)},"
                " expected all of idle, interval and probes"
            )
    if findings:
        raise PolicyError(*findings)
    return Asked(keepalive, found if keepalive else {}, debug, tuple(warnings))


def _foreign(given: Mapping[str, str]) -> str:
    """What there is to say of a KEEPALIVE that is not libkeepalive's, as gunicorn's images have."""
    text = given.get("KEEPALIVE", "on")
    if text.lower() in _SWITCH:
        return ""
    return f"KEEPALIVE: {_shown(text)} is neither off nor on"


def _value(name: str, key: str, text: str) -> str:
    """What a variable gives, as policy files spell it; "" is the system's."""
    if key not in BY_KEY:
        words = _SWITCH if name == "KEEPALIVE" else {"0": "off", "1": "on"}
        if text.lower() not in words:
            raise PolicyError(f"{name}: {_shown(text)}, expected {' or '.join(words)}")
        return words[text.lower()]
    row = BY_KEY[key]
    if key == "user_timeout" and text == _DERIVED:
        return "auto"
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise PolicyError(f"{name}: {_shown(text)}, expected a number, {row.limits}")
    number = int(text)
    if number == 0 and name.startswith("TCP_"):
        return "off" if "off" in row.words else ""
    if not row.low <= number <= row.high:
        raise PolicyError(f"{name}: {text} is not in {row.limits}")
    return f"{number}ms" if key == "user_timeout" else str(number)


def _shown(text: str) -> str:
    return text[:80] or "nothing"
