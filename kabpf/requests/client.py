"""The client of kabpf-request, for users: policies for cgroups of their own; root needs none."""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kabpf.errors import RefusedError
from kabpf.policy.options import REQUEST_KEYS
from kabpf.requests import varlink
from kabpf.requests.channel import Channel
from kabpf.requests.interface import INTERFACE

SOCKET = Path("/run/kabpf/request.socket")
ANSWER_S = 90  # longer than a request may take: RuntimeMaxSec= of kabpf-request@.service
PATIENCE_S = 60  # for others' requests, of which so many are served at once
PAUSE_MAX_S = 2

# Restarted, as it may be active while the file that it listens at is gone.
_ACTIVATE = (
    "ask an administrator to run: systemctl enable kabpf-request.socket;"
    " systemctl restart kabpf-request.socket"
)


def attach(
    cgroup: str,
    options: Mapping[str, str],
    *,
    off: bool = False,
    defaults: bool = True,
    mode: str = "fill",
    existing: bool = True,
    address: Path = SOCKET,
) -> dict[str, Any]:
    """Activate a policy on a cgroup of the caller's and on what is below it, until the cgroup
    is removed; one that the caller had put there before is replaced.

    `cgroup` is a cgroup path. `options` are idle, interval, probes, user_timeout and preset, as
    policy files spell them, but no ranges; without any, keepalive is turned on, or with `off` left
    off. What is left out is the administrator's default, or without `defaults` the system's.
    `mode` is fill or override. Returns, when it is active, what `kabpfctl attach --json` prints.
    Raises RefusedError.
    """
    require_requestable(options)
    parameters = {
        "cgroup": cgroup,
        **options,
        "defaults": defaults,
        "mode": mode,
        "existing": existing,
    }
    return _call("Attach", parameters | ({"keepalive": "off"} if off else {}), address)


def require_requestable(options: Iterable[str]) -> None:
    """Raise RefusedError for an option that root alone may have."""
    for key in options:
        if key not in REQUEST_KEYS:
            flag = key.replace("_", "-")
            raise RefusedError(f"--{flag} needs root")


def detach(cgroup: str, *, address: Path = SOCKET) -> dict[str, Any]:
    """Undo `attach` for a cgroup path. Returns what `kabpfctl detach --json` prints. Raises
    RefusedError."""
    return _call("Detach", {"cgroup": cgroup}, address)


def _call(method: str, parameters: Mapping[str, Any], address: Path) -> dict[str, Any]:
    if not parameters["cgroup"].isprintable():
        raise RefusedError(f"cgroup {parameters['cgroup']!r}", hint="expected a printable path")
    message = varlink.call(f"{INTERFACE}.{method}", parameters)
    deadline = time.monotonic() + PATIENCE_S
    pause_s = 0.2
    # Beyond so many at once, connections are closed without an answer, and without having done
    # anything. Those who wait ask ever less often, for the socket not to be flooded.
    while (answer := _answer(message, address)) is None:
        if time.monotonic() > deadline:
            raise RefusedError(f"{address} does not answer", hint="try: journalctl -t kabpfd")
        time.sleep(random.uniform(pause_s / 2, pause_s))
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
    try:
        return dict(varlink.parse_reply(answer))
    except varlink.CallError as error:
        raise RefusedError(_said(error)) from None
    except varlink.MessageError as error:
        raise RefusedError(f"{address}: {error}", hint="expected Varlink") from None


def _answer(message: bytes, address: Path) -> bytes | None:
    """What is answered, or None where the connection was closed instead."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(str(address))
            channel = Channel(connection, ANSWER_S)
            channel.send(message)
            return channel.receive()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise RefusedError(f"connect to {address}", error.errno or 0, _ACTIVATE) from None
        except ConnectionError:
            return None
        except TimeoutError:
            raise RefusedError(f"connect to {address}", errno.ETIMEDOUT) from None
        except OSError as error:
            raise RefusedError(f"connect to {address}", error.errno or 0) from None
        except varlink.MessageError as error:
            raise RefusedError(f"{address}: {error}", hint="expected Varlink") from None


def _said(error: varlink.CallError) -> str:
    """What an error means to the caller."""
    reason = error.parameters.get("reason")
    if isinstance(reason, str):
        return reason
    name = error.name.removeprefix(f"{varlink.SERVICE}.")
    if name == "PermissionDenied":
        return "request denied: callers in user namespaces are not allowed"
    if name == "InvalidParameter":
        key = str(error.parameters.get("parameter"))
        return f"{key.replace('_', ' ')}: users may give one value, within its limits"
    return f"kabpf-request says {error.name}"
