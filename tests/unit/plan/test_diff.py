"""The plan for a tree of cgroups (golden folders in plans/), and the steps that bring the kernel to
it, applied to a kernel of dictionaries."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mkdir import Tables, find_birth
from plans import (
    BIRTHS,
    POLICIES,
    Files,
    Policies,
    containers_of,
    policies_of,
    read,
    spelled,
    tree,
    unit_directories,
)

from kabpf.containers.facts import Container
from kabpf.plan import diff, names
from kabpf.plan.automaton import Automaton
from kabpf.plan.births import ANYWHERE, GENERATIONS, UNKNOWN
from kabpf.plan.desired import Actual, Plan
from kabpf.plan.resolve import resolve, resolve_at, resolve_one
from kabpf.plan.state import (
    BirthEntry,
    Cgroup,
    CgroupEntry,
    Changes,
    Needs,
    PolicyRecord,
    record,
)
from kabpf.policy import files, parser
from kabpf.policy.files import Directories
from kabpf.policy.model import Options, Range
from kabpf.systemd import relations

CASES = sorted((Path(__file__).parents[2] / "plans").iterdir())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plan_of_a_tree_is_the_one_that_was_written_down(case: Path) -> None:
    """Each folder's policy files give each of its cgroups the policy that its plan.yaml names; a
    cgroup that is missing there has none."""
    where = Directories(case / "policy.yaml", (case / "policy.d",))
    policies = parser.combine([files.read(path) for path in files.paths(where)])
    policies = relations.followed(policies, unit_directories(case))
    cgroups = tree((case / "cgroups").read_text().splitlines())
    containers = containers_of(case, cgroups)
    resolved = resolve(policies, Automaton(policies), cgroups, BIRTHS, containers).cgroups
    found = [(cgroup.path, resolved[cgroup.id].policy) for cgroup in cgroups]
    names = {path: each.name for path, each in found if each}
    assert names == yaml.safe_load((case / "plan.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_cgroup_is_resolved_by_its_path_as_in_its_tree(case: Path) -> None:
    """State, container and policy come out the same; what it inherits it has from above."""
    where = Directories(case / "policy.yaml", (case / "policy.d",))
    policies = parser.combine([files.read(path) for path in files.paths(where)])
    automaton = Automaton(relations.followed(policies, unit_directories(case)))
    cgroups = {each.id: each for each in tree((case / "cgroups").read_text().splitlines())}
    containers = containers_of(case, cgroups.values())
    expected = resolve(policies, automaton, cgroups.values(), BIRTHS, containers).cgroups
    facts = {cgroups[id].path: each for id, each in containers.items()}

    def look_up(some: Iterable[Cgroup]) -> dict[int, Container]:
        return {each.id: facts[each.path] for each in some if each.path in facts}

    for id, cgroup in cgroups.items():
        found = resolve_at(automaton, cgroup, look_up)
        if not found.policy and cgroup.parent_id:
            found = found._replace(policy=expected[cgroup.parent_id].policy)
        assert found == expected[id], cgroup.path


def test_first_plan_is_written_once() -> None:
    """From an empty kernel one apply brings everything, and nothing is left to do then."""
    plan, desired = planned({"a": ({"cgroup": "/a"}, {"idle": 5})}, tree(["/a/b", "/c"]), Actual())
    changes = diff.diff(plan, Actual(), desired)
    assert changes.records == {1: PolicyRecord("a", idle(5))}
    assert changes.births == diff.rows(plan, diff.policy_ids(desired), 0)
    assert changes.names == names.pieces(["a"])
    assert changes.cgroups.keys() == plan.cgroups.keys()
    assert [changes.cgroups[id].policy_id for id in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert changes.updates == settled({id: changes.cgroups[id] for id in (2, 3)})
    assert all(changes.cgroups[id].owed and not changes.cgroups[id].was for id in (2, 3))
    actual = applied(Actual(), changes)
    assert not any(entry.owed for entry in actual.cgroups.values())
    assert not diff.diff(plan, actual, desired)


def test_no_changes_are_false() -> None:
    """Changes are true if anything is to be written, whatever it is."""
    assert not Changes()
    assert Changes(stale_records=(1,))
    assert Changes(updates={1: CgroupEntry(1, 1)})
    assert Changes(needs=Needs())


def test_changed_options_are_owed_to_open_sockets() -> None:
    """With other options a policy is another record under another id; the cgroups move there,
    remember the old one until their sockets were updated, and only then it goes."""
    before = reconciled(Actual(), {"a": ({"cgroup": "/a"}, {"idle": 5})}, tree(["/a/b"]))
    plan, desired = planned({"a": ({"cgroup": "/a"}, {"idle": 6})}, tree(["/a/b"]), before)
    changes = diff.diff(plan, before, desired)
    assert changes.records == {2: PolicyRecord("a", idle(6))}
    assert policies_and_debts(changes.cgroups) == {2: (2, (1,), True), 3: (2, (1,), True)}
    assert changes.updates == settled(changes.cgroups)
    assert changes.stale_records == ()
    between = applied(before, changes)
    assert policies_and_debts(between.cgroups) == {
        1: (0, (), False), 2: (2, (), False), 3: (2, (), False),
    }  # fmt: skip
    assert diff.diff(plan, between, desired) == Changes(stale_records=(1,))


@pytest.mark.parametrize("off", [True, False])
def test_unloaded_policy_is_remembered_for_its_sockets(off: bool) -> None:
    """Where keepalive is switched off, or no policy is left, the sockets keep their options and the
    entry the policy that they have them from, for the next one to replace."""
    one = {"a": ({"cgroup": "/a"}, {"idle": 5})}
    actual = reconciled(Actual(), one, tree(["/a"]))
    actual = reconciled(actual, {"a": ({"cgroup": "/a"}, "off")} if off else {}, tree(["/a"]))
    unloaded = actual.cgroups[2]
    assert (bool(unloaded.policy_id), unloaded.was, unloaded.owed) == (off, (1,), False)
    assert actual.records[1] == PolicyRecord("a", idle(5))
    plan, desired = planned({"b": ({"cgroup": "/a"}, {"idle": 7})}, tree(["/a"]), actual)
    changes = diff.diff(plan, actual, desired)
    assert changes.cgroups[2].was == (1,)
    assert changes.cgroups[2].owed
    again = reconciled(actual, one, tree(["/a"]))
    assert policies_and_debts(again.cgroups)[2] == (1, (), False)


@pytest.mark.parametrize(
    ("rules", "remembered"),
    [
        ({"keepalive": {"idle": 6, "probes": 3}}, False),
        ({"keepalive": {"idle": "6..9", "probes": 3}, "mode": "override"}, False),
        ({"keepalive": {"idle": 6}}, True),  # probes of 4 are on sockets still
        ({"keepalive": {"idle": 6, "probes": 3}, "existing": "false"}, True),
        ({"keepalive": {"idle": 6, "probes": 3}, "direction": "in"}, True),
        ({"keepalive": {"idle": 6, "probes": 3}, "loopback": "false"}, True),
        (
            {
                "keepalive": {"idle": 6, "probes": 3},
                "destinations": [{"to": "10.0.0.0/8", "keepalive": "off"}],
            },
            True,
        ),
        ({"keepalive": "off"}, True),
    ],
)
def test_former_policy_is_remembered_while_sockets_may_have_its_values(
    rules: dict[str, object], remembered: bool
) -> None:
    """A cgroup forgets a former policy when every one of its open sockets was given something else
    in the place of each of its values."""
    before = {"select": [{"cgroup": "/a"}], "keepalive": {"idle": 5, "probes": 4}}
    actual = brought(Actual(), {"a": before}, tree(["/a"]))
    actual = brought(actual, {"a": before | rules}, tree(["/a"]))
    assert actual.cgroups[2].was == ((1,) if remembered else ())
    assert (1 in actual.records) == remembered


def test_former_policies_are_remembered_up_to_four() -> None:
    """The latest come first, among them one that came back; what is off has no values to
    remember."""
    actual = Actual()
    for idle_s in (1, 2, "off", 3, 4, 5, 6, 4):
        keepalive = idle_s if idle_s == "off" else {"idle": idle_s}
        one = {"select": [{"cgroup": "/a"}], "keepalive": keepalive, "existing": "false"}
        actual = brought(actual, {"a": one}, tree(["/a"]))
    entry = actual.cgroups[2]
    values = [actual.records[id].options.idle_s for id in (entry.policy_id, *entry.was)]
    assert values == [Range.exactly(value) for value in (4, 6, 5, 4, 3)]


def test_existing_is_made_up_for_when_it_is_said_later() -> None:
    """A policy that left open sockets alone updates them once it says so."""
    one = {"select": [{"cgroup": "/a"}], "keepalive": {"idle": 5}}
    actual = brought(Actual(), {"a": one | {"existing": "false"}}, tree(["/a"]))
    assert not actual.cgroups[2].owed
    plan, desired = planned_policies({"a": one}, tree(["/a"]), actual)
    assert diff.diff(plan, actual, desired).cgroups[2].owed


def test_former_policies_make_room_for_new_ones() -> None:
    """Where there is no id left, former policies are forgotten, and then there is."""
    cgroups = tree(["/a", "/b", "/c"])
    actual = Actual()
    for idle_s in (1, 2, 3):
        names = {
            name: {"select": [{"cgroup": f"/{name}"}], "keepalive": {"idle": idle_s}}
            | {"direction": "out"}
            for name in "abc"
        }
        actual = brought(actual, names, cgroups)
    assert len(actual.records) == 9
    policies = read({name: one | {"keepalive": {"idle": 4}} for name, one in names.items()})
    with pytest.raises(diff.TooManyError):
        diff.number(map(record, policies), actual.records, 10)
    actual = applied(actual, diff.forget_former(actual))
    assert len(actual.records) == 3
    assert len(diff.number(map(record, policies), actual.records, 10)) == 3


def test_births_that_have_no_room_beside_the_old_ones_come_after_them() -> None:
    """Rules of which the kernel can't hold old and new together are replaced in two passes."""
    old = {f"o{n}": ({"unit": f"o{n}.service"}, {"idle": 5}) for n in range(10)}
    new = {f"n{n}": ({"unit": f"n{n}.service"}, {"idle": 5}) for n in range(10)}
    actual = reconciled(Actual(), old, tree([]))
    plan, desired = planned(new, tree([]), actual)
    plan = replace(plan, births_max=20)
    changes = diff.diff(plan, actual, desired)
    assert changes == Changes(stale_births=changes.stale_births, stale_names=changes.stale_names)
    assert len(changes.stale_births) == len(changes.stale_names) == 20
    after = diff.diff(plan, applied(actual, changes), desired)
    assert len(after.births) == 20


def test_existing_says_nothing_about_younger_cgroups() -> None:
    """`existing: false` leaves sockets alone that are older than the policy; those of a cgroup that
    was born under it are updated."""
    one = {"select": [{"cgroup": "/a"}], "keepalive": {"idle": 5}, "existing": "false"}
    plan, desired = planned_policies({"a": one}, tree(["/a"]))
    born = {2: CgroupEntry(plan.cgroups[2].state, 0)}
    for new in (False, True):
        changed = diff.changed_entries(
            plan, {2: plan.cgroups[2]}, born, desired, diff.policy_ids(desired), 0, new=new
        )
        assert changed[2].owed == new


@pytest.mark.parametrize(("mode", "owed"), [("fill", False), ("override", True), ("enforce", True)])
def test_sockets_are_updated_to_turn_keepalive_off(mode: str, owed: bool) -> None:
    """`keepalive: off` says something of open sockets, unless the application's word counts."""
    off = {"select": [{"cgroup": "/a"}], "keepalive": "off", "mode": mode}
    plan, desired = planned_policies({"a": off}, tree(["/a"]))
    changes = diff.diff(plan, Actual(), desired, updates=False)
    assert changes.cgroups[2].owed == owed


@pytest.mark.parametrize(
    ("rules", "needs"),
    [
        ({"keepalive": {"idle": 5}, "mode": "override"}, Needs()),
        ({"keepalive": {"idle": 5}, "mode": "enforce"}, Needs(setsockopt=True)),
        ({"keepalive": {"probes": "3..5"}}, Needs(setsockopt=True)),
        ({"keepalive": {"syn_retries": 3}}, Needs(before_syn=True)),
        ({"keepalive": {"connect_timeout": 3}}, Needs(before_syn=True)),
        ({"keepalive": {"idle": 5}, "log": "sockets"}, Needs(setsockopt=True)),
        ({"keepalive": "off", "log": "sockets"}, Needs()),
        ({"keepalive": "off"}, Needs()),
        ({"keepalive": "off", "mode": "override"}, Needs()),
        ({"keepalive": "off", "mode": "enforce"}, Needs(setsockopt=True)),
        (
            {
                "keepalive": "off",
                "destinations": [{"to": "10.0.0.0/8", "idle": "5..9", "syn_retries": 2}],
            },
            Needs(True, True),
        ),
    ],
)
def test_needs_come_first_and_go_last(rules: dict[str, object], needs: Needs) -> None:
    """What a policy needs is on before any cgroup has it, and off when none has it any more."""
    cgroups = tree(["/a"])
    plan, desired = planned_policies({"a": {"select": [{"cgroup": "/a"}]} | rules}, cgroups)
    changes = diff.diff(plan, Actual(), desired)
    assert changes.needs == (needs if any(needs) else None)
    actual = brought(Actual(), {"a": {"select": [{"cgroup": "/a"}]} | rules}, cgroups)
    assert actual.needs == needs
    plan, desired = planned_policies({}, cgroups)
    changes = diff.diff(plan, actual, desired)
    assert (changes.needs, bool(changes.cgroups)) == (None, True)
    assert brought(actual, {}, cgroups).needs == Needs()


def test_updates_may_wait() -> None:
    """Without updates everything else is written, and open sockets stay owed."""
    cgroups = tree(["/a"])
    plan, desired = planned({"a": ({"cgroup": "/a"}, {"idle": 5})}, cgroups, Actual())
    actual = applied(Actual(), diff.diff(plan, Actual(), desired, updates=False))
    assert actual.cgroups[2].owed
    assert not diff.diff(plan, actual, desired, updates=False)
    assert diff.diff(plan, actual, desired).updates.keys() == {2}


def test_cgroup_without_an_entry_is_owed_its_sockets() -> None:
    """A cgroup that the kernel does not know yet may have sockets already."""
    policies = {"a": ({"cgroup": "/a"}, {"idle": 5})}
    actual = reconciled(Actual(), policies, tree(["/a"]))
    plan, desired = planned(policies, tree(["/a", "/a/b", "/c"]), actual)
    changes = diff.diff(plan, actual, desired)
    assert policies_and_debts(changes.cgroups) == {3: (1, (), True), 4: (0, (), False)}
    assert changes.updates.keys() == {3}


def test_entry_of_a_removed_cgroup_goes() -> None:
    """What the tree does not have any more is deleted, and that is all."""
    policies = {"a": ({"cgroup": "/a"}, {"idle": 5})}
    actual = reconciled(Actual(), policies, tree(["/a", "/b"]))
    plan, desired = planned(policies, tree(["/a"]), actual)
    assert diff.diff(plan, actual, desired) == Changes(stale_cgroups=(3,))


def test_entry_of_a_cgroup_out_of_reach_stays() -> None:
    """With the records that it refers to, whatever the policies are now."""
    one = {"a": ({"cgroup": "/a"}, {"idle": 5})}
    actual = reconciled(Actual(), one, tree(["/a/b"]))
    plan, desired = planned({"a": ({"cgroup": "/a"}, {"idle": 6})}, tree(["/a"]), actual)
    plan = replace(plan, unreached=frozenset({3}))
    while changes := diff.diff(plan, actual, desired):
        actual = applied(actual, changes)
    assert actual.cgroups[3].policy_id == 1
    assert actual.records[1] == PolicyRecord("a", idle(5))


def test_cgroups_that_come_and_go_keep_what_is_stale_no_longer_than_wanted() -> None:
    """Where it settles, stale births and records go beside entries of cgroups, but for those that
    an entry still has."""
    actual = reconciled(Actual(), {"a": ({"cgroup": "/a"}, {"idle": 5})}, tree(["/a"]))
    born = replace(actual, cgroups=actual.cgroups | {7: CgroupEntry(2, 1)})
    plan, desired = planned({}, tree(["/a"]), born)
    plan.cgroups[8] = plan.cgroups[1]  # not in the kernel yet
    assert not diff.diff(plan, born, desired).stale_births
    changes = diff.diff(plan, born, desired, settles=True)
    assert 8 in changes.cgroups
    assert changes.stale_births
    assert changes.stale_records == ()
    assert not changes.is_of_cgroups
    assert changes._replace(stale_births=(), stale_names=()).is_of_cgroups


def test_interrupted_apply_is_completed_first() -> None:
    """Entries that still owe their sockets an update come before any other change, as they are:
    they name the policies between which the sockets are."""
    actual = reconciled(Actual(), {"a": ({"cgroup": "/a"}, {"idle": 5})}, tree(["/a", "/b"]))
    owed = CgroupEntry(actual.cgroups[2].state, 1, True, (9,))
    former = {9: PolicyRecord("was", idle(4))}
    actual = replace(actual, records=actual.records | former, cgroups=actual.cgroups | {2: owed})
    plan, desired = planned({"b": ({"cgroup": "/a"}, {"idle": 6})}, tree(["/a"]), actual)
    assert diff.diff(plan, actual, desired) == Changes(updates=settled({2: owed}))


def test_state_alone_is_written_without_an_update() -> None:
    """Where other selectors change how far a cgroup's path has matched, its sockets are left."""
    one = {"a": ({"cgroup": "/a"}, {"idle": 5})}
    actual = reconciled(Actual(), one, tree(["/a"]))
    plan, desired = planned(one | {"b": ({"cgroup": "/a/b"}, {"idle": 6})}, tree(["/a"]), actual)
    changes = diff.diff(plan, actual, desired)
    assert changes.cgroups.keys() == {1, 2}
    assert changes.updates == {}
    assert changes.cgroups[2]._replace(state=0) == actual.cgroups[2]._replace(state=0)


def test_stale_births_and_records_wait_for_everything_else() -> None:
    """Old births go when nothing new is to be written, and old records when no birth leads to them:
    a cgroup born meanwhile may need them."""
    before = reconciled(Actual(), {"a": ({"unit": "a.service"}, {"idle": 5})}, tree(["/b"]))
    plan, desired = planned({"b": ({"unit": "b.service"}, {"idle": 6})}, tree(["/b"]), before)
    changes = diff.diff(plan, before, desired)
    assert (changes.stale_births, changes.stale_records) == ((), ())
    before = applied(before, changes)
    changes = diff.diff(plan, before, desired)
    stale = names.pieces(["a.service", "a.socket"])
    assert changes == Changes(stale_births=changes.stale_births, stale_names=changes.stale_names)
    assert set(changes.stale_births) == {(ANYWHERE, number) for number in stale.values()}
    assert set(changes.stale_names) == stale.keys()
    before = applied(before, changes)
    assert diff.diff(plan, before, desired) == Changes(stale_records=(1,))


def test_unrelated_unit_changes_only_its_own_births() -> None:
    """A new policy on a unit leaves the cgroups, states and births of others alone."""
    one = {"a": ({"cgroup": "/a/b"}, {"idle": 5}), "u": ({"unit": "u.service"}, {"idle": 6})}
    actual = reconciled(Actual(), one, tree(["/a/b/c", "/d/u.service"]))
    more = one | {"x": ({"unit": "x.service"}, {"idle": 7})}
    plan, desired = planned(more, tree(["/a/b/c", "/d/u.service"]), actual)
    new = ("x.service", "x.socket")
    births = {
        (ANYWHERE, names.number(name)): BirthEntry(
            ANYWHERE, 3, False, plan.births[ANYWHERE, name].strength
        )
        for name in new
    }
    records = {3: PolicyRecord("x", idle(7))}
    expected = Changes(records=records, births=births, names=names.pieces(new))
    assert diff.diff(plan, actual, desired) == expected


def test_unrelated_policy_leaves_the_globs_alone() -> None:
    """Only a change of globs makes another generation of them; then every cgroup moves there, and
    the old one goes with its rows when nothing is left in it."""
    one = {"a": ({"cgroup": "/a/w-*"}, {"idle": 5}), "u": ({"unit": "u@.service"}, {"idle": 6})}
    cgroups = tree(["/a/w-1/c", "/d/u@1.service"])
    actual = reconciled(Actual(), one, cgroups)
    for unrelated in (
        one | {"x": ({"unit": "x.service"}, {"idle": 7})},
        one | {"u": ({"unit": "u@.service"}, {"idle": 8})},
    ):
        plan, desired = planned(unrelated, cgroups, actual)
        changes = diff.diff(plan, actual, desired)
        assert changes.globs is None
        assert {state % GENERATIONS for state, _ in changes.births} == {0}
        assert {entry.state % GENERATIONS for entry in changes.cgroups.values()} <= {0}
    more = one | {"b": ({"cgroup": "/a/v-*"}, {"idle": 5})}
    plan, desired = planned(more, cgroups, actual)
    changes = diff.diff(plan, actual, desired)
    assert changes.globs == (1, plan.globs_digest, plan.globs.blocks)
    assert changes.births == diff.rows(plan, diff.policy_ids(desired), 1)
    assert {entry.state % GENERATIONS for entry in changes.cgroups.values()} == {1}
    assert changes.cgroups.keys() == actual.cgroups.keys()
    between = applied(actual, changes)
    unmoved = replace(between, cgroups={**between.cgroups, 99: actual.cgroups[1]})
    waiting = replace(plan, unreached=frozenset({99}))
    assert not diff.diff(waiting, unmoved, desired)
    last = diff.diff(plan, between, desired)
    assert set(last.stale_births) == actual.births.keys()
    assert last.stale_generations == (0,)
    assert applied(between, last).generations == {1: plan.globs_digest}


def test_unrelated_path_changes_only_its_ancestors() -> None:
    """A new policy on a path changes the states of the cgroups above it, and no others."""
    one = {"a": ({"cgroup": "/a/b"}, {"idle": 5}), "u": ({"unit": "u.service"}, {"idle": 6})}
    actual = reconciled(Actual(), one, tree(["/a/b/c", "/d/u.service"]))
    more = one | {"x": ({"cgroup": "/d/x/y"}, {"idle": 7})}
    plan, desired = planned(more, tree(["/a/b/c", "/d/u.service"]), actual)
    changes = diff.diff(plan, actual, desired)
    by_path = {cgroup.path: cgroup.id for cgroup in tree(["/a/b/c", "/d/u.service"])}
    assert changes.cgroups.keys() == {by_path["/"], by_path["/d"]}
    assert {state for state, _ in changes.births}.isdisjoint(
        {ANYWHERE, actual.cgroups[by_path["/a"]].state, actual.cgroups[by_path["/a/b"]].state}
    )


def test_number_keeps_ids_and_fills_gaps() -> None:
    """A record keeps its id, whatever its selectors; a new one gets a free id; 0 is none's."""
    a, b, c = (PolicyRecord(name, Options()) for name in "abc")
    policies = policies_of({"c": ({"cgroup": "/"}, "on"), "a": ({"cgroup": "/new"}, "on")})
    assert diff.number(map(record, policies), {1: b, 3: a}, POLICIES) == {2: c, 3: a}


def test_id_of_a_retired_policy_is_not_given_away() -> None:
    """An id is taken as long as the kernel has its record, because sockets may have its options."""
    actual = reconciled(Actual(), {"a": ({"cgroup": "/a"}, {"idle": 5})}, tree(["/a"]))
    actual = reconciled(actual, {}, tree(["/a"]))
    _, desired = planned({"b": ({"cgroup": "/b"}, {"idle": 6})}, tree(["/a"]), actual)
    assert list(desired) == [2]


def test_too_many_policies_are_an_error() -> None:
    """Ids are below the limit, retired ones included; one policy too many raises TooManyError."""
    policies = policies_of({name: ({"cgroup": f"/{name}"}, "on") for name in "abc"})
    assert sorted(diff.number(map(record, policies), {}, 4)) == [1, 2, 3]
    with pytest.raises(diff.TooManyError):
        diff.number(map(record, policies), {}, 3)
    with pytest.raises(diff.TooManyError):
        diff.number(map(record, policies), {2: PolicyRecord("old", Options())}, 4)


def test_state_without_room_is_written_as_unknown() -> None:
    """A cgroup whose state the kernel's table does not hold gets UNKNOWN, so that births below it
    are asked about."""
    policies = policies_of({"a": ({"unit": "a.service"}, "on"), "b": ({"cgroup": "/b/c"}, "on")})
    plan = resolve(policies, Automaton(policies), tree(["/b"]), 6)
    entries = diff.diff(plan, Actual(), diff.number(map(record, policies), {}, POLICIES)).cgroups
    assert {state for state, _ in plan.births} == {ANYWHERE, plan.cgroups[1].state}
    assert entries[1].state == plan.cgroups[1].state
    assert entries[2].state == UNKNOWN != plan.cgroups[2].state


def test_state_that_a_doubtful_glob_leads_to_is_known() -> None:
    """Once user space has resolved a cgroup that a glob names, the kernel knows what is born in it;
    but not where several globs name it together of which only user space can tell."""
    policies = policies_of(
        {"a": ({"cgroup": "/?\u00e9/**"}, "on"), "b": ({"cgroup": "/\u00e9?/x/**"}, "on")}
    )
    plan = resolve(
        policies, Automaton(policies), tree(["/\u00e0\u00e9/d", "/\u00e9\u00e9/x"]), BIRTHS
    )
    entries = diff.diff(plan, Actual(), diff.number(map(record, policies), {}, POLICIES)).cgroups
    assert [entries[id].state for id in (2, 3)] == [plan.cgroups[id].state for id in (2, 3)]
    assert entries[4].state == UNKNOWN != plan.cgroups[4].state


PATHS = ("/", "/a", "/b", "/a/b", "/a/*", "/a/**", "/**/b", "/a*", "/**/*b", "/a*/b*", "/?")
SELECTORS = st.one_of(
    st.sampled_from(PATHS).map(lambda path: {"cgroup": path}),
    st.sampled_from(("a.service", "b.service", "*.service", "a*.service")).map(
        lambda unit: {"unit": unit}
    ),
)
OPTIONS = st.sampled_from(("off", {"idle": 5}, {"idle": 6}))
FILES = st.dictionaries(st.sampled_from("pqr"), st.tuples(SELECTORS, OPTIONS))
TREES = st.lists(st.sampled_from(("/a", "/a/b", "/b", "/a/a.service", "/b/a.service", "/a/b/b")))
STEPS = st.lists(st.tuples(FILES, TREES, st.lists(st.integers(0, 63), max_size=6)), max_size=4)


@settings(max_examples=120)
@given(STEPS)
def test_every_way_from_plan_to_plan_keeps_references_whole(
    steps: list[tuple[Files, list[str], list[int]]],
) -> None:
    """Whatever the policies were, a few passes bring the next ones, after which nothing is left to
    do; at no moment does a cgroup or a birth refer to a record that is not there, also when cgroups
    are born between reading and writing."""
    actual = Actual()
    for named, paths, seeds in steps:
        cgroups = tree(paths)
        for id in actual.cgroups.keys() - {cgroup.id for cgroup in cgroups}:
            del actual.cgroups[id]  # kabpf_cgroup_rmdir
        born = iter(seeds)
        for _ in range(10):
            plan, desired = planned(named, cgroups, actual)
            changes = diff.diff(plan, actual, desired)
            if not changes:
                break
            if (seed := next(born, None)) is not None:
                bear(actual, cgroups, seed)
            actual = applied(actual, changes)
        assert not changes
        for cgroup in cgroups:
            entry, resolved = actual.cgroups[cgroup.id], plan.cgroups[cgroup.id]
            has = actual.records.get(entry.policy_id)
            assert (entry.state, has) == (
                diff.located(resolved.state, diff.generation(plan, actual)),
                record(resolved.policy) if resolved.policy else None,
            )
        stale = actual.records.keys() - desired.keys()
        assert stale <= {id for entry in actual.cgroups.values() for id in entry.was}
        number = diff.generation(plan, actual)
        assert actual.births == diff.rows(plan, diff.policy_ids(desired), number)
        assert actual.generations == {number: plan.globs_digest}


@settings(max_examples=200)
@given(FILES, st.lists(st.tuples(FILES, st.integers(0, 30)), max_size=12), FILES)
def test_birth_during_a_change_of_globs_follows_the_old_policies_or_the_new(
    before: Files, killed: list[tuple[Files, int]], after: Files
) -> None:
    """Whenever a process is killed in a change, and whatever is applied then: a cgroup born below
    any other has the policy that it would have had before, or that of one of the changes; and once
    one is complete its."""
    cgroups = tree(["/a/b", "/b/a.service", "/ab"])
    actual = reconciled(Actual(), before, cgroups)
    possible = [plan_of_births(before, cgroups)]
    for named, count in [*killed[: GENERATIONS - 2], (after, -1)]:
        plan, desired = planned(named, cgroups, actual)
        if plan.globs_digest in actual.generations.values():
            continue  # a change within a generation is made row by row
        possible.append(plan_of_births(named, cgroups))
        for _ in range(10):
            changes = diff.diff(plan, actual, desired)
            for now in itertools.islice(
                single_writes(actual, changes), None if count < 0 else count
            ):
                actual = now
                count -= count > 0
                for found in born_everywhere(actual, cgroups):
                    assert found in set().union(*possible), found
            plan, desired = planned(named, cgroups, actual)
            if not count or not changes:
                break
        if count:
            assert not changes
            assert born_everywhere(actual, cgroups) == possible[-1]
            possible = possible[-1:]


CHILDREN = ("a", "b", "ab", "ba", "a.service", "b.service", "c.service", "\u00e9")


def plan_of_births(named: Files, cgroups: list[Cgroup]) -> set[tuple[str, str, Options | None]]:
    """What each of CHILDREN would have in each of the cgroups, as the kernel sees it. Of one it has
    doubts."""
    actual = reconciled(Actual(), named, cgroups)
    found = born_everywhere(actual, cgroups)
    policies = policies_of(named)
    automaton = Automaton(policies)
    resolved = resolve(policies, automaton, cgroups, BIRTHS).cgroups
    for cgroup in cgroups:
        for name in CHILDREN:
            child = resolve_one(automaton, Cgroup(99, cgroup.id, f"/{name}"), resolved[cgroup.id])
            options = child.policy.rules.options if child.policy else None
            if name != "\u00e9":
                assert (cgroup.path, name, options) in found
    return found


def born_everywhere(actual: Actual, cgroups: list[Cgroup]) -> set[tuple[str, str, Options | None]]:
    found = set()
    for cgroup in cgroups:
        for name in CHILDREN:
            entry = born(actual, actual.cgroups[cgroup.id], name)
            record = actual.records.get(entry.policy_id)
            found.add((cgroup.path, name, record.options if record else None))
    return found


def single_writes(actual: Actual, changes: Changes) -> Iterator[Actual]:
    """As `writes`, a row at a time, and without what comes before births."""
    actual = replace(actual, records=actual.records | changes.records)
    if changes.globs:
        number, digest, _ = changes.globs
        yield (actual := replace(actual, generations=actual.generations | {number: 1}))
        yield (actual := replace(actual, generations=actual.generations | {number: digest}))
    actual = replace(actual, names=actual.names | changes.names)
    for step, birth in changes.births.items():
        yield (actual := replace(actual, births=actual.births | {step: birth}))
    for id, entry in (*changes.cgroups.items(), *changes.updates.items()):
        yield (actual := replace(actual, cgroups=actual.cgroups | {id: entry}))
    for step in changes.stale_births:
        yield (actual := replace(actual, births=without(actual.births, (step,))))
    *_, last = writes(actual, changes)
    yield last


def bear(actual: Actual, cgroups: list[Cgroup], seed: int) -> None:
    """A mkdir as kabpf_cgroup_mkdir sees it."""
    parent = cgroups[seed % len(cgroups)]
    name = ("a", "b", "a.service", "b.service")[seed % 4]
    path = f"{parent.path.rstrip('/')}/{name}"
    above = actual.cgroups.get(parent.id)
    if above is None or path in (cgroup.path for cgroup in cgroups):
        return
    id = 100 + len(cgroups)
    cgroups.append(Cgroup(id, parent.id, path))
    actual.cgroups[id] = born(actual, above, name)


AUTOMATA: dict[int, tuple[bytes, ...]] = {}  # that were planned, by digest


def born(actual: Actual, above: CgroupEntry, name: str) -> CgroupEntry:
    """What kabpf_cgroup_mkdir makes of a child of this name."""
    globs = {number: AUTOMATA.get(digest, ()) for number, digest in actual.generations.items()}
    found = find_birth(Tables(actual.births, actual.names, globs), above.state, name)
    state = found.state if found and above.state != UNKNOWN else UNKNOWN
    policy_id = found.policy_id if found and found.policy_id else above.policy_id
    return CgroupEntry(state, policy_id)


def settled(entries: dict[int, CgroupEntry]) -> dict[int, CgroupEntry]:
    """Entries whose sockets were updated, with nothing left of a former policy."""
    return {id: entry._replace(owed=False, was=(), succeeds=False) for id, entry in entries.items()}


def idle(seconds: int) -> Options:
    return Options(idle_s=Range.exactly(seconds))


def policies_and_debts(
    entries: dict[int, CgroupEntry],
) -> dict[int, tuple[int, tuple[int, ...], bool]]:
    return {id: (entry.policy_id, entry.was, entry.owed) for id, entry in entries.items()}


def applied(actual: Actual, changes: Changes) -> Actual:
    """The kernel after `changes`, which are written in their order (Dataplane.apply)."""
    for now in writes(actual, changes):
        ids = {entry.policy_id for entry in now.births.values()}
        ids |= {id for entry in now.cgroups.values() for id in (entry.policy_id, *entry.was)}
        assert ids <= now.records.keys() | {0}
    return now


def writes(actual: Actual, changes: Changes) -> Iterator[Actual]:
    records, births, cgroups = actual.records, actual.births, actual.cgroups
    yield (actual := replace(actual, records=records | changes.records))
    if changes.needs is not None:
        yield (actual := replace(actual, needs=changes.needs))
    if changes.globs:
        number, digest, _ = changes.globs
        yield (actual := replace(actual, generations=actual.generations | {number: digest}))
    yield (actual := replace(actual, names=actual.names | changes.names))
    yield (actual := replace(actual, births=births | changes.births))
    yield (actual := replace(actual, cgroups=cgroups | changes.cgroups))
    yield (actual := replace(actual, cgroups=actual.cgroups | changes.updates))
    yield (actual := replace(actual, cgroups=without(actual.cgroups, changes.stale_cgroups)))
    yield (actual := replace(actual, births=without(actual.births, changes.stale_births)))
    yield (actual := replace(actual, names=without(actual.names, changes.stale_names)))
    generations = without(actual.generations, changes.stale_generations)
    yield (actual := replace(actual, generations=generations))
    yield replace(actual, records=without(actual.records, changes.stale_records))


def without(entries: dict, keys: tuple) -> dict:
    return {key: entry for key, entry in entries.items() if key not in keys}


def reconciled(actual: Actual, named: Files, cgroups: list[Cgroup]) -> Actual:
    """The kernel after it was brought to these policies."""
    return brought(actual, spelled(named), cgroups)


def planned(
    named: Files, cgroups: list[Cgroup], actual: Actual
) -> tuple[Plan, dict[int, PolicyRecord]]:
    return planned_policies(spelled(named), cgroups, actual)


def brought(actual: Actual, named: Policies, cgroups: list[Cgroup]) -> Actual:
    """The kernel after it was brought to policies that are spelled in full."""
    for _ in range(10):
        plan, desired = planned_policies(named, cgroups, actual)
        actual = applied(actual, diff.diff(plan, actual, desired))
    assert not diff.diff(plan, actual, desired)
    return actual


def planned_policies(
    named: Policies, cgroups: list[Cgroup], actual: Actual | None = None
) -> tuple[Plan, dict[int, PolicyRecord]]:
    policies = read(named)
    plan = resolve(policies, Automaton(policies), cgroups, BIRTHS)
    AUTOMATA[plan.globs_digest] = plan.globs.blocks
    return plan, diff.number(map(record, policies), actual.records if actual else {}, POLICIES)


def rules(**changed: object) -> dict[str, dict[str, object]]:
    return {"a": {"select": [{"cgroup": "/a"}], "keepalive": {"idle": 5}} | changed}


@pytest.mark.parametrize(
    ("after", "owed"),
    [
        ({"log": "sockets"}, False),
        ({"existing": "false"}, False),
        ({"mode": "override"}, True),
        ({"keepalive": {"idle": 6}}, True),
        ({"direction": "out"}, True),
        ({"loopback": "false"}, True),
        ({"destinations": [{"to": "10.0.0.0/8", "idle": 6}]}, True),
    ],
)
def test_sockets_are_updated_for_what_they_get(after: dict[str, object], owed: bool) -> None:
    """A change that no socket can tell needs no update, and nothing to remember."""
    before = brought(Actual(), rules(), tree(["/a"]))
    plan, desired = planned_policies(rules(**after), tree(["/a"]), before)
    entry = diff.diff(plan, before, desired).cgroups[2]
    assert (entry.policy_id, entry.owed) == (2, owed)
    assert entry.was == ((1,) if owed else ())


def test_policy_of_another_name_needs_no_update() -> None:
    """As where its file was renamed."""
    before = brought(Actual(), rules(), tree(["/a"]))
    plan, desired = planned_policies({"b": rules()["a"]}, tree(["/a"]), before)
    changes = diff.diff(plan, before, desired)
    assert policies_and_debts(changes.cgroups) == {2: (2, (), False)}
    assert brought(before, {"b": rules()["a"]}, tree(["/a"])).records.keys() == {2}


def test_update_that_waits_is_owed_by_a_policy_that_gives_the_same() -> None:
    """What a socket is owed does not depend on the policy's name."""
    cgroups = tree(["/a"])
    plan, desired = planned_policies(rules(), cgroups)
    before = applied(Actual(), diff.diff(plan, Actual(), desired, updates=False))
    plan, desired = planned_policies({"b": rules()["a"]}, cgroups, before)
    assert diff.diff(plan, before, desired, updates=False).cgroups[2].owed


@pytest.mark.parametrize(
    ("before", "updates", "succeeds"),
    [({}, True, True), ({}, False, False), ({"existing": "false"}, True, False)],
)
def test_policy_that_had_its_turn_is_told_from_one_that_had_not(
    before: dict[str, object], updates: bool, succeeds: bool
) -> None:
    """An update knows whether each open socket had what the last policy gives."""
    cgroups = tree(["/a"])
    plan, desired = planned_policies(rules(**before), cgroups)
    actual = applied(Actual(), diff.diff(plan, Actual(), desired, updates=updates))
    plan, desired = planned_policies(rules(keepalive={"idle": 6}), cgroups, actual)
    (entry,) = diff.diff(plan, actual, desired, updates=False).cgroups.values()
    assert (entry.owed, entry.was, entry.succeeds) == (True, (1,), succeeds)
    unloaded = brought(actual, {}, cgroups)
    plan, desired = planned_policies(rules(), cgroups, unloaded)
    assert not diff.diff(plan, unloaded, desired, updates=False).cgroups[2].succeeds


def test_more_former_policies_than_are_remembered_are_forgotten() -> None:
    """Of those the entry says so for as long as it lasts."""
    actual = Actual()
    for idle_s in range(1, 9):
        one = rules(keepalive={"idle": idle_s}, existing="false")
        actual = brought(actual, one, tree(["/a"]))
        assert actual.cgroups[2].forgot == (idle_s > 5)
    assert brought(actual, rules(keepalive={"idle": 9}), tree(["/a"])).cgroups[2].forgot
