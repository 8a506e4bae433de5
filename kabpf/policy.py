"""Policy files: reads them strictly into `Policy` values. Knows nothing of cgroups or the kernel.

A file holds either `defaults` and `policies`, or one policy (`select` and `keepalive`) that takes
its name, and where `select` is missing its unit, from the file's name.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import filterfalse
from pathlib import Path
from typing import Any

import yaml

from kabpf.errors import PolicyError

FILE_SIZE_MAX = 64 * 1024
DEPTH_MAX = 8
ANY_DEPTH_MAX = 4  # in one path; each one doubles the states that the kernel may need
TEXT_MAX = 4095  # PATH_MAX without its NUL
NAME_BYTES_MAX = 255
SHOWN_MAX = 300  # characters of a wrong value in a message
UNIT_TYPES = (
    "service", "socket", "scope", "slice", "mount", "swap", "target", "timer", "path", "device",
    "automount",
)  # fmt: skip
GLOB = re.compile(r"[*?\[]")

# The kernel's ranges (net/ipv4/tcp.c: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT); it
# answers EINVAL outside them. A user timeout is an int of milliseconds.
SECONDS_MAX = 32767
PROBES_MAX = 127
USER_TIMEOUT_MS_MAX = 2**31 - 1


@dataclass(frozen=True)
class Directories:
    """Where policy files are: one main file, and drop-in directories with the strongest first."""

    main: Path
    drop_ins: tuple[Path, ...]


SYSTEM = Directories(
    Path("/etc/kabpf/policy.yaml"),
    (
        Path("/etc/kabpf/policy.d"),
        Path("/run/kabpf/policy.d"),
        Path("/usr/local/lib/kabpf/policy.d"),
        Path("/usr/lib/kabpf/policy.d"),
    ),
)


@dataclass(frozen=True)
class Source:
    """A place in a policy file; the line counts from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Options:
    """Keepalive options in the kernel's units; None leaves one as it is on the socket.

    With `keepalive` False nothing is set at all. Ranges: idle and interval 1 to 32767 s, probes 1
    to 127, user timeout 1 to 2147483647 ms (tcp(7)).
    """

    keepalive: bool = True
    idle_s: int | None = None
    interval_s: int | None = None
    probes: int | None = None
    user_timeout_ms: int | None = None


@dataclass(frozen=True)
class Selector:
    """Either a unit's name or a cgroup path; both may be globs."""

    kind: str  # "unit" or "cgroup"
    text: str
    source: Source

    @property
    def is_glob(self) -> bool:
        return GLOB.search(self.text) is not None


@dataclass(frozen=True)
class Policy:
    """Which cgroups get which options. Of two policies of one name the one read last is kept."""

    name: str
    selectors: tuple[Selector, ...]
    options: Options
    source: Source


@dataclass(frozen=True)
class _Text:
    """A scalar as it was written, and where."""

    text: str
    key: str
    source: Source

    def __str__(self) -> str:
        return _short(self.text)

    def error(self, what: str) -> PolicyError:
        return PolicyError(f"{self.source}: {self.key}: {what}")


@dataclass(frozen=True)
class _Draft:
    """Options before defaults are filled in; `auto` and `off` are still words."""

    idle_s: int | None = None
    interval_s: int | None = None
    probes: int | None = None
    user_timeout: int | _Text | None = None  # ms; 0 is off; the text is "auto"


@dataclass(frozen=True)
class PolicyFile:
    """What one file says, before `combine` fills in what other files' defaults say."""

    defaults: _Draft
    policies: tuple[tuple[Policy, _Draft], ...]


Cache = dict[Path, tuple[tuple[int, ...], PolicyFile]]


def load(directories: Directories, cache: Cache | None = None) -> tuple[Policy, ...]:
    """Read every policy file of `directories`; of files in `cache` that did not change, nothing.

    The files and their directories have to belong to root and be writable by root alone. Raises
    PolicyError with one finding for each bad file.
    """
    read_now: Cache = {}
    findings: list[str] = []
    for directory in dict.fromkeys((directories.main.parent, *directories.drop_ins)):
        # Before any of its files counts: one that masks another is never opened.
        with _collected(findings):
            _check_directory(directory)
    for path in filterfalse(_is_null, _strongest(directories)):
        with _collected(findings):
            read_now[path] = _read_unless_cached(path, cache or {})
    if findings:
        raise PolicyError(*findings)
    policies = combine([file for _, file in read_now.values()])
    if cache is not None:
        cache.clear()
        cache.update(read_now)
    return policies


def files(directories: Directories) -> list[Path]:
    """The files that count, in the order they are read: systemd's rules for configuration
    directories (systemd.unit(5)), where an empty file or a link to /dev/null masks a weaker one."""
    return [path for path in _strongest(directories) if not (_is_null(path) or _is_empty(path))]


def _strongest(directories: Directories) -> list[Path]:
    by_name: dict[str, Path] = {}
    for directory in reversed(directories.drop_ins):
        for path in _entries(directory):
            if path.suffix == ".yaml" and not path.name.startswith("."):
                by_name[path.name] = path
    drop_ins = [by_name[name] for name in sorted(by_name)]
    main = [directories.main] if os.path.lexists(directories.main) else []
    return main + drop_ins


def read(path: Path) -> PolicyFile:
    """Read one file, whoever owns it."""
    with _opened(path) as descriptor:
        return parse(_content(path, descriptor), str(path))


def parse(content: bytes, path: str) -> PolicyFile:
    """Check the text of one file. `path` names it in messages, and a policy without a name."""
    try:
        root = _Tree(content.decode(), path).build()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{path}:{line}: not UTF-8, expected UTF-8 text") from None
    if root is None:
        return PolicyFile(_Draft(), ())
    top = _mapping(root, ("defaults", "policies", "select", "keepalive"))
    if "keepalive" in top or "select" in top:
        for key in ("defaults", "policies"):
            if key in top:
                raise top[key].error("beside keepalive or select, expected a file of its own")
        policy = _policy(root, _name_of(root, Path(path).stem), default_selectors(path))
        return PolicyFile(_Draft(), (policy,))
    defaults = _draft(top["defaults"]) if "defaults" in top else _Draft()
    policies = _mapping(top["policies"]) if "policies" in top else {}
    return PolicyFile(
        defaults,
        tuple(_policy(node, _name_of(node, name), ()) for name, node in policies.items()),
    )


def check_option(key: str, text: str) -> None:
    """Raise PolicyError, which names the value alone, unless it is one of this option."""
    try:
        _draft(_Node({key: _Node(text, key, Source("", 0))}, "", Source("", 0)))
    except PolicyError as error:
        raise PolicyError(str(error).removeprefix(f":0: {key}: ")) from None


def combine(parsed: list[PolicyFile]) -> tuple[Policy, ...]:
    """Merge files in the order they were read: a later default and a later policy of the same name
    win. Raises PolicyError where `user_timeout: auto` has nothing to be computed from."""
    defaults = _Draft()
    drafts: dict[str, tuple[Policy, _Draft]] = {}
    for file in parsed:
        defaults = _filled(file.defaults, defaults)
        for policy, draft in file.policies:
            drafts.pop(policy.name, None)
            drafts[policy.name] = (policy, draft)
    policies: list[Policy] = []
    findings: list[str] = []
    for policy, draft in drafts.values():
        with _collected(findings):
            on = policy.options.keepalive
            options = _options(_filled(draft, defaults), policy) if on else policy.options
            policies.append(replace(policy, options=options))
    if findings:
        raise PolicyError(*findings)
    return tuple(policies)


def default_selectors(path: str) -> tuple[Selector, ...]:
    """The unit that a drop-in of this name speaks of, if it is named after one."""
    stem = Path(path).stem
    if not _is_unit(stem) or re.match(r"[0-9]+-", stem):
        return ()
    return (Selector("unit", _instances(stem), Source(path, 1)),)


def _read_unless_cached(path: Path, cache: Cache) -> tuple[tuple[int, ...], PolicyFile]:
    with _opened(path) as descriptor:
        status = os.fstat(descriptor)
        _check_owner(path, status)
        stamp = (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_ctime_ns,
        )
        if path in cache and cache[path][0] == stamp:
            return cache[path]
        return stamp, parse(_content(path, descriptor), str(path))


class _opened:
    """A regular file's descriptor; a FIFO does not block and is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise PolicyError(f"{self.path}: not a regular file, expected a policy file")
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _content(path: Path, descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > FILE_SIZE_MAX:
        raise PolicyError(f"{path}: {size} bytes, expected at most {FILE_SIZE_MAX}")
    try:
        return os.read(descriptor, FILE_SIZE_MAX)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> PolicyError:
    return PolicyError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}")


def _entries(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in os.listdir(directory)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from None


def _is_null(path: Path) -> bool:
    status = _status(path)
    return bool(status and stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3))


def _is_empty(path: Path) -> bool:
    status = _status(path)
    return bool(status and stat.S_ISREG(status.st_mode) and status.st_size == 0)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None  # said with its reason when the file is opened


@contextlib.contextmanager
def _collected(findings: list[str]) -> Iterator[None]:
    try:
        yield
    except PolicyError as error:
        findings += error.findings


def _check_directory(directory: Path) -> None:
    try:
        _check_owner(directory, os.stat(directory))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(directory, error) from None


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != 0:
        raise PolicyError(f"{path}: owned by uid {status.st_uid}, expected root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise PolicyError(f"{path}: mode {mode:04o}, expected to be writable by root alone")


@dataclass(frozen=True)
class _Node:
    """A YAML node with the key that leads to it."""

    value: str | list[_Node] | dict[str, _Node]
    key: str
    source: Source

    def error(self, what: str) -> PolicyError:
        where = f"{self.source}: {self.key}" if self.key else str(self.source)
        return PolicyError(f"{where}: {what}")

    @property
    def kind(self) -> str:
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        return _short(self.value) if self.value else "nothing"


class _Tree:
    """Builds nodes from YAML events, without the YAML features that a policy must not use."""

    def __init__(self, text: str, path: str) -> None:
        self._path = path
        self._events = self._parse(text)

    def build(self) -> _Node | None:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        root = self._node(next(self._events), "", 1)
        next(self._events)  # the document's end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            line = event.start_mark.line + 1
            raise PolicyError(f"{self._path}:{line}: a second document, expected one")
        return None if root.value == "" else root

    def _parse(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            # libyaml marks the end of the text by a line that is not there.
            line = min(mark.line + 1, len(text.splitlines()) or 1) if mark else 1
            raise PolicyError(f"{self._path}:{line}: not YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, _position(text, error)) + 1
            raise PolicyError(f"{self._path}:{line}: not YAML: {error.reason}") from None

    def _node(self, event: Any, key: str, depth: int) -> _Node:
        source = Source(self._path, event.start_mark.line + 1)
        node = _Node("", key, source)
        if isinstance(event, yaml.AliasEvent):
            raise node.error(f"*{event.anchor}: an alias, expected the value itself")
        if event.anchor is not None:
            raise node.error(f"&{event.anchor}: an anchor, expected the value alone")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise node.error(f"{ascii(tag)[1:-1]}: a tag, expected the value alone")
        if depth > DEPTH_MAX:
            raise node.error(f"nested too deep, expected at most {DEPTH_MAX} levels")
        if isinstance(event, yaml.ScalarEvent):
            if not event.value.isprintable() or len(event.value) > TEXT_MAX:
                raise node.error(f"expected one line of at most {TEXT_MAX} printable characters")
            return _Node(event.value, key, source)
        if isinstance(event, yaml.SequenceStartEvent):
            return _Node(self._items(key, depth), key, source)
        return _Node(self._pairs(key, depth), key, source)

    def _items(self, key: str, depth: int) -> list[_Node]:
        items: list[_Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, f"{key}[{len(items)}]", depth + 1))
        return items

    def _pairs(self, key: str, depth: int) -> dict[str, _Node]:
        pairs: dict[str, _Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = self._node(event, key, depth + 1)
            if not isinstance(name.value, str):
                raise name.error(f"{name.kind} as a key, expected a word")
            word = name.value or "''"
            inner = f"{key}.{word}" if key else word
            if name.value in pairs:
                first = pairs[name.value].source.line
                raise PolicyError(f"{name.source}: {inner}: given twice, first in line {first}")
            value = self._node(next(self._events), inner, depth + 1)
            pairs[name.value] = replace(value, source=name.source)
        return pairs


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."


def _position(text: str, error: yaml.reader.ReaderError) -> int:
    """Where the offending character is; libyaml counts bytes and characters inconsistently."""
    character = error.character
    return text.find(chr(character) if isinstance(character, int) else character)


def _mapping(node: _Node, known: tuple[str, ...] = ()) -> dict[str, _Node]:
    if not isinstance(node.value, dict):
        expected = f"keys ({', '.join(known)})" if known else "names with their policies"
        raise node.error(f"{node.kind}, expected {expected}")
    for key, value in node.value.items():
        if known and key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise value.error(f"unknown key, {hint}")
    return node.value


def _text(node: _Node, expected: str) -> _Text:
    if not isinstance(node.value, str) or not node.value:
        raise node.error(f"{node.kind}, expected {expected}")
    return _Text(node.value, node.key, node.source)


def _name_of(node: _Node, name: str) -> str:
    if not name or not name.isprintable() or len(name.encode()) > NAME_BYTES_MAX:
        raise node.error(f"{name!r}, expected a name of 1 to {NAME_BYTES_MAX} printable bytes")
    return name


def _policy(node: _Node, name: str, fallback: tuple[Selector, ...]) -> tuple[Policy, _Draft]:
    keys = _mapping(node, ("select", "keepalive"))
    if "keepalive" not in keys:
        raise node.error("no keepalive, expected off, on, or options (idle, interval, ...)")
    selectors = _selectors(keys["select"]) if "select" in keys else fallback
    if not selectors:
        raise node.error(
            "no select, expected a list of selectors or a file named after a unit"
            " (nginx.service.yaml)"
        )
    keepalive = keys["keepalive"]
    if isinstance(keepalive.value, dict):
        on, draft = True, _draft(keepalive)
    else:
        word = _text(keepalive, "off, on, or options (idle, interval, ...)")
        if word.text not in ("on", "off"):
            raise word.error(f"{word}, expected off, on, or options (idle, interval, ...)")
        on, draft = word.text == "on", _Draft()
    return Policy(name, selectors, Options(keepalive=on), node.source), draft


def _selectors(node: _Node) -> tuple[Selector, ...]:
    if not isinstance(node.value, list) or not node.value:
        kind = node.kind if node.value else "nothing"
        raise node.error(f"{kind}, expected a list such as [{{unit: nginx.service}}]")
    return tuple(_selector(item) for item in node.value)


def _selector(node: _Node) -> Selector:
    keys = _mapping(node, ("unit", "cgroup"))
    if len(keys) != 1:
        raise node.error(f"{len(keys)} keys, expected one: unit or cgroup")
    ((kind, value),) = keys.items()
    if kind == "unit":
        unit = _text(value, "a unit's name, as nginx.service")
        if not _is_unit(unit.text):
            raise unit.error(f"{unit}, expected a unit's name with its type, as nginx.service")
        return Selector(kind, _instances(unit.text), unit.source)
    path = _text(value, "a cgroup path, as /system.slice/nginx.service")
    if problem := _path_problem(path.text):
        raise path.error(f"{path}, expected {problem}")
    return Selector(kind, path.text.removesuffix("/") or "/", path.source)


def _is_unit(text: str) -> bool:
    """Whether systemd would take this name, or glob, for a unit (unit_name_is_valid())."""
    stem, _, type_ = text.rpartition(".")
    return (
        bool(stem)
        and not stem.startswith("@")
        and type_ in UNIT_TYPES
        and len(text) <= NAME_BYTES_MAX
        and re.fullmatch(r"[A-Za-z0-9:_.\\@*?\[\]!-]+", text) is not None
    )


def _instances(unit: str) -> str:
    """A template stands for its instances."""
    return re.sub(r"@(\.[a-z]+)$", r"@*\1", unit)


def _path_problem(path: str) -> str:
    if not path.startswith("/"):
        return "a path that starts with / at the cgroup2 root"
    names = path.removesuffix("/").split("/")[1:]
    if any(name in ("", ".", "..") or not name.isprintable() for name in names):
        return "a path of printable names without '.', '..' and empty ones"
    if any(len(name.encode()) > NAME_BYTES_MAX for name in names):
        return f"names of at most {NAME_BYTES_MAX} bytes"
    if any("**" in name and name != "**" for name in names):
        return "** between slashes, alone"
    if names.count("**") > ANY_DEPTH_MAX:
        return f"at most {ANY_DEPTH_MAX} times **"
    return ""


def _draft(node: _Node) -> _Draft:
    keys = _mapping(node, ("idle", "interval", "probes", "user_timeout"))
    return _Draft(
        idle_s=_seconds(keys["idle"]) if "idle" in keys else None,
        interval_s=_seconds(keys["interval"]) if "interval" in keys else None,
        probes=_probes(keys["probes"]) if "probes" in keys else None,
        user_timeout=_user_timeout(keys["user_timeout"]) if "user_timeout" in keys else None,
    )


_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "": 1000}


def _milliseconds(text: str) -> int | None:
    match = re.fullmatch(r"([0-9]+)(ms|s|m|h|d|)", text)
    return int(match[1]) * _UNITS_MS[match[2]] if match else None


def _seconds(node: _Node) -> int:
    expected = "a time in seconds (60, 90s, 5m, 1h)"
    word = _text(node, expected)
    value = _milliseconds(word.text)
    if value is None or word.text.endswith("ms"):
        raise word.error(f"{word}, expected {expected}")
    if not 1000 <= value <= SECONDS_MAX * 1000:
        raise word.error(f"{word} is not in 1 to {SECONDS_MAX} seconds")
    return value // 1000


def _probes(node: _Node) -> int:
    expected = f"a number, 1 to {PROBES_MAX}"
    word = _text(node, expected)
    if not re.fullmatch(r"[0-9]+", word.text):
        raise word.error(f"{word}, expected {expected}")
    if not 1 <= int(word.text) <= PROBES_MAX:
        raise word.error(f"{word} is not in 1 to {PROBES_MAX}")
    return int(word.text)


def _user_timeout(node: _Node) -> int | _Text:
    expected = "a time (30, 30s, 1500ms, 5m), auto or off"
    word = _text(node, expected)
    if word.text == "auto":
        return word
    if word.text == "off":
        return 0
    value = _milliseconds(word.text)
    if value is None:
        raise word.error(f"{word}, expected {expected}")
    if not 1 <= value <= USER_TIMEOUT_MS_MAX:
        raise word.error(f"{word} is not in 1 to {USER_TIMEOUT_MS_MAX} ms")
    return value


def _filled(draft: _Draft, defaults: _Draft) -> _Draft:
    return _Draft(
        *(
            getattr(defaults, field.name) if value is None else value
            for field in fields(draft)
            for value in [getattr(draft, field.name)]
        )
    )


def _options(draft: _Draft, policy: Policy) -> Options:
    timeout = draft.user_timeout
    if isinstance(timeout, _Text):
        timeout = _auto(draft, timeout, policy)
    return Options(True, draft.idle_s, draft.interval_s, draft.probes, timeout or None)


def _auto(draft: _Draft, word: _Text, policy: Policy) -> int:
    """The time at which the probes would give up: a user timeout overrides them (tcp(7))."""
    names = {"idle": draft.idle_s, "interval": draft.interval_s, "probes": draft.probes}
    if missing := [name for name, value in names.items() if value is None]:
        raise word.error(
            f"auto without {', '.join(missing)} in policy {policy.name} or in defaults,"
            " expected all of idle, interval and probes"
        )
    assert draft.idle_s and draft.interval_s and draft.probes
    milliseconds = (draft.idle_s + draft.interval_s * draft.probes) * 1000
    if milliseconds > USER_TIMEOUT_MS_MAX:
        raise word.error(
            f"auto makes {milliseconds} ms in policy {policy.name}, expected at most"
            f" {USER_TIMEOUT_MS_MAX}"
        )
    return milliseconds
