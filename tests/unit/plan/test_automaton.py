"""Which selectors name a cgroup: the automaton against a plain matcher, and its table walked as
the kernel walks it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mkdir import Tables, find_birth

from kabpf.plan import diff, globs
from kabpf.plan.automaton import Automaton
from kabpf.plan.births import ANYWHERE, UNKNOWN
from kabpf.plan.desired import Actual, Plan
from kabpf.plan.patterns import Naming
from kabpf.plan.resolve import resolve
from kabpf.plan.state import Cgroup, record
from kabpf.policy import model, parser
from kabpf.policy.model import Policy

NO_LIMIT = 1 << 20

NAMES = (
    "a", "b", "ab", "c.scope", "a.service", "b.service", "a.socket", "a@1.service", "a@2.socket",
    "_cpu.service", "_cpu.socket", "cpu.service", "__a.service",
)  # fmt: skip
UNITS = (
    "a.service", "b.service", "a.socket", "a@1.service", "a@.service", "a*.service", "*.service",
    "a@*.service", "*@.service",
    "?.service", "[ab].socket", "[!a].service", "c.scope", "cpu.service", "_a.service",
    "a*e.service",
)  # fmt: skip
USERS = ("user.slice", "user-1.slice", "user@1.service")
PARTS = (*NAMES, "*", "*", "**", "**", "a*", "?", "[ab]", "*.service", "a@?.*")

SELECTORS = st.one_of(
    st.sampled_from(UNITS).map(lambda unit: {"unit": unit}),
    st.sampled_from(UNITS).map(lambda unit: {"user_unit": unit}),
    st.lists(st.sampled_from(PARTS), max_size=4).map(
        lambda names: {"cgroup": "/" + "/".join(names)}
    ),
)
POLICIES = st.lists(st.lists(SELECTORS, min_size=1, max_size=3), max_size=6)
BELOW = st.lists(st.sampled_from(NAMES), max_size=4)
MANAGED = st.tuples(*(st.sampled_from((name, "user@1.service")) for name in USERS)).map(list)
PATHS = st.lists(BELOW | st.tuples(MANAGED, BELOW).map(lambda both: both[0] + both[1]), max_size=8)

THOROUGHLY = settings(max_examples=150)


@THOROUGHLY
@given(POLICIES, PATHS)
@example([[{"cgroup": "/"}], [{"cgroup": "/**"}]], [["a", "b"]])
@example([[{"unit": "a.service"}], [{"cgroup": "/**/a.socket"}]], [["a.socket"]])
@example([[{"cgroup": "/a/**/b"}]], [["a", "b", "a", "b"]])
@example([[{"cgroup": "/a/**/**/b"}]], [["a", "b"]])
@example([[{"cgroup": "/[a]*b"}], [{"cgroup": "/abc*b"}]], [["[a]xb"]])
def test_every_cgroup_has_the_policy_of_the_strongest_selector(
    selectors: list[list[dict[str, str]]], paths: list[list[str]]
) -> None:
    """plan.resolve gives each cgroup what a matcher finds that tries every selector by itself, and
    where there is none what its parent has; also where it has resolved some before."""
    policies = policies_of(selectors)
    automaton, cgroups = Automaton(policies), tree(paths)
    known = resolve(policies, automaton, cgroups[: len(cgroups) // 2], NO_LIMIT).cgroups
    resolved = resolve(policies, automaton, cgroups, NO_LIMIT, known=known).cgroups
    for cgroup in cgroups:
        expected = reference(policies, cgroup.path)
        assert resolved[cgroup.id].policy == expected, cgroup.path


@THOROUGHLY
@given(POLICIES, PATHS)
@example([[{"cgroup": "/"}], [{"cgroup": "/**"}]], [["a", "b"]])
@example([[{"cgroup": "/a/**/b"}], [{"unit": "b.service"}]], [["a", "b", "a", "b", "b.socket"]])
def test_every_selector_that_names_a_cgroup_is_found(
    selectors: list[list[dict[str, str]]], paths: list[list[str]]
) -> None:
    """Naming finds for each cgroup what a matcher finds that tries every selector by itself."""
    policies = policies_of(selectors)
    naming = Naming(policies)
    for cgroup in tree(paths):
        names = cgroup.path.split("/")[1:] if cgroup.path != "/" else []
        assert naming(cgroup.path) == [
            (each, selector)
            for each in policies
            for selector in each.selectors
            if rank_of(selector, names)[0]
        ], cgroup.path


@THOROUGHLY
@given(POLICIES, PATHS)
@example([[{"unit": "a.service"}], [{"cgroup": "/a/*"}]], [["a", "a.service"], ["b", "a.service"]])
@example([[{"unit": "a*.service"}], [{"cgroup": "/a"}]], [["a", "a@1.service"], ["a", "b"]])
@example([[{"unit": "a.service"}, {"cgroup": "/?/**"}]], [["a", "a.service", "b"]])
@example([[{"cgroup": "/**/b"}], [{"cgroup": "/a?/**"}]], [["ab", "b"]])
def test_kernel_gives_a_new_cgroup_what_user_space_would(
    selectors: list[list[dict[str, str]]], paths: list[list[str]]
) -> None:
    """A cgroup born while no process of kabpf runs has its right policy and state."""
    policies = policies_of(selectors)
    automaton = Automaton(policies)
    cgroups = tree(paths)
    desired = resolve(policies, automaton, cgroups, NO_LIMIT)
    for cgroup, born in births(desired, cgroups):
        assert not born.asked
        assert (born.state, born.policy) == desired.cgroups[cgroup.id][:2], cgroup.path


@THOROUGHLY
@given(POLICIES, PATHS, st.integers(0, 40))
@example([[{"unit": "a.service"}, {"unit": "b.service"}], [{"cgroup": "/a"}]], [["a.service"]], 4)
@example([[{"unit": "a.service"}, {"cgroup": "/a.service/a"}]], [["a.service"]], 3)
def test_kernel_asks_where_its_table_is_too_small(
    selectors: list[list[dict[str, str]]], paths: list[list[str]], limit: int
) -> None:
    """With a table that does not hold every state, a cgroup that the kernel resolves alone has its
    right policy, and every other one is asked about."""
    policies = policies_of(selectors)
    cgroups = tree(paths)
    desired = resolve(policies, Automaton(policies), cgroups, limit)
    assert len(desired.births) <= limit
    for cgroup, born in births(desired, cgroups):
        assert born.asked or (born.state, born.policy) == desired.cgroups[cgroup.id][:2], (
            cgroup.path
        )


def test_table_without_room_leaves_everything_to_user_space() -> None:
    """Where not even the first states fit the table is empty, and the kernel asks about every new
    cgroup."""
    policies = policies_of([[{"unit": f"{number}.service"} for number in range(9)]])
    assert Automaton(policies).table(8) == {}


def test_table_grows_from_the_root() -> None:
    """A table that is too small holds the states next to the root; steps to the others lead to
    UNKNOWN."""
    policies = policies_of([[{"cgroup": "/a/b/c"}]])
    automaton = Automaton(policies)
    whole = automaton.table(NO_LIMIT)
    inside = automaton.step(automaton.root.state, "a").state
    assert len(whole) == 7
    some = automaton.table(5)
    assert some.keys() < whole.keys()
    assert some[automaton.root.state, "a"].state == inside
    assert some[inside, "b"].state == UNKNOWN


def test_state_of_a_cgroup_that_nothing_can_match_is_anywhere() -> None:
    """Below what no selector goes on from, only those remain that apply anywhere."""
    automaton = Automaton(policies_of([[{"cgroup": "/a/b"}], [{"unit": "x.service"}]]))
    assert automaton.step(automaton.root.state, "b").state == ANYWHERE
    assert automaton.step(ANYWHERE, "x.service").state == ANYWHERE


def test_unrelated_policy_leaves_states_alone() -> None:
    """A state has the same number with other policies around, as long as the same can follow."""
    first, unit, deep = [{"cgroup": "/a/b/c"}], [{"unit": "x.service"}], [{"cgroup": "/x/y/z"}]
    alone = Automaton(policies_of([first]))
    more = Automaton(policies_of([unit, deep, first]))
    assert state_at(alone, "/a") == state_at(more, "/a")
    assert state_at(alone, "/a/b") == state_at(more, "/a/b")
    assert state_at(more, "/a") != state_at(more, "/x")
    assert alone.root.state == Automaton(policies_of([unit, first])).root.state
    assert alone.root.state != more.root.state


def test_number_of_a_state_is_the_same_in_every_process() -> None:
    """The numbers outlive a process in the kernel, so they depend on the selectors and on nothing
    else; none is UNKNOWN or ANYWHERE."""
    program = (
        "from kabpf.plan.automaton import Automaton;"
        "from kabpf.policy import parser;"
        "text = b'select: [{cgroup: /a/b}, {cgroup: /**/x/*}, {unit: a.service}]\\nkeepalive: on';"
        "policies = parser.combine([parser.parse(text, 'a.yaml')]);"
        "print(Automaton(policies).root.state)"
    )
    numbers = {
        subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(numbers) == 1
    assert not numbers & {b"%d\n" % UNKNOWN, b"%d\n" % ANYWHERE}


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel takes no globs of two or more *."""
    price = globs._Builder.build
    monkeypatch.setattr(
        globs._Builder,
        "build",
        lambda self: None if any(each.count("*") > 1 for each in self._globs) else price(self),
    )
    globs.compiled_names.cache_clear()
    yield
    globs.compiled_names.cache_clear()


@pytest.mark.parametrize(
    "selector",
    [
        {"unit": "a.service"},
        {"unit": "a@.service"},
        {"unit": "*.service"},
        {"user_unit": "a.service"},
        {"cgroup": "/*/**/b/**"},
        {"cgroup": "/a/b*"},
        {"cgroup": "/?/b"},
    ],
)
def test_no_selector_needs_user_space(selector: dict[str, str]) -> None:
    """The kernel matches every selector by itself."""
    policies = policies_of([[selector]])
    assert not resolve(policies, Automaton(policies), [], NO_LIMIT).asks


@pytest.mark.usefixtures("no_room")
def test_glob_without_room_needs_user_space() -> None:
    """A plan says that user space is asked, and which globs are left to it."""
    policies = policies_of([[{"cgroup": "/a/x*y*"}], [{"cgroup": "/a/x*"}]])
    automaton = Automaton(policies)
    assert resolve(policies, automaton, [], NO_LIMIT).asks
    assert automaton.globs.left_out == ("x*y*",)


@pytest.mark.usefixtures("no_room")
def test_kernel_asks_only_where_a_glob_without_room_might_match() -> None:
    """A glob below one directory asks about births there and nowhere else, and not about names that
    a selector spells out."""
    automaton = Automaton(policies_of([[{"cgroup": "/a/x*y*"}], [{"cgroup": "/a/b"}]]))
    asking = {step for step, birth in automaton.table(NO_LIMIT).items() if birth.ask}
    assert asking == {(state_at(automaton, "/a"), "")}


@pytest.mark.usefixtures("no_room")
def test_kernel_asks_about_sets_of_other_globs_too() -> None:
    """What matches another glob may match one without room as well; elsewhere it does not ask."""
    automaton = Automaton(policies_of([[{"cgroup": "/a/x*y*"}], [{"unit": "x*.scope"}]]))
    asking = {step for step, birth in automaton.table(NO_LIMIT).items() if birth.ask}
    inside = state_at(automaton, "/a")
    assert asking == {(inside, "")}  # which the kernel puts together with the unit's row
    everywhere = Automaton(policies_of([[{"unit": "x*y*.scope"}], [{"unit": "x*.scope"}]]))
    assert all(birth.ask for birth in everywhere.table(NO_LIMIT).values())


@pytest.mark.usefixtures("no_room")
@settings(THOROUGHLY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(POLICIES, PATHS)
@example([[{"cgroup": "/a*b*"}], [{"unit": "a*.service"}]], [["ab.service"], ["a.service"]])
def test_kernel_resolves_what_a_glob_without_room_leaves_to_it(
    selectors: list[list[dict[str, str]]], paths: list[list[str]]
) -> None:
    """Globs that are left to user space change nothing but that it is asked."""
    policies = policies_of([*selectors, [{"unit": "a*@*.service"}, {"cgroup": "/a/*a*"}]])
    cgroups = tree(paths)
    desired = resolve(policies, Automaton(policies), cgroups, NO_LIMIT)
    for cgroup, born in births(desired, cgroups):
        assert born.asked or (born.state, born.policy) == desired.cgroups[cgroup.id][:2], (
            cgroup.path
        )


def test_kernel_asks_only_about_a_name_that_a_glob_has_doubts_about() -> None:
    """? and [...] lead to user space where they meet a character that is not of ASCII."""
    policies = policies_of([[{"cgroup": "/a/x?"}], [{"cgroup": "/b/*\u00e9"}]])
    automaton = Automaton(policies)
    names = ("a", "b", "a/x1", "a/x\u00e9", "a/xyz", "a/y\u00e9", "b/x\u00e9", "b/\u00e9")
    cgroups = tree([name.split("/") for name in names])
    desired = resolve(policies, automaton, cgroups, NO_LIMIT)
    assert not desired.asks
    asked = {cgroup.path for cgroup, born in births(desired, cgroups) if born.asked}
    assert asked == {"/a/x\u00e9"}


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        ("cpu.service", "_cpu.service"),
        ("memory.pressure.service", "_memory.pressure.service"),
        ("cgroup.slice", "_cgroup.slice"),
        ("bpf-firewall.service", "_bpf-firewall.service"),
        ("_x.service", "__x.service"),
        (".x.service", "_.x.service"),
        ("cpus.service", "cpus.service"),
        ("tasks.service", "tasks.service"),
        ("user-cpu.slice", "user-cpu.slice"),
    ],
)
def test_unit_is_found_under_the_name_that_systemd_escapes(unit: str, name: str) -> None:
    """Systemd puts _ before a name that might clash with a file of the cgroup, and so do we."""
    (found,) = policies_of([[{"unit": unit}]])
    automaton = Automaton((found,))
    assert automaton.step(ANYWHERE, name).policy == found
    if unit != name:
        assert automaton.step(ANYWHERE, unit).policy is None


def test_many_units_below_double_stars_make_one_row_each() -> None:
    """Nor do they where selectors go on below: the kernel puts both together."""
    units = [[{"unit": f"{number}.service"}] for number in range(300)]
    below = [[{"cgroup": f"/{number}.slice/**"}] for number in range(300)]
    policies = policies_of(units + below)
    automaton = Automaton(policies)
    assert len(automaton.table(NO_LIMIT)) <= 2 * 300 + 2 * 300 + 2
    cgroups = tree(
        [
            path.split("/")
            for path in ("7.slice/x.service/7.service/y", "7.slice/7.socket", "x/7.service")
        ]
    )
    desired = resolve(policies, automaton, cgroups, NO_LIMIT)
    for cgroup, born in births(desired, cgroups):
        assert (born.state, born.policy, born.asked) == (*desired.cgroups[cgroup.id][:2], False)


def test_many_units_make_one_row_each() -> None:
    """Unit names, which apply anywhere, cost one row and not one for each state."""
    units = [[{"unit": f"{number}.socket"}] for number in range(100)]
    paths = [[{"cgroup": f"/{number}.slice/x"}] for number in range(100)]
    assert len(Automaton(policies_of(units + paths)).table(NO_LIMIT)) <= 100 + 1 + 101 + 200


class Born(NamedTuple):
    """A cgroup as kabpf_cgroup_mkdir makes it; `asked` if user space was asked about it or an
    ancestor."""

    state: int
    policy: Policy | None
    asked: bool


def births(desired: Plan, cgroups: list[Cgroup]) -> Iterator[tuple[Cgroup, Born]]:
    """Every cgroup but the root as the kernel makes it (kabpf_cgroup_mkdir): below a parent that
    user space resolved, and below one that the kernel made as well."""
    numbers = diff.number(map(record, desired.policies), {}, NO_LIMIT)
    changes = diff.diff(desired, Actual(), numbers)
    assert changes.globs
    tables = Tables(changes.births, changes.names, {0: changes.globs.blocks})
    by_name = {each.name: each for each in desired.policies}
    policies = {id: by_name[record.name] for id, record in numbers.items()}
    resolved = {
        cgroup.id: Born(changes.cgroups[cgroup.id].state, desired.cgroups[cgroup.id].policy, False)
        for cgroup in cgroups
    }
    made = {cgroups[0].id: resolved[cgroups[0].id]}
    for cgroup in cgroups[1:]:
        yield cgroup, birth(tables, policies, resolved[cgroup.parent_id], cgroup.name)
        made[cgroup.id] = birth(tables, policies, made[cgroup.parent_id], cgroup.name)
        yield cgroup, made[cgroup.id]


def birth(tables: Tables, policies: dict[int, Policy], parent: Born, name: str) -> Born:
    found = find_birth(tables, parent.state, name)
    child = policies[found.policy_id] if found and found.policy_id else parent.policy
    state = found.state if found and parent.state != UNKNOWN else UNKNOWN
    asks = state == UNKNOWN or (found is not None and found.ask)
    return Born(state, child, parent.asked or asks)


def reference(policies: tuple[Policy, ...], path: str) -> Policy | None:
    """The rule of precedence: an exact path beats a user's unit, which beats a unit, which beats
    its socket, which beats a glob, the longer literal prefix beats the shorter, then the one read
    last wins; else the parent's."""
    names = path.split("/")[1:] if path != "/" else []
    named = [
        ((rank, prefix, order), each)
        for order, each in enumerate(policies)
        for selector in each.selectors
        for rank, prefix in [rank_of(selector, names)]
        if rank
    ]
    if named:
        return max(named, key=lambda item: item[0])[1]
    return reference(policies, "/" + "/".join(names[:-1])) if names else None


def rank_of(selector: model.Selector, names: list[str]) -> tuple[int, int]:
    """5 for an exact path, 4 for a user's unit, 3 for a unit, 2 for its socket, 1 for a glob, 0 for
    none."""
    text = selector.text
    prefix = min([text.index(char) for char in "*?[" if char in text], default=len(text))
    exact = prefix == len(text)
    if selector.kind == "cgroup":
        pattern = text.split("/")[1:] if text != "/" else []
        return (5 if exact else 1) * path_matches(pattern, names), prefix
    *above, last = names or [""]
    if selector.kind == "user_unit" and not (
        above[:1] == ["user.slice"] and name_matches("user@*.service", "".join(above[2:3]))
    ):
        return 0, 0
    if name_matches(escaped(text), last):
        return (4 if selector.kind == "user_unit" else 3) if exact else 1, prefix
    socket = text.removesuffix("@*.service") + ".socket"
    if text.endswith("@*.service") and name_matches(escaped(socket), last):
        return 1 if any(char in socket for char in "*?[") else 2, prefix
    stem = text.removesuffix(".service")
    is_socket = stem != text and name_matches(escaped(f"{stem}.socket"), last)
    return (2 if exact else 1) * is_socket, prefix


def escaped(unit: str) -> str:
    return f"_{unit}" if unit.startswith(("_", "cpu.")) else unit


def path_matches(pattern: list[str], names: list[str]) -> bool:
    if pattern == ["**"]:
        return bool(names)
    if pattern and pattern[0] == "**":
        return any(path_matches(pattern[1:], names[count:]) for count in range(len(names) + 1))
    if not pattern or not names:
        return pattern == names
    return name_matches(pattern[0], names[0]) and path_matches(pattern[1:], names[1:])


def name_matches(glob: str, name: str) -> bool:
    if not glob:
        return not name
    if glob[0] == "*":
        return any(name_matches(glob[1:], name[count:]) for count in range(len(name) + 1))
    if glob[0] == "[":
        inside, _, rest = glob[1:].partition("]")
        fits = name[:1] and (name[0] in inside) != inside.startswith("!")
        return bool(fits) and name_matches(rest, name[1:])
    return bool(name) and glob[0] in (name[0], "?") and name_matches(glob[1:], name[1:])


def policies_of(selectors: list[list[dict[str, str]]]) -> tuple[Policy, ...]:
    """A policy for each list of selectors, read from a file."""
    named = {f"p{n}": {"select": each, "keepalive": "on"} for n, each in enumerate(selectors)}
    return parser.combine([parser.parse(json.dumps({"policies": named}).encode(), "p.yaml")])


def tree(paths: list[list[str]]) -> list[Cgroup]:
    """The cgroups at these paths and above, parents before their children."""
    found = {"": Cgroup(1, 0, "/")}
    for names in paths:
        for depth in range(1, len(names) + 1):
            path = "".join(f"/{name}" for name in names[:depth])
            parent = found[path.rpartition("/")[0]]
            found.setdefault(path, Cgroup(len(found) + 1, parent.id, path))
    return list(found.values())


def state_at(automaton: Automaton, path: str) -> int:
    state = automaton.root.state
    for name in path.split("/")[1:]:
        state = automaton.step(state, name).state
    return state
