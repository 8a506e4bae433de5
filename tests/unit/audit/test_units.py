"""What an audit counts of each unit, at one look and at several."""

from __future__ import annotations

import time

from audited import OFF, RUNS, connection, on, probing

from kabpf.audit import effect, units
from kabpf.audit.connections import Keepalive, Place, Setter, Timer
from kabpf.audit.units import Counts, Looks, Named
from kabpf.policy import parser

APP, OTHER = Named("app.service", "/app.service"), Named("other.service", "/other.service")
BY_POLICY = Keepalive(True, 60, *[Setter.POLICY] * 2, 10, Setter.POLICY)


def named(cgroup_id: int) -> Named:
    return APP if cgroup_id < 10 else OTHER


def test_numbers_are_those_of_each_unit() -> None:
    """Two cgroups of one unit are one; listeners count nowhere."""
    found = units.found(
        [
            connection(cgroup_id=7, silence_ms=400_000),
            connection(cgroup_id=8, place=Place.NETWORK, silence_ms=1000),
            connection(cgroup_id=7, keepalive=BY_POLICY, timer=Timer.KEEPALIVE),
            connection(cgroup_id=7, place=Place.LOOPBACK, silence_ms=9_000_000),
            connection(cgroup_id=7, keepalive=RUNS, timer=Timer.KEEPALIVE, expires_ms=5000),
            connection(cgroup_id=7, state="listen"),
            connection(cgroup_id=12, state="listen"),
            connection(cgroup_id=11, **probing(300)),
        ],
        named,
        (350, 200),
    )
    app, other = found[APP], found[OTHER]
    assert (app.connections, app.loopback, app.same_network, app.unknown) == (5, 1, 1, 1)
    assert app.longest_silence_ms == 400_000
    assert app.counts == [Counts(2, 1, 3), Counts(2, 1, 3)]
    assert [each.connection.silence_ms for each in app.at_risk] == [400_000, 1000]
    # Of the shortest idle timeout, which need not be the first.
    assert other.counts == [Counts(0, 0, 0), Counts(1, 0, 1)]
    assert len(other.at_risk) == 1


def test_unit_of_listeners_alone_is_left_out() -> None:
    """It has nothing that could be forgotten."""
    assert units.found([connection(state="listen")], named, (350,)) == {}


def test_file_that_is_not_applied_has_its_effect() -> None:
    """Each cgroup's connections are measured by the policy that it would have."""
    text = b"keepalive: {idle: 60s, interval: 10s, probes: 6}\n"
    (policy,) = parser.combine([parser.parse(text, "app.service.yaml")])
    found = units.found(
        [connection(cgroup_id=7), connection(cgroup_id=11)],
        named,
        (350,),
        lambda id: effect.under(policy if id == 7 else None),
    )
    assert found[APP].counts == [Counts(1, 0, 1, 0)]
    assert found[OTHER].counts == [Counts(1, 0, 1, 1)]


def test_looks_remember_the_most() -> None:
    """A silence that ended between two looks, and a unit that is gone; the connections at risk are
    those of the last look."""
    looks = Looks()
    for silences in ((100_000, 3000), (1000,), ()):
        open_now = [connection(silence_ms=each) for each in silences]
        looks.add(units.found(open_now, named, (350,)))
    (unit,) = looks.units.values()
    assert looks.count == 3
    assert (unit.connections, unit.longest_silence_ms) == (2, 100_000)
    assert (unit.counts, unit.at_risk) == ([Counts(2, 0, 2)], [])


def test_looks_have_a_bound() -> None:
    """Strangers who make units without end take no more room, and that it was too many is known."""
    looks = Looks()
    for number in range(units.UNITS_MAX // 4096 + 2):
        several = [connection(cgroup_id=number * 4096 + each) for each in range(4096)]
        looks.add(units.found(several, lambda id: Named(f"{id}.service", f"/{id}"), (350,)))
    assert len(looks.units) == units.UNITS_MAX
    assert looks.left_out


def test_hundred_thousand_connections_are_counted_soon() -> None:
    """The pure part of the second that an audit of so many may take."""
    kinds = [{"keepalive": OFF}, {"keepalive": BY_POLICY}, {"keepalive": on(7200)}]
    many = [
        connection(
            cgroup_id=each % 1000, peer_port=each % 65536, silence_ms=each, **kinds[each % 3]
        )
        for each in range(100_000)
    ]
    began = time.process_time()
    found = units.found(many, lambda id: Named(f"{id}.service", f"/{id}"), (350,))
    assert time.process_time() - began < 1
    assert sum(unit.counts[0].at_risk for unit in found.values()) == 66_667
