"""What a shell script starts, and with which environment.

The script is followed as a shell would run it where its files and variables say how; nothing is
executed. What hangs on anything else is a doubt, and no value is taken from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path

from kabpf.migration.files import Files, absolute
from kabpf.migration.printed import printed
from kabpf.migration.shell_words import (
    CUTS,
    Other,
    Parameter,
    Part,
    Substitution,
    Text,
    Token,
    tokens,
)
from kabpf.systemd.unit_files import Assignment, Lines

UNKNOWN = "\0"  # in a value: what only the shell knows when it runs; no variable can hold it
DEPTH_MAX = 40
STEPS_MAX = 50_000  # of one script; a step is about a word
WORDS_MAX = 4096  # of a command
VALUE_MAX = 1 << 17  # bytes of a string that execve(2) takes: MAX_ARG_STRLEN

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*+)(\+?)=(.*)", re.DOTALL)
_DECLARES = ("export", "declare", "typeset", "readonly", "local")
# Commands that are taken to succeed.
_SUCCEED = frozenset((
    "true", ":", "cd", "mkdir", "export", "readonly", "set", "umask", "ulimit", "sleep", "echo",
    "printf", "chown", "chmod", "touch", "install", "rm", "ln", "mv", "cp", ".", "source",
    "local", "declare", "typeset", "unset", "shift", "exec", "sync", "mount",
))  # fmt: skip
_ENDS_COMMAND = frozenset(["\n", ";", "&", "&&", "||", "|", "|&", ";;", ";&", ";;&", ")", "("])
_GIVEN = frozenset(["HOME", "LOGNAME", "PATH", "PWD", "SHELL", "USER"])  # always there

Environment = Mapping[str, Assignment]


@dataclass(frozen=True)
class Command:
    """A command of a script, or of a unit."""

    words: list[str]
    environment: Environment
    lines: Lines
    directory: str = "/"
    is_part: bool = False  # its variables are not those of what comes after it


@dataclass
class Outcome:
    """What a script leaves: its variables, and what was noticed on the way."""

    environment: dict[str, Assignment] = field(default_factory=dict)
    seen: list[Assignment] = field(default_factory=list)
    doubts: list[tuple[Lines, str]] = field(default_factory=list)
    unnamed: list[Lines] = field(default_factory=list)  # files whose names were not known


class _Mode(IntEnum):
    SKIP = 0
    MAYBE = 1
    SURE = 2


class _StopError(Exception):
    """The script is followed no further."""


def follow(
    text: str,
    lines: Lines,
    command: Command,
    files: Files,
    start: Callable[[Command], None],
    watched: frozenset[str],
) -> Outcome:
    """Follow a script that `command` starts with its words as $0, $1 and so on: `start` is called
    for every command that is none of the shell's own. `watched` are the variables that count."""
    shell = _Shell(files, start, watched, command)
    try:
        shell.run(text, lines)
    except _StopError as error:
        files.refuse(Path(lines.path), str(error))
    outcome = shell.outcome
    outcome.environment = shell.exported()
    return outcome


class _Shell:
    """The state of a shell."""

    def __init__(
        self,
        files: Files,
        start: Callable[[Command], None],
        watched: frozenset[str],
        command: Command,
    ) -> None:
        self._files = files
        self._start = start
        self._watched = watched
        self._variables = dict(command.environment)
        self._exported = set(command.environment)
        self._name = command.words[0]
        self._arguments: Sequence[str] = command.words[1:]
        self._directory = command.directory
        self._functions: dict[str, tuple[Sequence[Token], Lines]] = {}
        self._exports_all = False
        self._depth = 0
        self._left = STEPS_MAX
        self._path = ""
        self.outcome = Outcome()

    def exported(self) -> dict[str, Assignment]:
        return {name: one for name, one in self._variables.items() if name in self._exported}

    def run(self, text: str, lines: Lines, mode: _Mode = _Mode.SURE) -> None:
        """Run a text of a file; it counts lines from the first of `lines`."""
        former, self._path = self._path, lines.path
        found = tokens(text, lines.first)
        self.spend(len(found))
        self.follow(found, mode)
        self._path = former

    def follow(self, found: Sequence[Token], mode: _Mode) -> None:
        if self._depth >= DEPTH_MAX:
            raise _StopError(f"nested more than {DEPTH_MAX} times")
        self._depth += 1
        _Reading(self, found).all(mode)
        self._depth -= 1

    # What _Reading asks for.

    def deeper(self, by: int) -> None:
        self._depth += by
        if self._depth > DEPTH_MAX:
            raise _StopError(f"nested more than {DEPTH_MAX} times")

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0 or not self._files.spend(steps):
            raise _StopError("too long to be followed")

    def state(self) -> tuple[object, ...]:
        return (dict(self._variables), set(self._exported), self._directory, self._exports_all)

    def restore(self, state: tuple[object, ...]) -> None:
        self._variables, self._exported, self._directory, self._exports_all = state  # type: ignore[assignment]

    def define(self, name: str, body: Sequence[Token]) -> None:
        self._functions[name] = (body, Lines(self._path, 1, 1))

    def simple(self, found: list[Token], mode: _Mode) -> tuple[bool | None, bool]:
        """Run a simple command: whether it succeeds, and whether the script ends with it."""
        self.spend(len(found) + len(self._variables) // 16)
        if len(found) > WORDS_MAX:
            raise _StopError(f"a command of more than {WORDS_MAX} words")
        count = 0
        while count < len(found) and _assigned(found[count]):
            count += 1
        given = [self._assignment(token) for token in found[:count]]
        if count == len(found):
            for one in given:
                self._assign(one, mode)
            return True, False
        rest = found[count:]
        name = rest[0].plain
        if name in ("command", "builtin", "time") and len(rest) > 1:
            rest = rest[1:]
            name = rest[0].plain
        if name in _DECLARES:
            self._declare(name, rest[1:], mode)
            return True, False
        words = [word for token in rest for word in self._words(token.parts)]
        if not words:
            return None, False
        return self._command(words, given, Lines(self._path, found[0].first, found[-1].last), mode)

    def _command(
        self, words: list[str], given: list[Assignment], lines: Lines, mode: _Mode
    ) -> tuple[bool | None, bool]:
        name = words[0]
        sure = mode == _Mode.SURE
        if name in ("exit", "return"):
            return True, sure
        if name in ("[", "test", "[["):
            return self.test(words[1:]), False
        if name == "false":
            return False, False
        if name in self._functions:
            self._call(name, words[1:], mode)
            return None, False
        if name == "unset":
            for each in words[1:]:
                if each in self._variables and not each.startswith("-"):
                    self._unset(each, lines, mode)
        elif name == "set":
            self._set(words[1:])
        elif name == "shift":
            by = int(words[1]) if len(words) > 1 and re.fullmatch("[0-9]{1,4}", words[1]) else 1
            self._arguments = self._arguments[by:]
        elif name == "cd" and len(words) > 1:
            self._directory = absolute(words[1], self._directory)
        elif name in (".", "source") and len(words) > 1:
            self._source(words[1], lines, mode)
        elif name == "eval":
            self._eval(" ".join(words[1:]), lines, mode)
        elif name == "exec":
            return True, self._exec(words[1:], given, lines, mode)
        elif name not in _SUCCEED:
            self._external(words, given, lines, mode, is_part=bool(given))
        return (True if name in _SUCCEED else None), False

    def _call(self, name: str, arguments: Sequence[str], mode: _Mode) -> None:
        body, where = self._functions[name]
        former = self._arguments, self._path
        self._arguments, self._path = arguments, where.path
        self.follow(body, mode)
        self._arguments, self._path = former

    def _exec(self, words: list[str], given: list[Assignment], lines: Lines, mode: _Mode) -> bool:
        clears = False
        while words and words[0].startswith("-"):
            clears |= "c" in words[0]
            words = words[2:] if words[0].endswith("a") else words[1:]
        if clears:
            words = ["env", "-i", *words] if words else []
        if words:
            self._external(words, given, lines, mode, is_part=False)
        return bool(words) and mode == _Mode.SURE

    def _external(
        self, words: list[str], given: list[Assignment], lines: Lines, mode: _Mode, *, is_part: bool
    ) -> None:
        counted = [one for one in given if one.name in self._watched]
        if counted and mode == _Mode.MAYBE:
            self.outcome.doubts += [(one.lines, one.value) for one in counted]
            return
        self.outcome.seen += counted
        if UNKNOWN in words[0]:
            self.outcome.unnamed.append(lines)
        environment = self.exported() | {one.name: one for one in given}
        self._start(Command(words, environment, lines, self._directory, is_part and bool(counted)))

    def _assign(self, one: Assignment, mode: _Mode, exports: bool = False) -> None:
        if one.name in self._watched:
            if mode == _Mode.MAYBE:
                self.outcome.doubts.append((one.lines, one.value))
                one = Assignment(one.name, UNKNOWN, one.lines)
            else:
                self.outcome.seen.append(one)
        elif mode == _Mode.MAYBE:
            one = Assignment(one.name, UNKNOWN, one.lines)
        self._variables[one.name] = one
        if exports or self._exports_all:
            self._exported.add(one.name)

    def _unset(self, name: str, lines: Lines, mode: _Mode) -> None:
        if mode == _Mode.MAYBE:
            self._variables[name] = Assignment(name, UNKNOWN, lines)
            return
        self._variables.pop(name, None)
        self._exported.discard(name)

    def _declare(self, command: str, rest: list[Token], mode: _Mode) -> None:
        options = "".join(token.plain[1:] for token in rest if token.plain.startswith("-"))
        exports = command == "export" or "x" in options
        for token in rest:
            if _assigned(token):
                self._assign(self._assignment(token), mode, exports)
            elif (name := token.plain) in self._variables and exports:
                if "n" in options:
                    self._exported.discard(name)
                else:
                    self._exported.add(name)

    def _set(self, words: list[str]) -> None:
        if words[:1] == ["--"]:
            self._arguments = words[1:]
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if (re.fullmatch("[-+][a-z]*a[a-z]*", word)) or (
                word in ("-o", "+o") and following == "allexport"
            ):
                self._exports_all = word.startswith("-")

    def _source(self, name: str, lines: Lines, mode: _Mode) -> None:
        if UNKNOWN in name:
            self.outcome.unnamed.append(lines)
            return
        if "/" not in name:
            name = f"./{name}"
        path = self._files.inside(absolute(name, self._directory))
        self.run(self._files.text(path), Lines(str(path), 1, 1), mode)

    def _eval(self, text: str, lines: Lines, mode: _Mode) -> None:
        if UNKNOWN not in text and len(text) < VALUE_MAX:
            self.run(text, Lines(self._path, lines.first, lines.last), mode)

    def _assignment(self, token: Token) -> Assignment:
        first = token.parts[0]
        assert isinstance(first, Text)
        match = _ASSIGNMENT.match(first.text)
        assert match is not None
        value = self._value((Text(match[3], False), *token.parts[1:]))
        if match[2] and match[1] in self._variables:
            value = self._variables[match[1]].value + value
        if len(value) > VALUE_MAX:
            value = UNKNOWN
        return Assignment(match[1], value, Lines(self._path, token.first, token.last))

    def _words(self, parts: tuple[Part, ...]) -> list[str]:
        """What a word of a command expands to."""
        if len(parts) <= 2 and isinstance(parts[-1], Parameter):
            last = parts[-1]
            if last.name in ("@", "*") and not last.operator:
                return list(self._arguments)
            if len(parts) == 1 and not last.is_quoted:
                value = self._parameter(last)
                return value.split() if UNKNOWN not in value else [value]
        return [self._value(parts)]

    def _value(self, parts: Sequence[Part]) -> str:
        value = ""
        for part in parts:
            if isinstance(part, Text):
                value += part.text
            elif isinstance(part, Substitution):
                value += self._printed(part.text)
            else:
                value += UNKNOWN if isinstance(part, Other) else self._parameter(part)
            if len(value) > VALUE_MAX:
                return UNKNOWN
        return value

    def _printed(self, text: str) -> str:
        """What a command prints that tells a script its own directory, and the like."""
        found = tokens(text)
        self.deeper(1)
        self.spend(len(found))
        result = printed(found, self._value, self._directory, self._files)
        self.deeper(-1)
        return UNKNOWN if result is None or UNKNOWN in result else result

    def _parameter(self, part: Parameter) -> str:
        name, operator = part.name, part.operator
        value = self._known(name)
        if operator in CUTS and value and UNKNOWN not in value:
            before, slash, after = value.rpartition("/")
            return after if operator == "##*/" else before if slash else value
        is_set = bool(value) if operator.startswith(":") else value is not None
        kind = operator.lstrip(":")
        if kind == "+":
            return self._value(part.word) if is_set else ""
        if kind in ("-", "="):
            if is_set:
                return value or ""
            return UNKNOWN if name in _GIVEN else self._value(part.word)
        if value is not None:
            return value
        return "" if name in self._watched else UNKNOWN

    def _known(self, name: str) -> str | None:
        if name in self._variables:
            return self._variables[name].value
        if name == "0":
            return self._name
        if name == "BASH_SOURCE":
            return self._files.name(Path(self._path)) if self._path.startswith("/") else None
        if name in ("@", "*"):
            return " ".join(self._arguments)
        if name == "#":
            return str(len(self._arguments))
        if name.isdigit():
            number = int(name[:4])
            return self._arguments[number - 1] if 0 < number <= len(self._arguments) else None
        return None

    def test(self, words: list[str]) -> bool | None:
        """Whether a test(1) is true, where files and known values decide it."""
        words = [word for word in words if word not in ("]", "]]")]
        if any(UNKNOWN in word for word in words):
            return None
        if len(words) > 1 and words[0] == "!":
            result = self.test(words[1:])
            return None if result is None else not result
        if len(words) == 2 and words[0] in ("-e", "-f", "-r", "-s", "-x", "-d"):
            path = self._files.inside(absolute(words[1], self._directory))
            return os.path.isdir(path) if words[0] == "-d" else os.path.exists(path)
        if len(words) == 2 and words[0] in ("-n", "-z"):
            return bool(words[1]) == (words[0] == "-n")
        if len(words) == 3 and words[1] in ("=", "==", "!="):
            return (words[0] == words[2]) == (words[1] != "!=")
        return bool(words[0]) if len(words) == 1 else None

    def case(self, token: Token) -> str | None:
        """The word of a `case`, where it is known."""
        value = self._value(token.parts)
        return None if UNKNOWN in value else value

    def pattern(self, token: Token) -> str:
        return self._value(token.parts)


def _assigned(token: Token) -> bool:
    first = token.parts[0] if token.parts else None
    return isinstance(first, Text) and not first.is_quoted and bool(_ASSIGNMENT.match(first.text))


class _Reading:
    """The grammar of a shell's commands, which are run as they are read."""

    def __init__(self, shell: _Shell, found: Sequence[Token]) -> None:
        self._shell = shell
        self._found = found
        self._at = 0
        self._ended = False

    def all(self, mode: _Mode) -> None:
        while self._at < len(self._found):
            self._list((), mode)
            self._at += 1  # over what closes nothing

    def _peek(self) -> Token | None:
        return self._found[self._at] if self._at < len(self._found) else None

    def _is(self, *words: str) -> bool:
        token = self._peek()
        return token is not None and (token.operator or token.plain) in words

    def _skip(self, *words: str) -> None:
        while self._is(*words):
            self._at += 1

    def _list(self, ends: tuple[str, ...], mode: _Mode) -> bool | None:
        """Commands up to one of the words or operators; whether the last one succeeds."""
        result: bool | None = True
        while (token := self._peek()) is not None:
            if self._is("\n", ";", "&"):
                self._at += 1
            elif self._is(*ends, ")", "}", ";;", ";&", ";;&") or (
                token.plain in ("fi", "done", "esac", "then", "do", "else", "elif")
            ):
                break
            else:
                result = self._and_or(mode)
        return result

    def _and_or(self, mode: _Mode) -> bool | None:
        result = self._pipeline(mode)
        while self._is("&&", "||"):
            wanted = self._is("&&")
            self._at += 1
            self._skip("\n")
            if result is None:
                self._pipeline(min(mode, _Mode.MAYBE))
            elif result == wanted:
                result = self._pipeline(mode)
            else:
                self._pipeline(_Mode.SKIP)
        return result

    def _pipeline(self, mode: _Mode) -> bool | None:
        negated = self._is("!")
        self._skip("!")
        result = self._command(mode)
        while self._is("|", "|&"):
            self._at += 1
            self._skip("\n")
            result = self._command(mode)
        return result if result is None or not negated else not result

    def _command(self, mode: _Mode) -> bool | None:
        mode = _Mode.SKIP if self._ended else mode
        token = self._peek()
        if token is None:
            return None
        compound = {
            "(": self._subshell, "{": self._group, "if": self._if, "while": self._while,
            "until": self._while, "for": self._for, "select": self._for, "case": self._case,
            "function": self._function, "[[": self._double_test,
        }.get(token.operator or token.plain)  # fmt: skip
        if compound is None:
            return self._simple(mode)
        self._shell.deeper(1)
        self._at += 1
        result = compound(mode)
        self._shell.deeper(-1)
        return result

    def _simple(self, mode: _Mode) -> bool | None:
        begin = self._at
        found: list[Token] = []
        while (token := self._peek()) is not None:
            if token.operator == "(":
                if len(found) == 1 and self._at == begin + 1 and not _assigned(found[0]):
                    self._skip("(", ")", "\n")
                    self._define(found[0].plain)
                    return True
                self._close()
                continue
            if token.operator in _ENDS_COMMAND:
                break
            found.append(token)
            self._at += 1
        if self._at == begin:
            self._at += 1
            return None
        if mode == _Mode.SKIP or not found:
            self._shell.spend(len(found))
            return None
        result, ends = self._shell.simple(found, mode)
        self._ended |= ends
        return result

    def _close(self) -> None:
        """Go on behind the parenthesis that closes the one here."""
        depth = 0
        while (token := self._peek()) is not None:
            self._at += 1
            depth += (token.operator == "(") - (token.operator == ")")
            if depth == 0:
                return

    def _define(self, name: str) -> None:
        """A function, whose body is the compound command here."""
        begin, ended = self._at, self._ended
        self._command(_Mode.SKIP)
        self._ended = ended
        self._shell.define(name, self._found[begin : self._at])

    def _function(self, mode: _Mode) -> bool | None:
        token = self._peek()
        self._at += 1
        self._skip("(", ")", "\n")
        self._define(token.plain if token else "")
        return True

    def _subshell(self, mode: _Mode) -> bool | None:
        if self._is("("):  # arithmetic
            self._at -= 1
            self._close()
            return None
        state, ended = self._shell.state(), self._ended
        self._shell.spend(10)
        result = self._list((")",), mode)
        self._skip(")")
        self._shell.restore(state)
        self._ended = ended
        return result

    def _group(self, mode: _Mode) -> bool | None:
        result = self._list(("}",), mode)
        self._at += self._is("}")
        return result

    def _if(self, mode: _Mode) -> bool | None:
        taken = mode  # of the branches that come
        while True:
            condition = self._list(("then",), taken)
            self._at += self._is("then")
            branch = {True: taken, False: _Mode.SKIP, None: min(taken, _Mode.MAYBE)}[condition]
            self._list(("elif", "else", "fi"), branch)
            taken = {True: _Mode.SKIP, False: taken, None: min(taken, _Mode.MAYBE)}[condition]
            if not self._is("elif"):
                break
            self._at += 1
        if self._is("else"):
            self._at += 1
            self._list(("fi",), taken)
        self._at += self._is("fi")
        return None

    def _while(self, mode: _Mode) -> bool | None:
        is_until = self._found[self._at - 1].plain == "until"
        condition = self._list(("do",), mode)
        self._at += self._is("do")
        if condition is not None:
            condition = condition != is_until
        self._list(
            ("done",),
            {True: mode, False: _Mode.SKIP, None: min(mode, _Mode.MAYBE)}[condition],
        )
        self._at += self._is("done")
        return None

    def _for(self, mode: _Mode) -> bool | None:
        while (token := self._peek()) is not None and token.plain not in ("do", "{"):
            self._at += 1
        self._at += self._is("do")
        self._list(("done",), min(mode, _Mode.MAYBE))
        self._at += self._is("done")
        return None

    def _case(self, mode: _Mode) -> bool | None:
        token = self._peek()
        word = self._shell.case(token) if token else None
        self._at += 1
        self._skip("\n")
        self._skip("in")
        while True:
            self._skip("\n", ";;", ";&", ";;&", ";")
            if self._peek() is None or self._is("esac"):
                break
            patterns = []
            while (token := self._peek()) is not None and token.operator != ")":
                if not token.operator:
                    patterns.append(self._shell.pattern(token))
                self._at += 1
            self._at += 1
            if word is None:
                arm = min(mode, _Mode.MAYBE)
            elif any(fnmatchcase(word, each) for each in patterns):
                arm, word = mode, "\n"  # which no later pattern but * fits
                mode = _Mode.SKIP
            else:
                arm = _Mode.SKIP
            self._list((";;", ";&", ";;&", "esac"), arm)
            if self._is("}", ")", "fi", "done", "then", "do", "else", "elif"):
                self._at += 1  # where the script is wrong
        self._at += self._is("esac")
        return None

    def _double_test(self, mode: _Mode) -> bool | None:
        words: list[Token] = []
        is_simple = True
        while (token := self._peek()) is not None and token.plain != "]]":
            is_simple &= not token.operator
            words.append(token)
            self._at += 1
        self._at += 1
        if not is_simple or mode == _Mode.SKIP:
            return None
        return self._shell.test([self._shell.pattern(token) for token in words])
