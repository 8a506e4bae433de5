"""Options that containers ask for: which of many count, and what becomes of them."""

from __future__ import annotations

from typing import Any

from plans import container

from kabpf.plan import containers, diff
from kabpf.plan.automaton import Automaton
from kabpf.plan.containers import ASKED_MAX, Naming, refusals
from kabpf.plan.desired import Actual, Plan
from kabpf.plan.resolve import resolve
from kabpf.plan.state import RECORDS_MAX, Cgroup, record
from kabpf.policy import parser
from kabpf.policy.model import Policy

ROOT = Cgroup(1, 0, "/")


def policies(text: str = "containers: on\n") -> tuple[Policy, ...]:
    return parser.combine([parser.parse(text.encode(), "/p.yaml")])


def asking(idle: int, **facts: Any) -> containers.Container:
    return container({"labels": {"io.kabpf.keepalive": f"idle={idle}"}, **facts})


def planned(found: tuple[Policy, ...], idles: dict[int, int]) -> tuple[Plan, Automaton]:
    """The plan where containers' cgroups of these ids ask for these idle times."""
    automaton = Automaton(found)
    cgroups = [ROOT, *(Cgroup(id, 1, f"/docker-{id:064x}.scope") for id in idles)]
    known = {id: asking(idle) for id, idle in idles.items()}
    return resolve(found, automaton, cgroups, 1 << 16, known), automaton


def test_containers_that_ask_for_the_same_share_a_policy() -> None:
    """It is among those that are made, and what makes them is not."""
    plan, _ = planned(policies(), {7: 60, 8: 60, 9: 61})
    assert [each.name for each in plan.made] == ["container:idle=60s", "container:idle=61s"]
    assert plan.cgroups[7].policy is plan.cgroups[8].policy
    assert plan.asks
    desired = diff.number(map(record, plan.made), {}, 64)
    changes = diff.diff(plan, Actual(), desired)
    assert changes.cgroups[7].policy_id == changes.cgroups[8].policy_id != 0
    assert len(changes.records) == 2


def test_no_policy_is_made_where_nobody_asks() -> None:
    """Nor for a container that a selector names, or that asks for nonsense."""
    found = policies(
        "containers: {idle: 30s..1h}\npolicies:\n"
        "  ours: {select: [{container: {name: web}}], keepalive: on}\n"
    )
    cgroup = Cgroup(2, 1, f"/docker-{2:064x}.scope")
    for facts in (asking(60, name="web"), asking(5), container({})):
        plan = resolve(found, Automaton(found), [ROOT, cgroup], 1 << 16, {2: facts})
        assert plan.asked == ()


def test_of_too_many_the_oldest_have_what_they_ask_for() -> None:
    """In whatever order they are seen, so that no look at all of them takes one away."""
    ids = range(2, ASKED_MAX + 100)
    for order in (ids, reversed(ids)):
        plan, automaton = planned(policies(), {id: 1000 + id for id in order})
        have = [id for id in ids if plan.cgroups[id].policy]
        assert have == [*ids][:ASKED_MAX]
        assert len(plan.asked) == ASKED_MAX
        assert automaton.containers and automaton.containers.is_full
        assert automaton.containers.chosen(asking(1000)) is None
        assert automaton.containers.chosen(asking(1002))  # which others have, too


def test_wish_is_admitted_when_another_one_is_forgotten() -> None:
    """As containers come and go; and until then the refusal says why."""
    _, automaton = planned(policies(), {id: 1000 + id for id in range(2, ASKED_MAX + 2)})
    naming, fresh = automaton.containers, asking(7, name="web")
    assert naming
    assert refusals(naming, {5: fresh, 6: asking(1002)}) == {
        5: "container web of podman: io.kabpf.keepalive: containers have 256 others already,"
        " expected one of these"
    }
    naming.forget(["container:idle=1002s"])
    assert refusals(naming, {5: fresh}) == {}
    assert naming.chosen(fresh)


def test_those_that_containers_have_keep_others_out() -> None:
    """As `explain` sees it, which looks at no other container; what is not allowed any more has no
    part in it."""
    naming = Naming(policies("containers: {idle: 100..9999}\n"))
    have = [f"container:idle={idle}s,probes=3" for idle in range(90, 100 + ASKED_MAX)]
    naming.admit(have)
    assert [*naming.asked] == have[10:]
    assert naming.refusal(asking(9000)).startswith("containers have 256 others already")
    assert naming.chosen(asking(9000)) is None
    both = container({"labels": {"io.kabpf.keepalive": "idle=100,probes=3"}})
    assert naming.chosen(both) and not naming.refusal(both)


def test_refusal_is_one_line_whatever_a_container_is_called() -> None:
    """So that nobody writes lines of their own into kabpfd's log."""
    naming = Naming(policies())
    facts = container({"name": "a\nb", "labels": {"io.kabpf.keepalive": "\n"}})
    assert "\n" not in refusals(naming, {1: facts})[1]
    facts = container({"name": "a" * 2**20, "labels": {"io.kabpf.keepalive": "\U0001f600" * 2**18}})
    assert len(refusals(naming, {1: facts})[1]) < 1000


def test_files_have_all_the_room_that_they_need() -> None:
    """Where they have nearly as many policies as the kernel can have, containers have fewer."""
    found = policies(
        "containers: on\npolicies:\n  a: {select: [{unit: a.service}], keepalive: on}\n"
    )
    own, template = found
    many = (*(own._replace(name=f"{number}") for number in range(RECORDS_MAX - 3)), template)
    naming = Naming(many)
    assert [bool(naming.chosen(asking(idle))) for idle in (60, 61, 62)] == [True, True, False]
    assert Naming((*many[:-1], own, own, template)).is_full
