"""The TCP connections of the machine with what bounds their silence: inet_diag has the timers and
when something was sent and received last, the data plane the options. Without the data plane it is
not known when keepalive probes, only that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from kabpf.apply.visitors import Outcome, Part, outcomes
from kabpf.audit.connections import MAPPED, Connection, Keepalive, Place, Setter, Timer
from kabpf.errors import RefusedError
from kabpf.kernel import abi, inet_diag
from kabpf.kernel.dataplane import Dataplane
from kabpf.kernel.inet_diag import Network
from kabpf.observe import sockets
from kabpf.observe.sockets import LISTED, SET, STATES

LISTEN = STATES.index("listen")
SILENT = tuple(map(STATES.index, ("established", "close-wait", "fin-wait-2")))
ON, IDLE, INTERVAL = map(SET.index, ("keepalive", "idle_s", "interval_s"))
LOOPBACK_IPV4 = MAPPED + b"\x7f"
LOOPBACK_IPV6 = bytes(15) + b"\x01"

_Ends = tuple[int, bytes, int, bytes, int]


def of_machine(loaded: Dataplane | None, say: Callable[[str], None]) -> list[Connection]:
    """The connections of every network namespace, and the listeners. `say` is told of namespaces of
    which not all is known. Raises RefusedError."""
    looks = list(_visited(loaded, with_times=True))
    held = {each.namespace for each in looks if each.is_held}
    if held:  # Without the times the kernel takes no lock.
        looks = [each for each in looks if not each.is_held]
        looks += _visited(loaded, with_times=False, only=held)
    # Read last: a connection that is missing was closed meanwhile, if nothing else is missing.
    missing: list[str] = []
    options = _options(sockets.of_machine(loaded, missing.append)) if loaded else {}
    is_complete = loaded is not None and not missing
    found: list[Connection] = []
    for outcome in looks:
        if outcome.output:
            found += _connections(outcome, options, is_complete=is_complete)
    for inode in sorted(held):
        say(f"network namespace {inode}: a socket there is held; its silences are unknown")
    return found


def _visited(
    loaded: Dataplane | None, *, with_times: bool, only: set[int] | None = None
) -> Iterator[Outcome]:
    read = partial(inet_diag.output, LISTED, with_times=with_times)
    parts: Iterable[Part] = sockets.parts(loaded.pins if loaded else None)
    if only is not None:
        parts = (Part([one for one in part.namespaces if one.inode in only]) for part in parts)
    for outcome in outcomes(read, parts):
        if outcome.refused and not outcome.is_held:
            raise RefusedError(outcome.refused)
        if outcome.output or outcome.is_held:
            yield outcome


def _options(records: Iterable[abi.CSocket]) -> dict[_Ends, Keepalive]:
    kept: dict[Keepalive, Keepalive] = {}  # most have the same, and need no room of their own
    options = {}
    for raw in records:
        one = abi.read_socket(raw)
        has = Keepalive(
            one.keepalive != 0,
            one.idle_s,
            one.by[ON],
            one.by[IDLE],
            one.interval_s,
            one.by[INTERVAL],
        )
        ends = one.namespace, one.local, one.local_port, one.remote, one.remote_port
        options[ends] = kept.setdefault(has, has)
    return options


def _connections(
    outcome: Outcome, options: dict[_Ends, Keepalive], *, is_complete: bool
) -> list[Connection]:
    listed = inet_diag.listed(outcome.output)
    records = list(listed.records)
    listening = {one.local_port for one in records if one.state == LISTEN}
    namespace = outcome.namespace
    places = Places(listed.networks)
    off = Keepalive(
        False,
        listed.system_idle_s,
        Setter.UNKNOWN,
        Setter.SYSTEM,
        listed.system_interval_s,
        Setter.SYSTEM,
    )
    found = []
    for one in records:
        ends = namespace, one.local, one.local_port, one.peer, one.peer_port
        has = options.get(ends)
        if has is None:
            if is_complete:
                continue
            has = _by_timer(one, off)
        found.append(
            Connection(
                namespace,
                one.cgroup_id,
                *ends[1:],
                one.local_port in listening,
                places.of(one.peer),
                STATES[one.state],
                not one.has_owner,
                one.timer,
                one.tries,
                one.expires_ms,
                None if one.silence_ms == inet_diag.UNKNOWN else one.silence_ms,
                has,
                listed.system_idle_s,
                listed.system_interval_s,
                listed.rto_max_ms,
            )
        )
    return found


class Places:
    """Where peers are, as seen from a network namespace, whose owner may have given it as many
    addresses as there are peers."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._own: set[bytes] = set()
        self._known: dict[bytes, Place] = {}
        self._common: dict[int, set[int]] = {}  # what networks have in common, by its bits
        for each in networks:
            if each.is_own:
                self._own.add(each.address)
            common = int.from_bytes(each.address, "big") >> 128 - each.bits
            self._common.setdefault(each.bits, set()).add(common)

    def of(self, peer: bytes) -> Place:
        """Where a peer is."""
        if peer not in self._known:
            self._known[peer] = self._find(peer)
        return self._known[peer]

    def _find(self, peer: bytes) -> Place:
        if peer.startswith(LOOPBACK_IPV4) or peer == LOOPBACK_IPV6 or peer in self._own:
            return Place.LOOPBACK
        number = int.from_bytes(peer, "big")
        if any(number >> 128 - bits in common for bits, common in self._common.items()):
            return Place.NETWORK
        return Place.BEYOND


_RUNS = Keepalive(True, None)
_UNKNOWN = Keepalive(None, None)


def _by_timer(one: inet_diag.Record, off: Keepalive) -> Keepalive:
    """What is seen without the data plane; `off` is what has no keepalive."""
    if one.timer == Timer.KEEPALIVE:
        return _RUNS
    return off if one.timer == Timer.NONE and one.state in SILENT else _UNKNOWN
