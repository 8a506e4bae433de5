"""Globs within names in the kernel against fnmatch: cgroups that are made while no kabpfd runs have
the policy that a plain matcher finds which tries every selector by itself.

KABPF_PAIRS is how many pairs of policies and a path there are, KABPF_SEED where they begin. A set
of policies that failed is named by its seed; one in SEEDS is tried every time."""

import contextlib
import fnmatch
import json
import os
import random
import sys

import held
import pytest
from harness import PINS, path_of

from kabpf.plan.globs import is_doubtful
from kabpf.plan.patterns import patterns_of
from kabpf.policy import parser

PAIRS, FIRST = int(os.environ.get("KABPF_PAIRS", 5000)), int(os.environ.get("KABPF_SEED", 0))
PAIRS_OF_SET, SETS = 250, 20  # so many sets in a test, between which other tests have their turn
SEEDS: tuple[int, ...] = ()

UNIT = "ab@-.1"
TEXT = UNIT + "é日 ~{"
CLASSES = ("[ab]", "[!a]", "[a-c1]", "[]a]", "[é-]", "[")
ANY_BYTE = [byte for byte in range(1, 256) if byte not in b"/\n"]  # cgroup_mkdir() refuses \n


def _glob(choose, letters):
    """A glob, or a literal, of some pieces."""
    pieces = []
    for _ in range(choose.randint(1, 5)):
        kind = choose.random()
        if kind < 0.25:
            pieces.append("*")
        elif kind < 0.42:
            pieces.append("?")
        elif kind < 0.5:
            pieces.append(choose.choice(CLASSES[:3] if letters == UNIT else CLASSES))
        else:
            pieces.append("".join(choose.choices(letters, k=choose.randint(1, 4))))
    text = "".join(pieces)
    while "**" in text:
        text = text.replace("**", "*")
    return text if text not in (".", "..") else "a"


def _policies(choose, top):
    """Up to a dozen policies, whose idle times count from 101."""
    named = {}
    for number in range(choose.randint(1, 12)):
        selectors = []
        for _ in range(choose.randint(1, 3)):
            if choose.random() < 0.4:
                type_ = choose.choice(("service", "scope", "socket"))
                stem = _glob(choose, UNIT).lstrip("@") or "a"
                selectors.append({"unit": f"{stem}.{type_}"})
            else:
                whole = ("*", "**", "a", "b")
                names = [
                    choose.choice(whole) if choose.random() < 0.4 else _glob(choose, TEXT)
                    for _ in range(choose.randint(1, 4))
                ]
                selectors.append({"cgroup": "/".join([top, *names])})
        named[f"p{number}"] = {"select": selectors, "keepalive": {"idle": 101 + number}}
    return {"policies": named}


def _name(choose, selectors):
    """A name that one of the globs may match, or any bytes."""
    if choose.random() < 0.15:
        return bytes(choose.choices(ANY_BYTE, k=choose.choice((1, 2, 5, 40, 255))))
    text = choose.choice(choose.choice(selectors).text.split("/")[-4:])
    made = b""
    for letter in text:
        if letter == "*":
            some = ANY_BYTE if choose.random() < 0.3 else UNIT.encode()
            made += bytes(choose.choices(some, k=choose.choice((0, 1, 3, 30))))
        elif letter == "?" or (letter in "[]!" and choose.random() < 0.7):
            made += choose.choice(("a", "b", "c", "é", "1")).encode()
        else:
            made += os.fsencode(letter)
    return made[:255] or b"a"


def _matches(pattern, names):
    """A matcher that knows nothing of automata."""
    if pattern[:1] == ("**",):
        return any(_matches(pattern[1:], names[start:]) for start in range(len(names) + 1))
    if not pattern or not names:
        return pattern == names
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(pattern[1:], names[1:])


def _expected(patterns, names):
    """The idle time by the strongest selector that names the cgroup, or else its parent's."""
    named = [(rank, idle) for rank, pattern, idle in patterns if _matches(pattern, names)]
    if named:
        return max(named)[1]
    return _expected(patterns, names[:-1]) if names else None


def _may_be_asked(patterns, names):
    """Whether a byte above 127 may meet a ? or [...], so that kabpfd is asked."""
    if all(name.isascii() for name in names):
        return False
    return any(
        name not in ("*", "**") and is_doubtful(name) for _, names, _ in patterns for name in names
    )


def _idle_times():
    """The idle time of each cgroup's policy, by cgroup id, as bpftool reads it."""
    entries = held.listed("map", "dump", "pinned", str(PINS / "kabpf_cgroups"))
    ids = {each["formatted"]["key"]: each["formatted"]["value"]["policy_id"] for each in entries}
    idle = {id: _idle_time(id) for id in {*ids.values()}}
    return {cgroup: idle[id] for cgroup, id in ids.items()}


def _idle_time(policy_id):
    """Looked up alone: the table has 4,096 slots, whose dump takes a second."""
    key = [f"{byte:#x}" for byte in policy_id.to_bytes(4, sys.byteorder)]
    found = held.listed("map", "lookup", "pinned", str(PINS / "kabpf_policies"), "key", *key)
    return found["formatted"]["value"]["options"]["idle_s"]["high"] or None


def _made(top, name):
    """Whether there is a directory of this name now: . and the files of the kernel have theirs."""
    with contextlib.suppress(OSError):
        os.mkdir(os.path.join(top, name))
    return name not in (b".", b"..") and os.path.isdir(os.path.join(top, name))


def _set(seed, count, top, write_policy, kabpfctl):
    """Makes so many paths under one set of policies; 0 where the kernel has no room for it."""
    choose = random.Random(seed)
    content = json.dumps(_policies(choose, path_of(top)))
    policies = parser.combine([parser.parse(content.encode(), "p.yaml")])
    selectors = [selector for policy in policies for selector in policy.selectors]
    patterns = [
        ((kind, prefix, order), names, policy.rules.options.idle_s.high)
        for order, policy in enumerate(policies)
        for selector in policy.selectors
        for kind, prefix, names in patterns_of(selector)
    ]
    write_policy("p.yaml", content)
    kabpfctl("apply")
    if "resolved by kabpfd" in kabpfctl("plan").stdout:
        return 0
    made = {}
    for _ in range(count):
        here = os.fsencode(top)
        for _ in range(choose.randint(1, 4)):
            name = _name(choose, selectors)
            if not _made(here, name):
                break
            here = os.path.join(here, name)
        made[here] = os.stat(here).st_ino
    idle = _idle_times()
    asked = 0
    for path, id in made.items():
        names = tuple(os.fsdecode(path).removeprefix(str(top.parent)).split("/")[1:])
        if idle[id] != _expected(patterns, names):
            assert _may_be_asked(patterns, names), f"seed {seed}: {names}, {content}"
            asked += 1
    assert asked < len(made) / 2
    for directory, _, _ in os.walk(os.fsencode(top), topdown=False):
        if directory != os.fsencode(top):
            os.rmdir(directory)
    return len(made)


@pytest.mark.parametrize("first", range(FIRST, FIRST + -(-PAIRS // PAIRS_OF_SET), SETS))
def test_kernel_matches_globs_as_user_space_does(make_cgroup, write_policy, kabpfctl, first):
    """A new cgroup has the policy of the strongest selector that names it, whatever bytes its name
    has; what only user space can tell needs a byte above 127 and a ? or [...]."""
    top = make_cgroup()
    done = 0
    sets = range(first, min(first + SETS, FIRST + -(-PAIRS // PAIRS_OF_SET)))
    for seed in (*SEEDS, *sets):
        done += _set(seed, PAIRS_OF_SET, top, write_policy, kabpfctl)
    assert done > len(sets) * PAIRS_OF_SET / 2  # some paths come twice
