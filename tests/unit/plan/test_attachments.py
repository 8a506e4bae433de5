"""Which cgroups the data plane without BTF is attached to, and in which order that changes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from plans import BIRTHS, POLICIES, policies_of, tree

from kabpf.plan import diff
from kabpf.plan.automaton import Automaton
from kabpf.plan.desired import Actual, Plan
from kabpf.plan.resolve import _above, resolve, with_attachments
from kabpf.plan.state import record

PATHS = ["/a", "/a/b", "/a/b/c", "/a/d", "/e"]
TREE = tree(["/a/b/c", "/a/d", "/e"])
BY_ID = {cgroup.id: cgroup for cgroup in TREE}
NAMED = st.frozensets(st.sampled_from(PATHS))


def planned(paths):
    """The plan of policies of their own for these cgroups."""
    policies = policies_of({path: ({"cgroup": path}, {"idle": 60}) for path in sorted(paths)})
    plan = resolve(policies, Automaton(policies), TREE, BIRTHS)
    return with_attachments(plan, BY_ID)


def attached(paths):
    return {BY_ID[id].path: nested for id, nested in planned(paths).attachments.items()}


def test_each_named_cgroup_has_an_attachment():
    """A cgroup with a policy of its own is attached to, and what is below inherits it; those above
    or below another attachment are nested."""
    assert attached(["/a", "/e"]) == {"/a": False, "/e": False}
    assert attached(["/a", "/a/b/c", "/e"]) == {"/a": True, "/a/b/c": True, "/e": False}
    assert attached(["/a/b", "/a/d"]) == {"/a/b": False, "/a/d": False}


def test_births_are_not_wanted():
    """No rule for new cgroups is left in the plan: nothing would read it."""
    assert planned(PATHS).births == {}
    assert not planned(PATHS).asks


def steps(plan: Plan, actual: Actual):
    """The attachments after each step of bringing the kernel to a plan."""
    attachments = dict(actual.attachments)
    for _ in range(10):
        desired = diff.number(map(record, plan.policies), actual.records, POLICIES)
        changes = diff.diff(plan, actual, desired, updates=False)
        for id, nested in changes.attachments.items():
            attachments[id] = nested
            yield dict(attachments)
        for id in changes.stale_attachments:
            del attachments[id]
            yield dict(attachments)
        actual = Actual(
            actual.records | changes.records,
            {},
            actual.cgroups | changes.cgroups,
            attachments=dict(attachments),
        )
        if not changes:
            break
    assert attachments == plan.attachments


@given(NAMED, NAMED)
def test_nested_attachments_always_know_of_each_other(before, after):
    """Whatever changes into whatever, at every step an attachment above another one knows of it, or
    a broad policy would overwrite a narrow one."""
    first = Actual(attachments=dict(planned(before).attachments))
    for attachments in steps(planned(after), first):
        for id in attachments:
            above = [one for one in _above(BY_ID, id) if one in attachments]
            assert all(attachments[one] for one in above)


def test_half_an_attachment_is_made_whole_or_removed():
    """What a process that died left is written again where it is wanted, and goes where not."""
    half = dict.fromkeys(planned(["/a"]).attachments | planned(["/e"]).attachments)
    *_, last = steps(planned(["/a"]), Actual(attachments=half))
    assert last == planned(["/a"]).attachments
