"""Writes events to systemd's journal, with fields to search by; so many at a time."""

from __future__ import annotations

import functools
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

from kabpf.observe.events import Event, Lost
from kabpf.observe.sockets import UNIT
from kabpf.systemd import relations

SOCKET = "/run/systemd/journal/socket"  # systemd-journald.service(8)

# Below journald's limit for a service, 10,000 in 30 s, beyond which it would drop kabpfd's other
# messages as well (RateLimitBurst= in journald.conf(5)).
LINES_MAX = 8000
WINDOW_S = 30
COUNTS_MAX = 200  # lines more that say what was not logged: of so many cgroups apart

_Source = tuple[str | None, str | None]  # the policy and the cgroup of events

INFO, NOTICE, WARNING = 6, 5, 4  # syslog(3)
_PRIORITIES = {"timed_out": NOTICE, "failed": WARNING}


class Journal:
    """The journal, or another reader of its protocol. A context manager.

    Where it does not keep up, events are counted as lost. Where there is none, `otherwise` gets the
    lines, and returns False for one that is lost. No policy takes another one's lines, and no
    cgroup more than half of its policy's: what is beyond that is told by one line for each.
    """

    def __init__(self, otherwise: Callable[[str], bool], address: str = SOCKET) -> None:
        self._otherwise, self._address = otherwise, address
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._channel.setblocking(False)
        self.policies = 1  # that log, which have an equal part each
        self._written: Counter[str | None] = Counter()  # by policy
        self._of_cgroup: Counter[_Source] = Counter()
        self._lost: Counter[_Source] = Counter()
        self._began = time.monotonic()
        self.forget_units()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; the journal keeps what was written."""
        self._channel.close()

    def forget_units(self) -> None:
        """Read anew which services have which sockets."""
        self._services = functools.cache(relations.Services)

    def write(self, event: Event | Lost) -> None:
        """Write an event, or count it."""
        if isinstance(event, Lost):
            self._lost[None, None] += event.count
            return
        source = event.policy, event.cgroup
        part = max(LINES_MAX // self.policies, 2)
        has_room = self._written[event.policy] < part and self._of_cgroup[source] < part // 2
        if has_room and self._send(_fields(event), *self._units(event)):
            self._written[event.policy] += 1
            self._of_cgroup[source] += 1
            return
        if len(self._lost) >= COUNTS_MAX and source not in self._lost:
            source = None, None
        self._lost[source] += 1

    @property
    def due(self) -> float | None:
        """When `settle` has something to say, by time.monotonic(); None where nothing was lost."""
        return self._began + WINDOW_S if self._lost else None

    def settle(self) -> None:
        """Say how many events were lost, once in each window."""
        if time.monotonic() < self._began + WINDOW_S:
            return
        for source, count in [*self._lost.items()]:
            if self._send(_lost_fields(*source, count)):
                del self._lost[source]
        self._written.clear()
        self._of_cgroup.clear()
        self._began = time.monotonic()

    def _units(self, event: Event) -> Iterator[str]:
        """Those that `journalctl --unit` finds the event by: a socket's services have it, too."""
        unit = _unit(event)
        if unit:
            yield unit
        if unit and unit.endswith(".socket"):
            yield from self._services().of(unit)

    def _send(self, fields: dict[str, str], *units: str) -> bool:
        named = (("OBJECT_SYSTEMD_UNIT", unit) for unit in units)
        try:
            raw = b"".join(_encoded(*field) for field in (*fields.items(), *named))
            self._channel.sendto(raw, self._address)
        except (FileNotFoundError, ConnectionRefusedError):
            return self._otherwise(fields["MESSAGE"])
        except OSError:
            return False
        return True


def _encoded(name: str, value: str) -> bytes:
    """A field as journald takes it (Native Journal Protocol on systemd.io)."""
    raw = value.encode(errors="surrogateescape")
    if b"\n" not in raw:
        return b"%s=%s\n" % (name.encode(), raw)
    return b"%s\n%s%s\n" % (name.encode(), len(raw).to_bytes(8, "little"), raw)


def _lost_fields(policy: str | None, cgroup: str | None, count: int) -> dict[str, str]:
    where = f" of {cgroup}" if cgroup else ""
    where += f", policy {policy}," if policy else ""
    text = f"{count} events of sockets{where} are not logged, because there were too many"
    fields = {
        "MESSAGE": _shown(text),
        "PRIORITY": str(WARNING),
        "SYSLOG_IDENTIFIER": "kabpfd",
        "KABPF_EVENT": "lost",
        "KABPF_POLICY": policy,
        "KABPF_CGROUP": cgroup,
        "KABPF_COUNT": str(count),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _fields(event: Event) -> dict[str, str]:
    fields: dict[str, object] = {
        "MESSAGE": message(event),
        "PRIORITY": _PRIORITIES.get(event.kind, INFO),
        "SYSLOG_IDENTIFIER": "kabpfd",
        "KABPF_EVENT": event.kind,
        "KABPF_POLICY": event.policy,
        "KABPF_CGROUP": event.cgroup,
        "KABPF_UNIT": event.unit,
        "KABPF_PID": event.pid,
        "KABPF_COMMAND": event.command,
        "KABPF_DIRECTION": event.direction,
        "KABPF_LOCAL": event.local,
        "KABPF_PEER": event.peer,
    }
    for name, option in event.options.items():
        fields[f"KABPF_{name.upper()}"] = None if option.value is None else int(option.value)
        fields[f"KABPF_{name.upper()}_OUTCOME"] = option.outcome
    if call := event.call:
        fields |= {"KABPF_OPTION": call.option, "KABPF_REQUESTED": int(call.requested)}
    if timeout := event.timeout:
        fields |= {
            "KABPF_REASON": timeout.reason,
            "KABPF_ERROR": timeout.error,
            "KABPF_SILENT_MS": timeout.silent_ms,
            "KABPF_UNANSWERED": timeout.unanswered,
            "KABPF_WINDOW_CLOSED_MS": timeout.window_closed_ms,
        }
    return {name: str(value) for name, value in fields.items() if value is not None}


def _unit(event: Event) -> str | None:
    """The unit of the system's own manager, which is the outermost that is no slice: what is inside
    of it may have any name, in a container or where the cgroup is a user's."""
    names = (event.cgroup or "").split("/")[1:]
    first = next((name for name in names if not name.endswith(".slice")), "")
    return first if UNIT.fullmatch(first) else None


def message(event: Event) -> str:
    """The event as one line for people."""
    ends = {
        "out": f"{event.local} -> {event.peer}",
        "in": f"{event.local} <- {event.peer}",
        "listen": f"{event.local}",
    }[event.direction]
    process = f", {event.command}[{event.pid}]" if event.pid else ""
    options = ", ".join(
        f"{name} {text}" for name, text in event.option_texts.items() if text != "-"
    )
    where = event.unit or event.cgroup or "an unknown cgroup"
    text = f"{event.kind.replace('_', ' ')}: {ends} of {where}{process}, policy {event.policy}"
    return _shown(f"{text}: {event.details or options}")


def _shown(text: str) -> str:
    """As output.shown, which is for commands."""
    return text if text.isprintable() else ascii(text)[1:-1]
