"""Options as policy files spell them: values, ranges, presets, defaults, and what contradicts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from kabpf.errors import PolicyError
from kabpf.policy.model import (
    BY_KEY,
    ON_COMMAND_LINE,
    OPTIONS,
    OptionRow,
    Options,
    Origin,
    Range,
    ranges,
)
from kabpf.policy.yaml import Node, Source

if TYPE_CHECKING:
    from kabpf.policy.presets import Timeout

KEYS = (*BY_KEY, "preset", "timeout")
COMMAND_KEYS = (*(row.key for row in ON_COMMAND_LINE), "preset")  # of `run`
REQUEST_KEYS = (*(row.key for row in ON_COMMAND_LINE if row.for_users), "preset")
TIMERS = ("idle", "interval", "probes")  # that a preset has, and that `auto` is computed from
# A twelfth of the shortest is the shortest interval; conntrack has the longest that is known.
TIMEOUT_S = Range(12, 432000)
TIMEOUT = "the idle timeout of a middlebox in seconds (350, 350s, 4m, 1h)"

T = TypeVar("T")


class Given(NamedTuple, Generic[T]):
    """A value, the node that it was read from, and how it was derived."""

    value: T
    node: Node
    note: str = ""


class Draft(NamedTuple):
    """Options before weaker ones fill in what is missing; `auto` and `off` are still words."""

    idle: Given[Range] | None = None
    interval: Given[Range] | None = None
    probes: Given[Range] | None = None
    user_timeout: Given[Range | str] | None = None
    jitter: Given[int] | None = None
    syn_retries: Given[int] | None = None
    connect_timeout: Given[int | str] | None = None
    preset: Given[Timeout] | None = None  # the one that idle comes from or stands beside


NOTHING = Draft()


class Contradiction(NamedTuple):
    """What is not wrong and yet can't be meant; `what` has a place for whose options they are."""

    node: Node
    what: str

    def text(self, whose: str) -> str:
        """As a warning says it: `file:line: key: what, what was expected`."""
        return self.node.at(self.what.format(whose=whose))


def parse(keys: Mapping[str, Node], note: str = "") -> Draft:
    """The options among `keys`, with their notes; `note` goes before those of presets and timeouts.
    Raises PolicyError."""
    preset = _middlebox(keys, note)
    given: dict[str, Given[Any]] = {}
    for row in OPTIONS:
        if row.key in keys:
            given[row.key] = Given(_parse_value(row, keys[row.key]), keys[row.key], note)
        elif preset and row.key in TIMERS:
            value = Range.exactly(getattr(preset.value, row.field))
            given[row.key] = Given(value, preset.node, _joined(note, preset.value.why(row.key)))
    return Draft(**given, preset=preset)


def over(stronger: Draft, weaker: Draft) -> Draft:
    """The stronger draft, with what it leaves out from the weaker."""
    if NOTHING in (stronger, weaker):
        return weaker if stronger == NOTHING else stronger
    merged = {key: getattr(stronger, key) or getattr(weaker, key) for key in BY_KEY}
    merged["preset"] = stronger.preset if stronger.idle else weaker.preset
    return Draft(**merged)


def finish(draft: Draft, whose: str) -> tuple[Options, dict[str, Origin]]:
    """Options of a complete draft, and by key where they come from. Raises PolicyError where
    `user_timeout: auto` has nothing to be computed from."""
    given = [(row, each) for row in OPTIONS if (each := getattr(draft, row.key))]
    origins = {row.key: Origin(each.node.source, each.note) for row, each in given}
    numbers = {row.field: each.value for row, each in given if each.value not in row.words}
    options = Options(True, **numbers)
    if draft.user_timeout is None or draft.user_timeout.value != "auto":
        return options, origins
    timeout, sum_ = _auto(options, draft.user_timeout.node, whose)
    source, note = origins["user_timeout"]
    origins["user_timeout"] = Origin(source, _joined(note, f"auto: {sum_}"))
    return options._replace(user_timeout_ms=Range.exactly(timeout)), origins


def without_ranges(options: Options) -> Options:
    """The options with the upper bound in the place of each range, which is what an unset option
    gets."""
    upper: dict[str, Any] = {
        BY_KEY[key].field: Range.exactly(value.high) for key, value in ranges(options).items()
    }
    return options._replace(**upper)


def contradictions(draft: Draft, options: Options) -> Iterator[Contradiction]:
    """What of a draft and its options can't be meant."""
    idle, interval = options.idle_s, options.interval_s
    timeout = options.user_timeout_ms
    # A user timeout overrides the probes (tcp(7)): the connection ends at the first timer after it
    # that finds a probe unanswered, which is never before the second one.
    if idle and interval and timeout and draft.user_timeout:
        second_timer = idle.high + interval.high
        if timeout.low < second_timer * 1000:
            yield Contradiction(
                draft.user_timeout.node,
                f"{_time(timeout.low)} is below idle + interval of {{whose}} ({idle.high} s +"
                f" {interval.high} s), expected at least {second_timer} s, or auto",
            )
    if draft.preset and draft.idle and draft.interval and idle and interval:
        preset = draft.preset.value
        if idle.high >= preset.timeout_s:
            yield Contradiction(
                draft.idle.node,
                f"{idle.high} s of {{whose}} is not below {preset.limit}, expected at most"
                f" {preset.timeout_s // 2} s",
            )
        elif idle.high + 2 * interval.high >= preset.timeout_s:
            from_preset = draft.interval.node is draft.preset.node
            yield Contradiction(
                (draft.idle if from_preset else draft.interval).node,
                f"idle + 2 * interval of {{whose}} ({idle.high} s + 2 * {interval.high} s) is not"
                f" below {preset.limit}, expected room for a second probe",
            )


def check(key: str, text: str) -> None:
    """Raise PolicyError, which names the value alone, unless it is one of this option."""
    try:
        parse({key: Node(text, key, Source("", 0))})
    except PolicyError as error:
        raise PolicyError(str(error).removeprefix(f":0: {key}: ")) from None


def seconds(text: str, limits: Range, expected: str) -> int:
    """A time that has a bound. Raises PolicyError, which names the value alone."""
    node = Node(text, "", Source("", 0))
    try:
        return _seconds(node, limits, expected)
    except PolicyError as error:
        raise PolicyError(str(error).removeprefix(":0: ")) from None


def _auto(options: Options, node: Node, whose: str) -> tuple[int, str]:
    """The milliseconds after which the probes would give up (a user timeout overrides them, see
    tcp(7)), and the sum."""
    idle, interval, probes = options.idle_s, options.interval_s, options.probes
    if idle is None or interval is None or probes is None:
        missing = ", ".join(key for key in TIMERS if getattr(options, BY_KEY[key].field) is None)
        raise node.error(
            f"auto without {missing} in {whose} or in defaults,"
            " expected all of idle, interval and probes"
        )
    milliseconds = (idle.high + interval.high * probes.high) * 1000
    limit = BY_KEY["user_timeout"].high
    if milliseconds > limit:
        raise node.error(f"auto makes {milliseconds} ms in {whose}, expected at most {limit}")
    return milliseconds, f"{idle.high} s + {interval.high} s * {probes.high}"


def _middlebox(keys: Mapping[str, Node], note: str) -> Given[Timeout] | None:
    if "preset" in keys and "timeout" in keys:
        raise keys["timeout"].error("beside preset, expected one of the two")
    if "preset" in keys:
        return Given(_preset(keys["preset"]), keys["preset"], note)
    if "timeout" in keys:
        return Given(_timeout(keys["timeout"]), keys["timeout"], note)
    return None


def _preset(node: Node) -> Timeout:
    from kabpf.policy.presets import counting_data_alone, presets  # here, because few have one

    name = node.word("the name of a preset")
    known = presets()
    if name not in known:
        if reason := counting_data_alone().get(name):
            raise node.error(reason)
        import difflib  # here, because it takes 3 ms

        close = difflib.get_close_matches(name, known, 1)
        expected = f"expected one of {', '.join(known)}"
        raise node.error(f"{node}, {f'did you mean {close[0]}?' if close else expected}")
    return known[name]


def _timeout(node: Node) -> Timeout:
    from kabpf.policy.presets import Timeout  # as above

    return Timeout(_seconds(node, TIMEOUT_S, TIMEOUT))


def _seconds(node: Node, limits: Range, expected: str) -> int:
    value = _number(node.word(expected), "s")
    if value is None:
        raise node.expected(expected)
    if not limits.low <= value <= limits.high:
        raise node.error(f"{node} is not in {limits.low} to {limits.high} seconds")
    return value


_NUMBER = r"([0-9]{1,99})([a-z%]*)"  # of thousands of digits Python refuses to make a number
_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
SUFFIXES = {  # by the unit of an option: what a number may end with, and how many units that is
    "s": _TIMES,
    "ms": {"ms": 1, **{suffix: seconds * 1000 for suffix, seconds in _TIMES.items()}},
    "%": {"%": 1},
    "": {"": 1},
}


def _parse_value(row: OptionRow, node: Node) -> Range | int | str:
    """A value in the row's unit, or one of its words."""
    word = node.word(row.expected)
    if word in row.words:
        return word
    low, dots, high = word.partition("..") if row.is_range else (word, "", "")
    in_file = bool(node.source.path)  # or else on a command line, or in a container's label
    numbers: list[int] = []
    for text in (low, high) if dots else (low,):
        value = _number(text, row.unit)
        if value is None:
            raise node.expected(row.expected)
        if not row.low <= value <= row.high:
            bound = node._replace(value=text)
            never = in_file and value > row.high and row.key == "idle"
            raise node.error(f"{bound} is not in {row.limits}{_NEVER if never else ''}")
        numbers.append(value)
    if numbers[0] > numbers[-1]:
        raise node.expected(f"the lower bound first ({high}..{low})")
    if dots and numbers[0] == numbers[1]:
        mode = ", in a policy file with mode: enforce" if in_file else ""
        raise node.error(f"{node} is a range of one value, expected {low}{mode}")
    return Range(numbers[0], numbers[-1]) if row.is_range else numbers[0]


_NEVER = "; for no probes at all write keepalive: off with mode: override or enforce"


def _number(text: str, unit: str) -> int | None:
    match = re.fullmatch(_NUMBER, text)
    if match is None or match[2] not in SUFFIXES[unit]:
        return None
    return int(match[1]) * SUFFIXES[unit][match[2]]


def _joined(*notes: str) -> str:
    return ", ".join(filter(None, notes))


def _time(milliseconds: int) -> str:
    return f"{milliseconds // 1000} s" if milliseconds % 1000 == 0 else f"{milliseconds} ms"
