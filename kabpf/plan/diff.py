"""Desired state, actual state, and the difference: pure, without kernel or files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from kabpf.plan import names
from kabpf.plan.births import GENERATIONS, UNKNOWN
from kabpf.plan.desired import Actual, Plan
from kabpf.plan.state import (
    FORMER_MAX,
    BirthEntry,
    CgroupEntry,
    Changes,
    GlobsEntry,
    Needs,
    PolicyRecord,
    Resolved,
)
from kabpf.policy.model import Policy, ranges

ANY_NAME = 0  # neither spelled out nor in a set


class TooManyError(Exception):
    """More policies than the kernel's table has slots."""


def number(
    desired: Iterable[PolicyRecord], records: dict[int, PolicyRecord], limit: int
) -> dict[int, PolicyRecord]:
    """The record of each policy under an id below `limit`: the one it has, or a free one.

    Raises TooManyError where there are not enough.
    """
    present = {record.kept: id for id, record in records.items()}
    free = (id for id in range(1, limit) if id not in records)
    try:
        return {present.get(each.kept) or next(free): each for each in desired}
    except StopIteration:
        raise TooManyError from None


def generation(plan: Plan, actual: Actual) -> int:
    """The number of the plan's generation of globs: the one that it has, or a free one.

    Only where a process was killed in each of so many changes of globs none is free. Then cgroups
    of the least used one are asked about until this one is in place.
    """
    for number, digest in actual.generations.items():
        if digest == plan.globs_digest:
            return number
    used = Counter(entry.state % GENERATIONS for entry in actual.cgroups.values() if entry.state)
    used.update(state % GENERATIONS for state, _ in actual.births)
    return min(range(GENERATIONS), key=lambda each: (used[each], each in actual.generations, each))


def diff(
    plan: Plan,
    actual: Actual,
    desired: dict[int, PolicyRecord],
    *,
    updates: bool = True,
    settles: bool = False,
) -> Changes:
    """What brings `actual` to `plan`, whose policies have the records `desired`; without `updates`
    open sockets stay owed.

    Stale births, generations and records are left alone as long as anything else is to be written:
    a cgroup that is born meanwhile may still need them. So apply, read again and diff until nothing
    is left. Rows that the kernel puts together with others come last: until then an old one decides
    by itself. Where it `settles`, entries of cgroups alone keep what is stale no longer: what a
    birth may refer to is in an entry or a birth, and those that `actual` has are respected.
    """
    records = {id: record for id, record in desired.items() if id not in actual.records}
    known = actual.records | records
    owed = {id: entry for id, entry in actual.cgroups.items() if entry.owed}
    if owed and updates:  # what an interrupted apply left
        return Changes(updates=settled(owed, known))
    ids = policy_ids(desired)
    number = generation(plan, actual)
    known_globs = actual.generations.get(number, 0) == plan.globs_digest
    globs = None if known_globs else GlobsEntry(number, plan.globs_digest, plan.globs.blocks)
    desired_births = rows(plan, ids, number)
    pieces = names.pieces({name for _, name in plan.births if isinstance(name, str) and name})
    births = {
        step: entry for step, entry in desired_births.items() if actual.births.get(step) != entry
    }
    resolved = plan.cgroups
    if plan.unreached:
        resolved = {id: each for id, each in resolved.items() if id not in plan.unreached}
    cgroups = changed_entries(plan, resolved, actual.cgroups, known, ids, number)
    unmoved = {
        entry.state % GENERATIONS
        for id, entry in actual.cgroups.items()
        if entry.state and (id in plan.unreached or (settles and id in cgroups))
    } - {number}
    stale_births = tuple(
        (state, name)
        for state, name in actual.births.keys() - desired_births.keys()
        if state % GENERATIONS not in unmoved
    )
    stale_names = () if unmoved else tuple(actual.names.keys() - pieces.keys())
    if (stale_births or stale_names) and (
        len(actual.births.keys() | births.keys()) > 2 * plan.births_max
        or len(actual.names.keys() | pieces.keys()) > plan.births_max
    ):
        # Not room for both: until the next pass, user space is asked about some cgroups.
        return Changes(stale_births=stale_births, stale_names=stale_names)
    new_pieces = {piece: id for piece, id in pieces.items() if actual.names.get(piece) != id}
    stale_cgroups = tuple(actual.cgroups.keys() - plan.cgroups.keys() - plan.unreached)
    both = Needs(*map(any, zip(plan.needs, actual.needs, strict=True)))
    stale_attachments = tuple(actual.attachments.keys() - plan.attachments.keys())
    attachments = _attachments(plan, actual, stale=bool(stale_attachments))
    owed = {id: entry for id, entry in cgroups.items() if entry.owed}
    updated = settled(owed, known) if updates else {}
    is_new = records or globs or new_pieces or births or attachments or both != actual.needs
    if is_new or (cgroups and not settles):
        return Changes(
            records,
            both if both != actual.needs else None,
            globs,
            new_pieces,
            dict(sorted(births.items(), key=lambda birth: birth[0][1] == ANY_NAME)),
            cgroups,
            updated,
            attachments,
            stale_cgroups=stale_cgroups,
        )
    return Changes(
        cgroups=cgroups,
        updates=updated,
        stale_attachments=stale_attachments,
        needs=plan.needs if plan.needs != actual.needs else None,
        stale_cgroups=stale_cgroups,
        stale_births=stale_births,
        stale_names=stale_names,
        stale_generations=tuple(actual.generations.keys() - {number, *unmoved}),
        stale_records=_unused(actual, actual.cgroups.values(), desired),
    )


def _attachments(plan: Plan, actual: Actual, *, stale: bool) -> dict[int, bool]:
    """Those to write, the ones that are there first: an outer attachment is updated before the
    inner one is created. As long as stale ones are there, all count as nested."""
    desired = plan.attachments
    if stale:
        there = (id for id, nested in actual.attachments.items() if nested is not None)
        desired = dict.fromkeys((*there, *plan.attachments), True)
    written = {id: nested for id, nested in desired.items() if actual.attachments.get(id) != nested}
    return dict(sorted(written.items(), key=lambda item: item[0] not in actual.attachments))


def forget_former(actual: Actual) -> Changes:
    """What makes room for new records where there is none: no former policy is remembered."""
    entries = {
        id: entry._replace(was=(), succeeds=False, forgot=True) if entry.was else entry
        for id, entry in actual.cgroups.items()
    }
    changed = {id: entry for id, entry in entries.items() if entry != actual.cgroups[id]}
    return Changes(cgroups=changed, stale_records=_unused(actual, entries.values(), ()))


def changed_entries(
    plan: Plan,
    cgroups: Mapping[int, Resolved],
    now: Mapping[int, CgroupEntry],
    records: Mapping[int, PolicyRecord],
    ids: Mapping[str, int],
    generation: int,
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
        included = (resolved.state, "") in plan.births
        state = located(resolved.state, generation) if included else UNKNOWN
        policy_id = _id(ids, resolved.policy)
        before = now.get(id)
        there = before and (before.state, before.policy_id, before.contained)
        if there == (state, policy_id, resolved.contained):
            continue
        entry = with_policy(before, policy_id, records, new=new)
        entry = entry._replace(state=state, contained=resolved.contained)
        if entry != before:
            changed[id] = entry
    return changed


def with_policy(
    before: CgroupEntry | None,
    policy_id: int,
    records: Mapping[int, PolicyRecord],
    *,
    new: bool = False,
) -> CgroupEntry:
    """An entry once it has the policy of this id; `records` and `new` as above."""
    record = records.get(policy_id)
    if before and _gives_the_same(records.get(before.policy_id), record):
        return before._replace(policy_id=policy_id)
    owed = record is not None and record.acts and (new or record.existing)
    entry = _succeeding(before, records)._replace(policy_id=policy_id, owed=owed)
    return entry._replace(state=before.state, contained=before.contained) if before else entry


def settled(
    entries: Mapping[int, CgroupEntry], records: Mapping[int, PolicyRecord]
) -> dict[int, CgroupEntry]:
    """The entries after their open sockets were updated: a former policy is forgotten once no
    socket can have a value from it."""
    return {
        cgroup_id: entry._replace(
            owed=False,
            succeeds=False,
            was=tuple(
                id for id in entry.was if not _replaces(records[entry.policy_id], records[id])
            ),
        )
        for cgroup_id, entry in entries.items()
    }


def rows(plan: Plan, ids: Mapping[str, int], generation: int) -> dict[tuple[int, int], BirthEntry]:
    """The plan's births as the kernel has them, in a generation of globs; `ids` as above."""
    return {
        (located(state, generation), _number(name)): BirthEntry(
            located(birth.state, generation), _id(ids, birth.policy), birth.ask, birth.strength
        )
        for (state, name), birth in plan.births.items()
    }


def located(state: int, generation: int) -> int:
    """A state of the automaton as the kernel has it, in a generation of globs."""
    return state | generation if state else UNKNOWN


def policy_ids(records: Mapping[int, PolicyRecord]) -> dict[str, int]:
    """The ids of these records by their policies' names."""
    return {record.name: id for id, record in records.items()}


def _number(name: str | int) -> int:
    """What the kernel has for the name of a step."""
    if isinstance(name, int):
        return name
    return names.number(name) if name else ANY_NAME


def _id(ids: Mapping[str, int], policy: Policy | None) -> int:
    return ids[policy.name] if policy else 0


def _unused(
    actual: Actual, entries: Iterable[CgroupEntry], desired: Iterable[int]
) -> tuple[int, ...]:
    """The records that no birth, none of these entries, and no policy (`desired`) refers to."""
    used = {id for entry in entries for id in (entry.policy_id, *entry.was)}
    used |= {birth.policy_id for birth in actual.births.values()}
    return tuple(actual.records.keys() - used - set(desired))


def _gives_the_same(before: PolicyRecord | None, after: PolicyRecord | None) -> bool:
    """Whether no open socket can tell one policy from the other."""
    if before is None or after is None:
        return before is after
    return before.gives == after.gives and (before.existing or not after.existing)


def _succeeding(before: CgroupEntry | None, records: Mapping[int, PolicyRecord]) -> CgroupEntry:
    """What an entry remembers when it gets another policy."""
    if before is None:
        return CgroupEntry(0, 0)
    # A policy that comes back is its own former one.
    ids = dict.fromkeys((before.policy_id, *before.was))
    was = [id for id in ids if id and records[id].acts]
    return CgroupEntry(
        0,
        0,
        was=tuple(was[:FORMER_MAX]),
        succeeds=before.policy_id in was and records[before.policy_id].existing and not before.owed,
        forgot=before.forgot or len(was) > FORMER_MAX,
    )


def _replaces(record: PolicyRecord, former: PolicyRecord) -> bool:
    """Whether every value that `former` may have set is another one's after an update by
    `record`."""
    return (
        record.is_plain
        and record.options.keepalive
        and not former.digest
        and ranges(former.options).keys() <= ranges(record.options).keys()
    )
