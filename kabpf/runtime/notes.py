"""What one command leaves for the next in /run/kabpf, beside what is in the kernel.

`former.json` has, after every policy was unloaded, which values open sockets still have from them.
`applied.json` says what the last reconcile was made of, so that status need not do it again.
`request.json` says what a user's request is about to change, for the next one where it is killed.
Each may be missing or damaged: then nobody knows whose the values are, and status looks itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kabpf import root_files
from kabpf.kernel import abi
from kabpf.plan.state import FORMER_MAX, CgroupEntry, Changes, PolicyRecord
from kabpf.policy.model import Policy

if TYPE_CHECKING:
    from kabpf.plan.desired import Actual

NUMBER_MAX = 1 << 40  # of cgroups, and of seconds
FORMER, APPLIED, REQUEST = "former.json", "applied.json", "request.json"
NOTE_MAX = 64 << 20  # bytes; a million cgroups, each with five policies


class Applied(NamedTuple):
    """What the last reconcile was made of."""

    stamp: str  # of the policy files
    asks: bool  # some new cgroups need user space
    sources: dict[str, str]  # file and line by the policy's name
    refused: str = ""  # what the kernel refused
    unrecorded: int = 0  # of the data plane's totals, when the whole tree was looked at last
    looked_at: float = 0  # and when that was, in seconds since the epoch
    lasting: str = ""  # the stamp of those files alone that commands do not write
    took_s: float = 0


class Begun(NamedTuple):
    """What a user's request is about to do."""

    cgroup_id: int  # whose policy it changes
    paths: dict[str, str]  # by the id of the cgroup: that one's, and those whose policies are over


def keep_former(actual: Actual, run: Path) -> None:
    """Keep which policies the sockets of which cgroups have values from."""
    cgroups: dict[int, dict[str, Any]] = {
        id: {"was": was[:FORMER_MAX], "forgot": forgot}
        for id, entry in actual.cgroups.items()
        for was in [[one for one in (entry.policy_id, *entry.was) if one in actual.records]]
        for forgot in [_is_forgotten(entry, was, actual)]
        if was or forgot
    }
    used = {id for one in cgroups.values() for id in one["was"]}
    # Destinations are not kept: a former policy is measured by its own options.
    policies = {
        id: abi.policy(actual.records[id]._replace(digest=0)).hex()
        for id in used
        if actual.records[id].acts
    }
    _write(run / FORMER, {"layout": abi.LAYOUT, "policies": policies, "cgroups": cgroups})


def former(cgroups: Collection[int], run: Path, *, was_loaded: bool = False) -> Changes:
    """The records and entries that were kept, of those of `cgroups`, which have no policy yet.

    Where kabpf was loaded before, which shows by `was_loaded` or a note, and nothing was kept that
    can be read, the former policies of all of them are forgotten.
    """
    kept = _read(run / FORMER)
    if kept.get("layout") == abi.LAYOUT:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, StopIteration):
            records = {_policy_id(id): _record(raw) for id, raw in kept["policies"].items()}
            entries = {
                int(id): _former(one["was"], one["forgot"], records)
                for id, one in kept["cgroups"].items()
                if int(id) in cgroups
            }
            return Changes(records=records, cgroups=entries)
    if was_loaded or (run / FORMER).exists() or (run / APPLIED).exists():
        return Changes(cgroups={id: CgroupEntry(0, 0, forgot=True) for id in cgroups})
    return Changes()


def not_recorded(totals: int, run: Path) -> tuple[int, float]:
    """How many new cgroups were not recorded since the whole tree was looked at last, of so many in
    all, and when that was, in seconds since the epoch; 0 where it is not known."""
    applied = read_applied(run)
    if applied is None or applied.unrecorded > totals:  # a data plane of before
        return totals, 0
    return totals - applied.unrecorded, applied.looked_at


def forget_former(run: Path) -> None:
    """Forget which former policies were kept: the kernel has them again."""
    with contextlib.suppress(OSError):
        (run / FORMER).unlink()


def forget_applied(run: Path) -> None:
    """Forget what was applied: a new data plane has nothing of it yet."""
    with contextlib.suppress(OSError):
        (run / APPLIED).unlink()


def keep_applied(applied: Applied, run: Path) -> None:
    """Keep what was applied; only where it differs, to spare a write."""
    if read_applied(run) != applied:
        _write(run / APPLIED, applied._asdict())


def keep_added(before: str, after: str, policy: Policy, run: Path) -> None:
    """Keep that a policy more is active, where the files had been applied as they were."""
    if (applied := read_applied(run)) and applied.stamp == before:
        sources = {**applied.sources, policy.name: str(policy.source)}
        keep_applied(applied._replace(stamp=after, sources=sources), run)


def keep_pruned(before: str, after: str, names: Collection[str], run: Path) -> None:
    """Keep that these policies are active no more, where the files had been applied as they
    were."""
    if (applied := read_applied(run)) and applied.stamp == before:
        sources = {name: source for name, source in applied.sources.items() if name not in names}
        keep_applied(applied._replace(stamp=after, sources=sources), run)


def keep_begun(begun: Begun, run: Path) -> None:
    """Keep what a request is about to do."""
    _write(run / REQUEST, begun._asdict())


def forget_begun(run: Path) -> None:
    """Forget it: all is done, or nothing was."""
    with contextlib.suppress(OSError):
        (run / REQUEST).unlink()


def read_begun(run: Path) -> Begun | None:
    """What a request was about to do that did not come to its end, or None."""
    kept = _read(run / REQUEST)
    paths = kept.get("paths")
    if (
        kept.keys() == {*Begun._fields}
        and isinstance(paths, dict)
        and all(id.isdecimal() for id in paths)
        and _are_texts([*paths.values()])
        and isinstance(kept["cgroup_id"], int)
        and str(kept["cgroup_id"]) in paths
    ):
        return Begun(**kept)
    return None


def read_applied(run: Path) -> Applied | None:
    """What was applied, or None where that is not known."""
    kept = _read(run / APPLIED)
    sources = kept.get("sources")
    texts = [kept.get("stamp"), kept.get("refused"), kept.get("lasting")]
    if isinstance(sources, dict) and isinstance(kept.get("asks"), bool):
        texts += sources.values()
        numbers = [kept.get(key) for key in ("unrecorded", "looked_at", "took_s")]
        if kept.keys() == set(Applied._fields) and _are_texts(texts) and _are_numbers(numbers):
            return Applied(**kept)
    return None


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and 0 <= value < NUMBER_MAX for value in values)


def _policy_id(text: str) -> int:
    id = int(text)
    if not 0 < id < abi.POLICIES:
        raise ValueError(f"{id} is not a policy id")
    return id


def _record(raw: str) -> PolicyRecord:
    record = abi.read_policy(bytes.fromhex(raw))
    if not record.name:
        raise ValueError("a record without a name")
    return record


def _is_forgotten(entry: CgroupEntry, was: list[int], actual: Actual) -> bool:
    """Whether sockets may have values that can't be told by what is kept."""
    return (
        entry.forgot
        or len(was) > FORMER_MAX
        or any(actual.records[id].digest for id in was if actual.records[id].acts)
    )


def _former(was: list[int], forgot: bool, records: dict[int, PolicyRecord]) -> CgroupEntry:
    known = [int(id) for id in was if id in records]
    return CgroupEntry(0, 0, was=tuple(known[:FORMER_MAX]), forgot=bool(forgot))


def _read(file: Path) -> dict[str, Any]:
    """What a file holds, or nothing where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(root_files.read(file, NOTE_MAX))
        if isinstance(content, dict):
            return content
    return {}


def _write(file: Path, content: dict[str, Any]) -> None:
    # The file is small and of use for one boot: it need not reach a disk, only be whole.
    with contextlib.suppress(OSError):
        root_files.replace(file, json.dumps(content).encode(), mode=0o600)
