"""Selectors of containers and pods name containers by what their engines know, and the kernel asks
about each cgroup that may be a container's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from mkdir import Tables, find_birth
from plans import container, read

from kabpf.containers import names
from kabpf.plan import containers, diff
from kabpf.plan.automaton import ANYWHERE, Automaton
from kabpf.plan.desired import Actual
from kabpf.plan.patterns import compiled
from kabpf.plan.resolve import resolve, resolve_one
from kabpf.plan.state import Cgroup, Resolved, record
from kabpf.policy.model import Policy

ID = "0123456789abcdef" * 4
ONE = {"one": {"select": [{"container": {"name": "web"}}], "keepalive": "on"}}
LIKE_CONTAINERS = (
    f"libpod-{ID}.scope", f"libpod-{ID}", f"libpod-payload-{ID}", f"docker-{ID}.scope",
    f"cri-containerd-{ID}.scope", f"nerdctl-{ID}.scope", f"crio-{ID}.scope", f"crio-{ID}", ID,
)  # fmt: skip
ODD = "é \n\t'\"\\{}[]*?!\x1b\udcff\u202e\U0001f600"


def policies(**selectors: Any) -> tuple[Policy, ...]:
    return read({name: {"select": [each], "keepalive": "on"} for name, each in selectors.items()})


@pytest.mark.parametrize(
    ("selector", "facts", "is_named"),
    [
        ({"container": {"name": "web"}}, {"name": "web"}, True),
        ({"container": {"name": "web"}}, {"name": "web2"}, False),
        ({"container": {"name": "w?b[0-9]*"}}, {"name": "web2x"}, True),
        ({"container": {"name": "*"}}, {}, True),
        ({"container": {"name": "?*"}}, {}, False),
        ({"container": {"image": "a.example/*:1"}}, {"image": "a.example/b/c:1"}, True),
        ({"container": {"engine": "docker"}}, {"engine": "podman"}, False),
        ({"container": {"engine": "*er*"}}, {"engine": "docker"}, True),
        ({"container": {"label": {"a": "*"}}}, {"labels": {"a": ""}}, True),
        ({"container": {"label": {"a": "*"}}}, {"labels": {"A": ""}}, False),
        ({"container": {"label": {"a": "1", "b": "2"}}}, {"labels": {"a": "1"}}, False),
        ({"container": {"label": {"a": "1", "b": "2"}}}, {"labels": {"a": "1", "b": "2"}}, True),
        ({"container": {"annotation": {"a": "1"}}}, {"labels": {"a": "1"}}, False),
        ({"container": {"annotation": {"a": "1"}}}, {"annotations": {"a": "1"}}, True),
        ({"container": {"name": "a", "engine": "docker"}}, {"name": "a"}, False),
        ({"pod": {"name": "*"}}, {"name": "web"}, False),
        ({"pod": {"name": "web-*"}}, {"pod": {"name": "web-1"}}, True),
        ({"pod": {"namespace": "shop"}}, {"pod": {"namespace": "mail"}}, False),
        ({"pod": {"label": {"a": "1"}}}, {"labels": {"a": "1"}, "pod": {}}, False),
        ({"pod": {"label": {"a": "1"}}}, {"pod": {"labels": {"a": "1"}}}, True),
        ({"pod": {"container": "main"}}, {"name": "main", "pod": {}}, True),
        ({"pod": {"container": "main"}}, {"name": "", "pod": {}}, False),
        ({"container": {"name": "*"}}, {"name": ODD}, True),
        ({"container": {"label": {"a b": "é*"}}}, {"labels": {"a b": ODD}}, True),
        ({"container": {"label": {"a": "*[*][?]!*"}}}, {"labels": {"a": ODD}}, True),
    ],
)
def test_container_is_named_by_all_that_a_selector_asks_for(
    selector: dict[str, Any], facts: dict[str, Any], is_named: bool
) -> None:
    """All keys have to match, each as a glob, on any text that an engine may have."""
    (found,) = policies(one=selector)
    named = containers.Naming((found,))(container(facts))
    assert named == [(found, found.selectors[0])] * is_named


def test_selector_that_spells_out_more_wins_and_then_the_later_one() -> None:
    """A condition more, or a longer text before a wildcard, is stronger; of equals the last one."""
    found = policies(
        engine={"container": {"engine": "podman"}},
        exact={"container": {"name": "orders-db"}},
        more={"container": {"name": "orders-db", "label": {"team": "*"}, "engine": "pod*"}},
        short={"container": {"name": "or*"}},
        glob={"container": {"name": "orders-*", "image": "?"}},
        same={"container": {"name": "orders-*", "image": "*"}},
    )
    naming = containers.Naming(found)

    def winner(**facts: Any) -> str:
        strength, policy = naming.strongest(container(facts))
        assert policy and strength
        return policy.name

    assert winner(name="orders-db", labels={"team": "x"}) == "more"
    assert winner(name="orders-db") == "exact"
    assert winner(name="orders-x", image="i") == "same"
    assert winner(name="other") == "engine"
    assert winner(name="or") == "short"  # of fewer characters than "podman"
    assert naming.strongest(container({"engine": "crio"})) == (0, None)


@pytest.mark.parametrize("name", LIKE_CONTAINERS)
@pytest.mark.parametrize("above", ["", "/docker", "/system.slice", "/kubepods/pod7"])
def test_kernel_asks_about_each_cgroup_that_may_be_a_containers(name: str, above: str) -> None:
    """Wherever it is, and whatever else names it; until then it has what that says."""
    assert names.identify(f"{above}/{name}")
    found = (
        *read(ONE),
        *policies(
            glob={"cgroup": "/**"},
            unit={"unit": "docker-*.scope"},
            spelled={"cgroup": f"/x/{name}"},
        ),
    )
    automaton = Automaton(found)
    path = f"{above}/{name}"
    birth = automaton.root
    for each in path.split("/")[1:]:
        birth = automaton.step(birth.state, each)
    assert birth.ask
    assert birth.policy and birth.policy.name == ("unit" if "docker" in name else "glob")
    assert asked(found, path)


def test_kernel_asks_about_nothing_else() -> None:
    """Neither about other names, nor where no selector is of containers."""
    found = (*read(ONE), *policies(unit={"unit": "docker-*.scope"}, path={"cgroup": "/a/b"}))
    for path in ("/a/b", "/a/c", "/docker.service", f"/{ID}0", f"/x{ID}", "/system.slice"):
        assert not asked(found, path), path
    for name in LIKE_CONTAINERS:
        assert not asked(found[1:], f"/{name}"), name
    assert not Automaton(found[1:]).containers
    assert resolve(found, Automaton(found), [], 1 << 16).asks


def asked(found: tuple[Policy, ...], path: str) -> bool:
    """Whether the kernel asks about the cgroup at `path`, all above which it has resolved."""
    plan = resolve(found, Automaton(found), [Cgroup(1, 0, "/")], 1 << 16)
    changes = diff.diff(plan, Actual(), diff.number(map(record, found), {}, 64))
    assert changes.globs
    tables = Tables(changes.births, changes.names, {0: changes.globs.blocks})
    state = changes.cgroups[1].state
    for name in path.split("/")[1:]:
        birth = find_birth(tables, state, name)
        assert birth
        state = birth.state
    return birth.ask


def test_every_name_of_a_container_is_among_those_asked_about() -> None:
    """What `identify` takes for a container's matches one of the globs in the kernel."""
    for name in LIKE_CONTAINERS:
        assert any(compiled(glob).match(name) for glob in containers.CGROUPS), name


def test_container_of_which_nothing_is_known_has_what_its_cgroup_has() -> None:
    """Without facts a cgroup has what a selector of cgroups says, or inherits."""
    found = (*read(ONE), *policies(unit={"unit": "docker-*.scope"}))
    automaton = Automaton(found)
    parent = Resolved(ANYWHERE, None)
    cgroup = Cgroup(2, 1, f"/docker-{ID}.scope")
    unknown = resolve_one(automaton, cgroup, parent)
    assert unknown.policy is found[1] and not unknown.contained
    other = resolve_one(automaton, cgroup, parent, container({"name": "db"}))
    assert other == unknown
    named = resolve_one(automaton, cgroup, parent, container({"name": "web"}))
    assert named.policy is found[0] and named.contained


def test_record_of_a_cgroup_says_that_it_is_in_a_container() -> None:
    """An entry that differs in nothing else is written as well, and no socket is visited for it."""
    found = policies(slice={"cgroup": "/a"}, one={"container": {"name": "web"}})
    automaton = Automaton(found)
    cgroups = [Cgroup(1, 0, "/"), Cgroup(2, 1, f"/{ID}"), Cgroup(3, 2, f"/{ID}/x")]
    desired = diff.number(map(record, found), {}, 64)
    plan = resolve(found, automaton, cgroups, 1 << 16, {2: container({"name": "web"})})
    changes = diff.diff(plan, Actual(), desired)
    assert [changes.cgroups[id].contained for id in (1, 2, 3)] == [False, True, True]
    outside = {id: each._replace(contained=False) for id, each in changes.cgroups.items()}
    ids = diff.policy_ids(desired)
    changed = diff.changed_entries(plan, plan.cgroups, outside, desired, ids, 0)
    assert changed == {id: changes.cgroups[id]._replace(owed=outside[id].owed) for id in (2, 3)}


def test_nothing_of_containers_is_imported_without_their_selectors() -> None:
    """A machine whose policies name no containers pays nothing for them."""
    program = (
        "import sys\n"
        "from kabpf.apply import reconcile\n"
        "from kabpf.policy import parser\n"
        "text = b'select: [{cgroup: /a*}, {unit: a.service}]\\nkeepalive: on'\n"
        "reconcile.automaton_of(parser.combine([parser.parse(text, 'a.yaml')]))\n"
        "print([name for name in sys.modules if 'containers' in name or 'engines' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True,
        env=os.environ,
    )  # fmt: skip
    assert done.stdout == "[]\n"


OFFERED = {
    "offered": {"offered": "true", "keepalive": "on"},
    "other": {"select": [{"cgroup": "/no/such"}], "keepalive": "on"},
}


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        ({"labels": {"io.kabpf.policy": "offered"}}, "offered"),
        ({"annotations": {"io.kabpf.policy": "offered"}}, "offered"),
        ({"pod": {"labels": {"io.kabpf.policy": "offered"}}}, "offered"),
        ({"labels": {"io.kabpf.policy": "other"}}, None),
        ({"labels": {"io.kabpf.policy": "no-such"}}, None),
        ({"labels": {"io.kabpf.policy": ""}}, None),
        ({"labels": {"io.kabpf.policy": ODD}}, None),
        ({"name": "offered"}, None),
        (
            {
                "annotations": {"io.kabpf.policy": "other"},
                "labels": {"io.kabpf.policy": "offered"},
            },
            None,
        ),
    ],
)
def test_container_has_no_more_than_it_was_offered(
    facts: dict[str, Any], chosen: str | None
) -> None:
    """It chooses with a label or an annotation of its own or its pod's, an annotation first, and of
    policies that are offered alone."""
    found = read(OFFERED)
    automaton = Automaton(found)
    cgroup, parent = Cgroup(2, 1, f"/docker-{ID}.scope"), Resolved(ANYWHERE, None)
    resolved = resolve_one(automaton, cgroup, parent, container(facts))
    assert (resolved.policy and resolved.policy.name) == chosen
    assert asked(found, cgroup.path)


@pytest.mark.parametrize(
    "selector",
    [
        {"container": {"name": "web"}},
        {"unit": "docker-*.scope"},
        {"cgroup": "/**"},
    ],
)
def test_selector_that_names_the_cgroup_wins_over_a_choice(selector: dict[str, Any]) -> None:
    """The administrator has the last word, whatever a container's label says."""
    found = read(OFFERED | {"ours": {"select": [selector], "keepalive": "off"}})
    facts = container({"name": "web", "labels": {"io.kabpf.policy": "offered"}})
    cgroup = Cgroup(2, 1, f"/docker-{ID}.scope")
    automaton = Automaton(found)
    resolved = resolve_one(automaton, cgroup, Resolved(automaton.root.state, None), facts)
    assert resolved.policy and resolved.policy.name == "ours"
