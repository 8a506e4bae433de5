"""The automaton over the bytes of a name, walked as the kernel walks it, against fnmatch."""

from __future__ import annotations

import fnmatch
import os
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mkdir import set_of

from kabpf.plan import globs
from kabpf.plan.births import Matched, NameAutomaton
from kabpf.plan.globs import BYTES_MAX, compiled_names

THOROUGHLY = settings(max_examples=400)

LETTERS = "ab-.@]!^\u00e9\u65e5\U0001f600"
PIECES = (
    "*",
    "**",
    "?",
    "[ab]",
    "[!a]",
    "[a-c]",
    "[]a]",
    "[!]a]",
    "[",
    "[!",
    "[z-a]",
    "[\u00e9a]",
    "[^a]",
)
GLOBS = st.lists(st.sampled_from((*LETTERS, *PIECES)), min_size=1, max_size=8).map("".join)
BYTES = st.integers(1, 255).filter(lambda byte: byte != ord("/"))
NAMES = st.one_of(
    st.text(st.sampled_from(LETTERS + "cz"), min_size=1, max_size=9).map(os.fsencode),
    st.lists(BYTES | st.sampled_from(b"ab-.\xc3\xa9"), min_size=1, max_size=12).map(bytes),
)


@THOROUGHLY
@given(st.sets(GLOBS, max_size=5), st.lists(NAMES, max_size=12))
@example({"*?"}, [b"\xc3\xa9a"])
@example({"*\u00e9*", "?*"}, [b"\xe2\xc3\xa9", b"a\xc3"])
@example({"[!z-a]", "[z-a]"}, [b"a"])
@example({"*a*b*c*", "*b*a*"}, [b"acbc", b"aabbcc", b"bab"])
def test_every_name_is_in_the_set_of_the_globs_that_match_it(
    some: set[str], names: list[bytes]
) -> None:
    """A glob matches as fnmatch says, or is in doubt where a byte above 127 meets ? or [...]."""
    built = compiled_names(frozenset(some))
    assert not built.left_out
    for name in names:
        known = matched(built, name)
        for glob in some:
            if glob in known.doubted:
                assert globs.is_doubtful(glob)
                assert max(name) > 127
            else:
                says = fnmatch.fnmatchcase(os.fsdecode(name), glob)
                assert (glob in known.globs) == says, (glob, name)


STEMS, ENDS = ("a", "b", "ab", "b@", "c-"), ("*.s", "*.t", "*s?", "*[ab].s", "*.s*t", ".s", "*")


@settings(max_examples=100)
@given(
    st.sets(st.tuples(st.sampled_from(STEMS), st.sampled_from(ENDS)).map("".join), max_size=16),
    st.sets(st.sampled_from(["*.s", "*b", "?*.t", "*a*b"])),
    st.lists(st.tuples(st.sampled_from(STEMS), st.text("ab.st\u00e9", max_size=6))),
)
@example({"a*.s", "b*.s", "b@*.s"}, set(), [("b", ".s"), ("b@", ".s.s"), ("b", ".sa")])
@example({"a*s?", "b*s?"}, {"*.s"}, [("b", ".ss"), ("b", "as\u00e9"), ("b", "b.s")])
def test_globs_that_end_alike_are_told_apart(
    some: set[str], others: set[str], names: list[tuple[str, str]]
) -> None:
    """What is built once for many globs that differ in their beginnings alone is right for each."""
    built = compiled_names(frozenset(some | others))
    for name in map("".join, names):
        known = matched(built, name.encode())
        for glob in some | others:
            if glob not in known.doubted:
                assert (glob in known.globs) == fnmatch.fnmatchcase(name, glob), (glob, name)


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("x?", "x\u00e9", Matched((), ("x?",))),
        ("x?", "y\u00e9", Matched()),
        ("x[a-z]*", "x\u00e9b", Matched((), ("x[a-z]*",))),
        ("x?*", "xa\u00e9", Matched(("x?*",))),
        ("*\u00e9", "\u65e5\u00e9", Matched(("*\u00e9",))),
    ],
)
def test_doubt_is_where_a_byte_above_127_meets_a_question(
    glob: str, name: str, expected: Matched
) -> None:
    """Nowhere else: what comes before or after is exact."""
    assert matched(compiled_names(frozenset({glob})), name.encode()) == expected


def test_longest_names_are_read_to_their_end() -> None:
    """255 bytes."""
    built = compiled_names(frozenset({"a*z", "b*"}))
    assert matched(built, b"a" * 254 + b"z").globs == ("a*z",)
    assert matched(built, b"a" * 255).globs == ()
    assert matched(built, b"b" * 255).globs == ("b*",)


def test_templates_of_a_thousand_units_have_room() -> None:
    """They are built in no time worth mentioning, and take little memory."""
    some = frozenset(
        glob for n in range(1000) for glob in (f"unit{n}@*.service", f"unit{n}@*.socket")
    )
    compiled_names.cache_clear()
    began = time.process_time()
    built = compiled_names(some)
    assert time.process_time() - began < 1
    assert built.left_out == ()
    assert len(built.sets) == 1 + len(some)
    assert sum(map(len, built.blocks)) <= BYTES_MAX // 2
    assert matched(built, b"unit321@main.service").globs == ("unit321@*.service",)


def test_dearest_globs_are_left_out() -> None:
    """Where several * would make too many states, those with most of them have no room; what is
    left has."""
    cheap = {f"worker-{n}-*" for n in range(50)}
    dear = {f"*a{n}*b{n}*" for n in range(40)}
    began = time.process_time()
    built = compiled_names(frozenset(cheap | dear))
    assert time.process_time() - began < 5
    assert set(built.left_out) <= dear
    assert built.left_out
    assert sum(map(len, built.blocks)) <= BYTES_MAX
    assert matched(built, b"worker-7-x").globs == ("worker-7-*",)


def test_what_is_left_out_does_not_depend_on_the_machine() -> None:
    """Two builds of the same globs are the same."""
    some = frozenset(f"*a{n}*b*" for n in range(30))
    first = compiled_names(some)
    compiled_names.cache_clear()
    assert compiled_names(some) == first


def test_no_globs_make_no_automaton() -> None:
    """The kernel has nothing to walk then."""
    assert compiled_names(frozenset()) == NameAutomaton((Matched(),))


def matched(built: NameAutomaton, name: bytes) -> Matched:
    return built.sets[set_of(built.blocks, name)]
