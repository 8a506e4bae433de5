"""Options as policy files spell them: values, ranges, presets, defaults, and what contradicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from kabpf.errors import PolicyError
from kabpf.policy.model import Options, Origin, Range
from kabpf.policy.presets import Preset, presets
from kabpf.policy.yaml import Node, Source

KEYS = ("idle", "interval", "probes", "user_timeout", "jitter", "syn_retries", "preset")

# The kernel's limits (net/ipv4/tcp.c: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT,
# MAX_TCP_SYNCNT); it answers EINVAL outside them. A user timeout is an int of milliseconds.
SECONDS_MAX = 32767
PROBES_MAX = 127
SYN_RETRIES_MAX = 127
USER_TIMEOUT_MS_MAX = 2**31 - 1
JITTER_MAX = 50  # percent

T = TypeVar("T")


@dataclass(frozen=True)
class Given(Generic[T]):
    """A value, the node that it was read from, and how it was derived."""

    value: T
    node: Node
    note: str = ""


@dataclass(frozen=True)
class Draft:
    """Options before weaker ones fill in what is missing; `auto` and `off` are still words."""

    idle: Given[Range] | None = None
    interval: Given[Range] | None = None
    probes: Given[Range] | None = None
    user_timeout: Given[Range | str] | None = None
    jitter: Given[int] | None = None
    syn_retries: Given[int] | None = None
    preset: Given[Preset] | None = None  # the one that idle comes from or stands beside


NOTHING = Draft()


class Contradiction(NamedTuple):
    """What is not wrong and yet can't be meant; `what` has a place for whose options they are."""

    node: Node
    what: str

    def text(self, whose: str) -> str:
        return self.node.at(self.what.format(whose=whose))


def read(keys: Mapping[str, Node], note: str = "") -> Draft:
    """The options among `keys`; the note goes before those of presets."""
    preset = _preset(keys["preset"]) if "preset" in keys else None

    def given(key: str, value: Callable[[Node], T]) -> Given[T] | None:
        return Given(value(keys[key]), keys[key], note) if key in keys else None

    def derived(key: str, value: Callable[[Preset], int]) -> Given[Range] | None:
        if preset is None:
            return None
        return Given(Range.exactly(value(preset)), keys["preset"], _joined(note, preset.why(key)))

    return Draft(
        given("idle", _seconds) or derived("idle", lambda preset: preset.idle_s),
        given("interval", _seconds) or derived("interval", lambda preset: preset.interval_s),
        given("probes", _probes) or derived("probes", lambda preset: preset.probes),
        given("user_timeout", _user_timeout),
        given("jitter", _jitter),
        given("syn_retries", _syn_retries),
        Given(preset, keys["preset"], note) if preset else None,
    )


def over(stronger: Draft, weaker: Draft) -> Draft:
    """The stronger draft, with what it leaves out from the weaker."""
    if NOTHING in (stronger, weaker):
        return weaker if stronger == NOTHING else stronger
    merged = {key: getattr(stronger, key) or getattr(weaker, key) for key in KEYS}
    merged["preset"] = stronger.preset if stronger.idle else weaker.preset
    return Draft(**merged)


def finish(draft: Draft, whose: str) -> tuple[Options, dict[str, Origin]]:
    """Options of a complete draft, and by key where they come from. Raises PolicyError where
    `user_timeout: auto` has nothing to be computed from."""
    options = Options(
        True,
        _value(draft.idle),
        _value(draft.interval),
        _value(draft.probes),
        None,
        _value(draft.jitter) or 0,
        _value(draft.syn_retries),
    )
    given = {key: getattr(draft, key) for key in KEYS if key != "preset"}
    origins = {key: Origin(each.node.source, each.note) for key, each in given.items() if each}
    if draft.user_timeout is None or draft.user_timeout.value == "off":
        return options, origins
    if isinstance(draft.user_timeout.value, Range):
        return replace(options, user_timeout_ms=draft.user_timeout.value), origins
    timeout, sum_ = _auto(options, draft.user_timeout.node, whose)
    source, note = origins["user_timeout"]
    origins["user_timeout"] = Origin(source, _joined(note, f"auto: {sum_}"))
    return replace(options, user_timeout_ms=Range.exactly(timeout)), origins


def without_ranges(options: Options) -> Options:
    """With the upper bound in the place of each range, which is what an unset option gets."""

    def upper(value: Range | None) -> Range | None:
        return Range.exactly(value.high) if value else None

    return replace(
        options,
        idle_s=upper(options.idle_s),
        interval_s=upper(options.interval_s),
        probes=upper(options.probes),
        user_timeout_ms=upper(options.user_timeout_ms),
    )


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
        limit = f"the time-out of preset {preset.name} ({preset.timeout_s} s)"
        if idle.high >= preset.timeout_s:
            yield Contradiction(
                draft.idle.node,
                f"{idle.high} s of {{whose}} is not below {limit}, expected at most"
                f" {preset.timeout_s // 2} s",
            )
        elif idle.high + 2 * interval.high >= preset.timeout_s:
            from_preset = draft.interval.node is draft.preset.node
            yield Contradiction(
                (draft.idle if from_preset else draft.interval).node,
                f"idle + 2 * interval of {{whose}} ({idle.high} s + 2 * {interval.high} s) is not"
                f" below {limit}, expected room for a second probe",
            )


def check(key: str, text: str) -> None:
    """Raise PolicyError, which names the value alone, unless it is one of this option."""
    try:
        read({key: Node(text, key, Source("", 0))})
    except PolicyError as error:
        raise PolicyError(str(error).removeprefix(f":0: {key}: ")) from None


def _auto(options: Options, node: Node, whose: str) -> tuple[int, str]:
    """The milliseconds after which the probes would give up (a user timeout overrides them, see
    tcp(7)), and the sum."""
    idle, interval, probes = options.idle_s, options.interval_s, options.probes
    if idle is None or interval is None or probes is None:
        names = {"idle": idle, "interval": interval, "probes": probes}
        missing = ", ".join(name for name, value in names.items() if value is None)
        raise node.error(
            f"auto without {missing} in {whose} or in defaults,"
            " expected all of idle, interval and probes"
        )
    milliseconds = (idle.high + interval.high * probes.high) * 1000
    if milliseconds > USER_TIMEOUT_MS_MAX:
        raise node.error(
            f"auto makes {milliseconds} ms in {whose}, expected at most {USER_TIMEOUT_MS_MAX}"
        )
    return milliseconds, f"{idle.high} s + {interval.high} s * {probes.high}"


def _preset(node: Node) -> Preset:
    name = node.word("the name of a preset")
    known = presets()
    if name not in known:
        import difflib  # here, because it takes 3 ms

        close = difflib.get_close_matches(name, known, 1)
        expected = f"expected one of {', '.join(known)}"
        raise node.error(f"{node}, {f'did you mean {close[0]}?' if close else expected}")
    return known[name]


_DIGITS = "[0-9]{1,99}"  # of thousands Python refuses to make a number
_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "": 1000}


def _milliseconds(text: str) -> int | None:
    match = re.fullmatch(rf"({_DIGITS})(ms|s|m|h|d|)", text)
    return int(match[1]) * _UNITS_MS[match[2]] if match else None


def _seconds(node: Node) -> Range:
    def seconds(text: str) -> int | None:
        value = None if text.endswith("ms") else _milliseconds(text)
        return None if value is None else value // 1000

    expected = "a time in seconds (60, 90s, 5m, 1h) or a range (30s..5m)"
    return _range(node, expected, seconds, SECONDS_MAX, " seconds")


def _probes(node: Node) -> Range:
    return _range(node, f"a number, 1 to {PROBES_MAX}, or a range (3..9)", _number, PROBES_MAX)


def _user_timeout(node: Node) -> Range | str:
    expected = "a time (30, 30s, 1500ms, 5m), a range (30s..2m), auto or off"
    word = node.word(expected)
    if word in ("auto", "off"):
        return word
    return _range(node, expected, _milliseconds, USER_TIMEOUT_MS_MAX, " ms")


def _jitter(node: Node) -> int:
    expected = f"a percentage, 0% to {JITTER_MAX}%"
    word = node.word(expected)
    percent = _number(word.removesuffix("%"))
    if percent is None or not word.endswith("%"):
        raise node.expected(expected)
    if percent > JITTER_MAX:
        raise node.error(f"{node} is not in 0% to {JITTER_MAX}%")
    return percent


def _syn_retries(node: Node) -> int:
    expected = f"a number, 1 to {SYN_RETRIES_MAX}"
    value = _number(node.word(expected))
    if value is None:
        raise node.expected(expected)
    if not 1 <= value <= SYN_RETRIES_MAX:
        raise node.error(f"{node} is not in 1 to {SYN_RETRIES_MAX}")
    return value


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(_DIGITS, text) else None


def _range(
    node: Node, expected: str, number: Callable[[str], int | None], limit: int, unit: str = ""
) -> Range:
    word = node.word(expected)
    low, dots, high = word.partition("..")
    numbers: list[int] = []
    for text in (low, high) if dots else (low,):
        value = number(text)
        if value is None:
            raise node.expected(expected)
        if not 1 <= value <= limit:
            bound = replace(node, value=text)
            raise node.error(f"{bound} is not in 1 to {limit}{unit}")
        numbers.append(value)
    if numbers[0] > numbers[-1]:
        raise node.expected(f"the lower bound first ({high}..{low})")
    return Range(numbers[0], numbers[-1])


def _value(given: Given[T] | None) -> T | None:
    return given.value if given else None


def _joined(*notes: str) -> str:
    return ", ".join(filter(None, notes))


def _time(milliseconds: int) -> str:
    return f"{milliseconds // 1000} s" if milliseconds % 1000 == 0 else f"{milliseconds} ms"
