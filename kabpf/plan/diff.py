"""Desired state, actual state, and the difference: pure, without kernel or files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kabpf.plan.automaton import UNKNOWN, Birth
from kabpf.plan.state import (
    FORMER_MAX,
    Actual,
    BirthEntry,
    CgroupEntry,
    Changes,
    Needs,
    Plan,
    PolicyRecord,
    Resolved,
    record,
)
from kabpf.policy.model import Policy, ranges


class TooManyError(Exception):
    """More policies than the kernel's table has slots."""


def number(
    policies: Iterable[Policy], records: dict[int, PolicyRecord], limit: int
) -> dict[int, PolicyRecord]:
    """The record of each policy under an id below `limit`: the one it has, or a free one.

    Raises TooManyError where there are not enough.
    """
    present = {record: id for id, record in records.items()}
    free = (id for id in range(1, limit) if id not in records)
    try:
        return {present.get(each) or next(free): each for each in map(record, policies)}
    except StopIteration:
        raise TooManyError from None


def diff(
    plan: Plan, actual: Actual, desired: dict[int, PolicyRecord], *, visits: bool = True
) -> Changes:
    """What brings `actual` to `plan`, whose policies have the records `desired`; without `visits`
    open sockets stay owed.

    Stale births and records are left alone as long as anything else is to be written: a cgroup that
    is born meanwhile may still need them. So apply, read again and diff until nothing is left.
    """
    records = {id: record for id, record in desired.items() if id not in actual.records}
    known = actual.records | records
    owed = {id: entry for id, entry in actual.cgroups.items() if entry.owed}
    if owed and visits:  # what an interrupted apply left
        return Changes(retrofits=settled(owed, known))
    ids = policy_ids(desired)
    births = {
        step: entry
        for step, birth in plan.births.items()
        for entry in [_birth_entry(birth, ids)]
        if actual.births.get(step) != entry
    }
    stale_births = tuple(actual.births.keys() - plan.births.keys())
    if len(actual.births.keys() | births.keys()) > plan.births_max and stale_births:
        # Not room for both: until the next pass, user space is asked about some cgroups.
        return Changes(stale_births=stale_births)
    cgroups = changed_entries(plan, plan.cgroups, actual.cgroups, known, ids)
    stale_cgroups = tuple(actual.cgroups.keys() - plan.cgroups.keys() - plan.unreached)
    both = Needs(*map(any, zip(plan.needs, actual.needs, strict=True)))
    stale_attachments = tuple(actual.attachments.keys() - plan.attachments.keys())
    attachments = _attachments(plan, actual, stale=bool(stale_attachments))
    if records or births or cgroups or attachments or both != actual.needs:
        owed = {id: entry for id, entry in cgroups.items() if entry.owed}
        return Changes(
            records,
            both if both != actual.needs else None,
            births,
            cgroups,
            settled(owed, known) if visits else {},
            attachments,
            stale_cgroups=stale_cgroups,
        )
    return Changes(
        stale_attachments=stale_attachments,
        needs=plan.needs if plan.needs != actual.needs else None,
        stale_cgroups=stale_cgroups,
        stale_births=stale_births,
        stale_records=_unused(actual, actual.cgroups.values(), desired),
    )


def _attachments(plan: Plan, actual: Actual, *, stale: bool) -> dict[int, bool]:
    """Those to write, the ones that are there first: of two nested ones the outer learns of it
    before the inner is there. As long as stale ones are there, all count as nested."""
    desired = plan.attachments
    if stale:
        there = (id for id, nested in actual.attachments.items() if nested is not None)
        desired = dict.fromkeys((*there, *plan.attachments), True)
    written = {id: nested for id, nested in desired.items() if actual.attachments.get(id) != nested}
    return dict(sorted(written.items(), key=lambda item: item[0] not in actual.attachments))


def forget_former(actual: Actual) -> Changes:
    """What makes room for new records where there is none: no former policy is remembered."""
    entries = {id: entry._replace(was=()) for id, entry in actual.cgroups.items()}
    changed = {id: entry for id, entry in entries.items() if entry != actual.cgroups[id]}
    return Changes(cgroups=changed, stale_records=_unused(actual, entries.values(), ()))


def changed_entries(
    plan: Plan,
    cgroups: Mapping[int, Resolved],
    now: Mapping[int, CgroupEntry],
    records: Mapping[int, PolicyRecord],
    ids: Mapping[str, int],
    *,
    new: bool = False,
) -> dict[int, CgroupEntry]:
    """The entries that differ from what `cgroups` should have, as they should be; `ids` are the
    policies' by name, `records` all that are in the kernel.

    A state that the plan's births had no room for is UNKNOWN, so that user space is asked about
    births below. With `new` the cgroups are younger than their policies, whose `existing` says
    nothing about them then.
    """
    changed = {}
    for id, resolved in cgroups.items():
        state = resolved.state if (resolved.state, "") in plan.births else UNKNOWN
        policy_id = _id(ids, resolved.policy)
        before = now.get(id)
        if before and before.policy_id == policy_id:
            entry = before._replace(state=state)
        else:
            record = records.get(policy_id)
            owed = record is not None and record.acts and (new or record.existing)
            entry = CgroupEntry(state, policy_id, owed, _former(before, records))
        if entry != before:
            changed[id] = entry
    return changed


def settled(
    entries: Mapping[int, CgroupEntry], records: Mapping[int, PolicyRecord]
) -> dict[int, CgroupEntry]:
    """The entries after their open sockets were visited: a former policy is forgotten once no
    socket can have a value from it."""
    return {
        cgroup_id: entry._replace(
            owed=False,
            was=tuple(
                id for id in entry.was if not _replaces(records[entry.policy_id], records[id])
            ),
        )
        for cgroup_id, entry in entries.items()
    }


def policy_ids(records: Mapping[int, PolicyRecord]) -> dict[str, int]:
    """The ids of these records by their policies' names."""
    return {record.name: id for id, record in records.items()}


def _id(ids: Mapping[str, int], policy: Policy | None) -> int:
    return ids[policy.name] if policy else 0


def _unused(
    actual: Actual, entries: Iterable[CgroupEntry], desired: Iterable[int]
) -> tuple[int, ...]:
    """The records that no birth, none of these entries, and no policy (`desired`) refers to."""
    used = {id for entry in entries for id in (entry.policy_id, *entry.was)}
    used |= {birth.policy_id for birth in actual.births.values()}
    return tuple(actual.records.keys() - used - set(desired))


def _birth_entry(birth: Birth, ids: Mapping[str, int]) -> BirthEntry:
    return BirthEntry(birth.state, _id(ids, birth.policy), birth.ask, birth.strength)


def _former(before: CgroupEntry | None, records: Mapping[int, PolicyRecord]) -> tuple[int, ...]:
    if before is None:
        return ()
    # A policy that comes back is its own former one.
    ids = dict.fromkeys((before.policy_id, *before.was))
    return tuple(id for id in ids if id and records[id].acts)[:FORMER_MAX]


def _replaces(record: PolicyRecord, former: PolicyRecord) -> bool:
    """Whether every value that `former` may have set is another one's after a visit by `record`."""
    return (
        record.is_plain
        and record.options.keepalive
        and not former.digest
        and ranges(former.options).keys() <= ranges(record.options).keys()
    )
