"""Which sockets a filter selects, and how a socket's parts are written."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from kabpf.commands.sockets import where
from kabpf.kernel.abi import CSocket
from kabpf.observe.sockets import Address, Filter, Look, Socket, name
from kabpf.plan.state import Cgroup


def test_filter_without_conditions_selects_every_socket() -> None:
    """What is not asked for does not matter, not even whether the cgroup is there still."""
    assert Filter()(found(cgroup=None))


@pytest.mark.parametrize(
    ("path", "selected"),
    [("/a/b", True), ("/a/b/c", True), ("/a/bc", False), ("/a", False), (None, False)],
)
def test_cgroup_selects_itself_and_all_below(path: str | None, selected: bool) -> None:
    """A name that only begins alike is another cgroup."""
    assert Filter(cgroup="/a/b")(found(cgroup=path)) is selected


def test_root_cgroup_selects_every_cgroup_that_is_there() -> None:
    """The root has all of the tree below it."""
    assert [Filter(cgroup="/")(found(cgroup=path)) for path in ("/", "/a", None)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("unit", "path", "selected"),
    [
        ("web.service", "/system.slice/web.service", True),
        ("web.service", "/system.slice/web.service/worker", True),
        ("web@*.service", "/system.slice/system-web.slice/web@1.service", True),
        ("system.slice", "/system.slice/web.service", True),
        ("web*", "/system.slice/webster", False),
        ("web", "/system.slice/web.service", False),
        ("*", "/plain", False),
        ("*", None, False),
    ],
)
def test_unit_selects_all_inside(unit: str, path: str | None, selected: bool) -> None:
    """A unit has the sockets of the units and other cgroups inside it; * stands for any text."""
    assert Filter(units=(unit,))(found(cgroup=path)) is selected


@pytest.mark.parametrize(("keepalive", "selected"), [(False, True), (True, False), (None, False)])
def test_without_keepalive_selects_what_is_known_to_have_none(
    keepalive: bool | None, selected: bool
) -> None:
    """A socket of which it is not known is left out."""
    assert Filter(without_keepalive=True)(found(keepalive=keepalive)) is selected


def test_policy_selects_by_its_whole_name() -> None:
    """A policy's name is no glob."""
    assert [Filter(policy="a*")(found(policy=name)) for name in ("a*", "ab", None)] == [
        True,
        False,
        False,
    ]


def test_filters_together_select_what_each_selects() -> None:
    """Every condition has to hold."""
    both = Filter(cgroup="/a", without_keepalive=True)
    assert both(found(cgroup="/a", keepalive=False))
    assert not both(found(cgroup="/a", keepalive=True))
    assert not both(found(cgroup="/b", keepalive=False))


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/web.service", "web.service"),
        ("/system.slice/web.service/worker", "web.service"),
        ("/user.slice/user-1.slice/user@1.service/app.slice/a.scope", "a.scope"),
        ("/init.scope", "init.scope"),
        ("/system.slice/data.timer", "system.slice"),
        ("/.service", None),
        ("/plain", None),
        ("/", None),
        (None, None),
    ],
)
def test_unit_is_the_innermost(path: str | None, unit: str | None) -> None:
    """Of the path's names that are names of units with a cgroup the last one counts."""
    assert found(cgroup=path).unit == unit


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/init.scope", "init.scope"),
        ("/system.slice", "system.slice"),
        ("/system.slice/web.service", "web.service"),
        ("/system.slice/web.service/worker", "web.service/worker"),
        ("/system.slice/system-pg.slice/pg@15.service", "pg@15.service"),
        ("/user.slice/user-1000.slice/session-2.scope", "session-2.scope"),
        (
            "/user.slice/user-1000.slice/user@1000.service/init.scope",
            "user@1000.service/init.scope",
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/sync.service/a",
            "user@1000.service/sync.service/a",
        ),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice", "user@1000.service/app.slice"),
        ("/machine.slice/libpod-1.scope/container", "libpod-1.scope/container"),
        (
            "/machine.slice/libpod-1.scope/container/system.slice/web.service",
            "libpod-1.scope/container/web.service",
        ),
        ("/lent/web.service", "/lent/web.service"),
        ("/lent/a.slice/web.service", "/lent/web.service"),
        ("/a.scope/a.scope/a.scope/b", "a.scope/a.scope/a.scope/b"),
    ],
)
def test_cgroup_has_one_name(path: str, expected: str) -> None:
    """A unit of the machine's is called by its name; what is inside of another unit, or of what
    somebody else may make cgroups in, can't have that name."""
    assert name(path) == expected


def test_name_in_a_deep_tree_takes_no_time() -> None:
    """Whoever owns a cgroup may make thousands inside each other, all of one name."""
    began = time.process_time()
    for depth in range(1, 2000, 10):
        assert name("/a.scope" * depth) == ("/a.scope" * depth)[1:]
    assert name("/a" * 4000 + "/b.scope") == "/a" * 4000 + "/b.scope"
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("192.0.2.1", 80), "192.0.2.1:80"),
        (Address("2001:db8::1", 80), "[2001:db8::1]:80"),
        (Address("0.0.0.0", 0), "*"),
    ],
)
def test_address_is_written_as_usual(address: Address, text: str) -> None:
    """An IPv6 address is in brackets; no port is no end."""
    assert str(address) == text


@pytest.mark.parametrize(
    ("is_whole", "cells"),
    [(True, ["(removed)", "(removed)", "/"]), (False, ["(removed)", "?", "/"])],
)
def test_unknown_cgroup_is_gone_only_where_none_is_outside(
    is_whole: bool, cells: list[str]
) -> None:
    """In a cgroup namespace the machine's other cgroups can't be seen; of those that the kernel
    reported, as the first one's removal, it is known all the same."""
    root = Cgroup(1, 0, "/")
    tree = SimpleNamespace(is_whole=is_whole, cgroups=lambda: [root])
    loaded: Any = SimpleNamespace(
        tree=tree, records=dict, removed=lambda: {7: SimpleNamespace(parent_id=6, name="x")}
    )
    look = Look(loaded, Filter(), [CSocket(cgroup_id=id, family=2) for id in (7, 8, 1)])
    assert [where(one, one.cgroup) for one in look] == cells


def found(
    cgroup: str | None = "/a", keepalive: bool | None = True, policy: str | None = None
) -> Socket:
    return Socket(
        cgroup_id=1,
        cgroup=cgroup,
        namespace=1,
        family="ipv4",
        local=Address("192.0.2.1", 1),
        peer=Address("192.0.2.2", 2),
        state="established",
        keepalive=keepalive,
        idle_s=60,
        interval_s=10,
        probes=6,
        user_timeout_ms=0,
        next_probe_ms=None,
        policy=policy,
        set_by={},
    )
