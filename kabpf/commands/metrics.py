"""kabpfctl metrics: counters and states, as Prometheus reads them."""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kabpf import __version__, output, root_files
from kabpf.commands import status
from kabpf.commands.status import Row
from kabpf.errors import RefusedError
from kabpf.kernel import abi, cgroups, dataplane, loading, mountinfo
from kabpf.observe import exposition
from kabpf.policy.files import OF_USER
from kabpf.policy.model import is_asked
from kabpf.policy.of_commands import RUNTIME, TRANSIENT
from kabpf.runtime import notes
from kabpf.runtime.locks import RUN

if TYPE_CHECKING:
    from kabpf.kernel.dataplane import Dataplane
    from kabpf.observe.sockets import Look

# Each counter, its field, and what it counts.
COUNTERS = (
    ("connections_established", "established", "Connections established under a policy."),
    ("listeners", "listening", "Listeners opened under a policy."),
    ("sockets_updated", "updated", "Open sockets that a new or changed policy changed."),
    ("sockets_kept", "kept", "Sockets that kept a value of the application's own."),
    ("setsockopt_ignored", "ignored", "Calls of setsockopt(2) that changed nothing."),
    ("setsockopt_clamped", "clamped", "Calls of setsockopt(2) whose value came into the range."),
    (
        "setsockopt_turned_off",
        "turned_off",
        "Calls of setsockopt(2) that undid the policy, while they are watched.",
    ),
)
# Policies that come and go too often for a label each, and the label for all of their cgroups. They
# have no counters: the sum would fall when one goes.
FOLDED = ((f"{TRANSIENT}/", "(run)"), (f"{RUNTIME}/{OF_USER}", "(users)"))
UNITS_MAX = 200  # labels; the rest of the units share one
OTHERS = "(others)"
# Units of containers have ids for names; and the policies that containers ask for come and go, too.
CONTAINERS = "(containers)"


def metrics(arguments: argparse.Namespace) -> int:
    """Print the metrics, write them to a file for node_exporter, or answer a scrape with them."""
    exposition.library()  # first, as it may be missing
    if arguments.http:
        from kabpf.observe import scrape  # here, because others do without

        scrape.serve(sys.stdin.fileno(), _respond)
        return 0
    _, content = exposition.encoded(collected(with_sockets=arguments.sockets), "")
    if arguments.textfile is None:
        sys.stdout.write(content.decode())
        return 0
    try:
        # For the user that node_exporter runs as.
        root_files.replace(Path(arguments.textfile), content, mode=0o644)
    except OSError as error:
        raise RefusedError(f"write {arguments.textfile}", error.errno or 0) from None
    return 0


def _respond(names: frozenset[str], accept: str) -> tuple[str, bytes]:
    return exposition.encoded(collected(with_sockets="sockets" in names), accept)


def collected(*, with_sockets: bool) -> list[Any]:
    """Every metric; with those that list the sockets of the machine, which take longer."""
    families = [*_build()]
    tree = cgroups.find_tree(mountinfo.own_mounts())
    with ExitStack() as stack:
        try:
            loaded = stack.enter_context(loading.opened(dataplane.PINS, tree))
            result, rows = status.look_at(tree, loaded)
        except RefusedError:  # what is pinned is not attached, or not all there
            return [*families, _gauge("data_plane_active", _ACTIVE, 0)]
        families += _machine(result)
        families += _policies(rows)
        if with_sockets and loaded and loaded.lists_sockets:
            families += _sockets(loaded)
    return families


_ACTIVE = "Whether kabpf's programs are attached."


def _build() -> Iterator[Any]:
    yield exposition.library().InfoMetricFamily(
        "kabpf_build", "The version of kabpf.", {"version": __version__}
    )


def _machine(result: dict[str, Any]) -> Iterator[Any]:
    files, totals, active = result["policy_files"], result["totals"], result["active"]
    yield _gauge("data_plane_active", _ACTIVE, result["loaded"])
    yield _gauge("daemon_running", "Whether kabpfd runs.", result["daemon"] is not None)
    yield _gauge(
        "policy_files_active",
        "Whether the policy files are active as they are now.",
        files["applied"],
    )
    yield _gauge("policy_errors", "Errors in the policy files.", len(files["errors"]))
    yield _gauge(
        "last_apply_failed",
        "Whether the kernel refused a part of the policies at the last apply.",
        bool(result["refused"]),
    )
    if applied := notes.read_applied(RUN):
        yield _gauge(
            "last_apply_timestamp_seconds",
            "When the policies were last brought in line with the files.",
            applied.looked_at,
        )
        yield _gauge("last_apply_duration_seconds", "How long that took.", applied.took_s)
    if not result["loaded"]:
        return
    yield _gauge("cgroups_known", "Cgroups in the kernel's table.", active["cgroups"])
    yield _gauge("cgroups_max", "Cgroups that the kernel's table has room for.", abi.CGROUPS)
    yield _counter(
        "cgroups_not_recorded",
        "New cgroups that found the kernel's table full.",
        totals["unrecorded"],
    )
    yield _counter(
        "events_dropped",
        "Events for kabpfd that found no room.",
        totals["events_dropped"],
    )


def _policies(rows: list[Row]) -> Iterator[Any]:
    library = exposition.library()
    used = library.GaugeMetricFamily(
        "kabpf_cgroups", "Cgroups that have a policy.", labels=["policy"]
    )
    for label, count in _summed(rows, lambda row: row.cgroups, folds=True):
        used.add_metric([label], count)
    yield used
    for name, field, help in COUNTERS:
        family = library.CounterMetricFamily(f"kabpf_{name}", help, labels=["policy"])
        for label, count in _summed(rows, functools.partial(_field, field)):
            family.add_metric([label], count)
        yield family
    timed_out = library.CounterMetricFamily(
        "kabpf_connections_timed_out",
        "Connections that keepalive or the user timeout ended.",
        labels=["policy", "reason"],
    )
    for label, count in _summed(rows, lambda row: row.counters.timed_out_by_keepalive):
        timed_out.add_metric([label, "keepalive"], count)
    for label, count in _summed(rows, _by_user_timeout):
        timed_out.add_metric([label, "user_timeout"], count)
    yield timed_out
    failures = library.CounterMetricFamily(
        "kabpf_failures", "Options that the kernel refused.", labels=["policy", "errno"]
    )
    for errno in sorted({errno for row in rows for errno in row.counters.failed}):
        for label, count in _summed(rows, functools.partial(_failures, errno)):
            failures.add_metric([label, errno], count)
    yield failures


def _field(field: str, row: Row) -> int:
    return int(getattr(row.counters, field))


def _failures(errno: str, row: Row) -> int:
    return row.counters.failed.get(errno, 0)


def _by_user_timeout(row: Row) -> int:
    return row.counters.timed_out - row.counters.timed_out_by_keepalive


def _summed(
    rows: list[Row], number: Callable[[Row], int], *, folds: bool = False
) -> list[tuple[str, int]]:
    """A number by label. Two policies may have one name while one takes the other's place."""
    summed: Counter[str] = Counter()
    for row in rows:
        folded = _folded(row)
        if folded is None or folds:
            summed[folded or output.shown(row.name)] += number(row)
    return sorted(summed.items())


def _folded(row: Row) -> str | None:
    """The label for all policies of a kind that come and go too often for a label each."""
    if is_asked(row.name):
        return CONTAINERS
    source = row.source or ""
    return next((label for start, label in FOLDED if source.startswith(start)), None)


def _sockets(loaded: Dataplane) -> Iterator[Any]:
    from kabpf.observe import sockets as tcp  # here, because most scrapes do without

    library = exposition.library()
    count, without = counted(tcp.Look(loaded, tcp.Filter(), tcp.open_by_processes(loaded)))
    sockets = library.GaugeMetricFamily(
        "kabpf_sockets",
        "TCP sockets that processes have open, by the policy of their cgroup.",
        labels=["policy", "keepalive"],
    )
    for (policy, keepalive), number in sorted(count.items()):
        sockets.add_metric([policy, keepalive], number)
    yield sockets
    family = library.GaugeMetricFamily(
        "kabpf_sockets_without_keepalive",
        "Established connections without keepalive in units that have a policy.",
        labels=["unit"],
    )
    listed = without.most_common(UNITS_MAX)
    for unit, number in sorted(listed):
        family.add_metric([unit], number)
    if len(without) > len(listed):
        family.add_metric([OTHERS], without.total() - sum(number for _, number in listed))
    yield family


def counted(look: Look) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """How many sockets there are by policy and keepalive, and how many established ones without
    keepalive by unit, of cgroups that have a policy."""
    from kabpf.observe.sockets import STATES

    label = functools.cache(lambda id: unit_label(look.paths.get(id)))
    policies = {
        id: CONTAINERS if is_asked(name) else output.shown(name)
        for id, name in look.policies.items()
    }
    count: Counter[tuple[str, str]] = Counter()
    without: Counter[str] = Counter()
    for record in look.records:
        policy = policies.get(record.policy_id, "")
        count[policy, "on" if record.keepalive else "off"] += 1
        if policy and not record.keepalive and STATES[record.state] == "established":
            without[label(record.cgroup_id)] += 1
    return count, without


def unit_label(cgroup: str | None) -> str:
    """The unit that a cgroup is in, but no container's id."""
    from kabpf.containers.names import enclosing
    from kabpf.observe import sockets as tcp

    if cgroup and enclosing(cgroup):
        return CONTAINERS
    return output.shown(next(reversed(tcp.units(cgroup)), ""))


def _gauge(name: str, help: str, value: float) -> Any:
    return exposition.library().GaugeMetricFamily(f"kabpf_{name}", help, value)


def _counter(name: str, help: str, value: float) -> Any:
    return exposition.library().CounterMetricFamily(f"kabpf_{name}", help, value)
