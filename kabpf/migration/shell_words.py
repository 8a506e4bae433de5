"""The words and operators of a shell script, without what they expand to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

DEPTH_MAX = 20  # of expansions inside each other
TOKENS_MAX = 100_000  # of a script
KEPT_MAX = 1 << 16  # characters of a text whose tokens are kept: init scripts share some files

_SPACE = re.compile(r"(?:[ \t\r]|\\\r?\n)++")
_OPERATOR = re.compile(r"&&|\|\||;;&|;&|;;|<<<|<<-|<<|<>|<&|>>|>&|>\||&>>|&>|\|&|[;&|()<>\n]")
# A blank of C or Unicode that is none of _SPACE is a letter as others.
_PLAIN = re.compile(r"[^ \t\r\n'\"\\$`;&|<>()]++")
_DOUBLE = re.compile(r"[^\"\\$`]++")
_PARAMETER = re.compile(r"\$(?:([A-Za-z_]\w*+)|([0-9@*#?$!-]))")
_BRACED = re.compile(r"\$\{(!?#?)([A-Za-z_]\w*+|[0-9]++|[@*#?$!-])(:?[-=+?]|[%#/^,:@\[][^}]*+)?")
_ANSI = re.compile(r"\$'((?:[^'\\]|\\.)*+)'", re.DOTALL)
CUTS = ("%/*", "##*/")  # what dirname(1) and basename(1) do
_REDIRECTS = ("<", ">", "<<", "<<-", "<<<", "<>", "<&", ">>", ">&", ">|", "&>", "&>>")


@dataclass(frozen=True)
class Text:
    """A part of a word that stands for itself."""

    text: str
    is_quoted: bool


@dataclass(frozen=True)
class Parameter:
    """A part of a word that a parameter expands to; `operator` and `word` as in `${NAME:-word}`.
    What is cut off is all operator: one of CUTS."""

    name: str
    is_quoted: bool
    operator: str = ""
    word: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Substitution:
    """A part of a word that is what a command prints."""

    text: str
    is_quoted: bool


@dataclass(frozen=True)
class Other:
    """A part of a word that only the shell knows when it runs."""

    is_quoted: bool = False


Part = Text | Parameter | Substitution | Other


@dataclass(frozen=True)
class Token:
    """A word with its parts, or an operator; a newline is one."""

    operator: str
    parts: tuple[Part, ...]
    first: int  # lines
    last: int

    plain: str = ""  # the text of a word without quotes and expansions: it may be a reserved one


class MalformedError(ValueError):
    """What the shell would refuse, or what is nested too deep."""


def tokens(text: str, first: int = 1) -> Sequence[Token]:
    """The tokens of a script up to where it is malformed; without redirections and comments."""
    return _kept(text, first) if len(text) <= KEPT_MAX else _read(text, first)


def _read(text: str, first: int) -> Sequence[Token]:
    found: list[Token] = []
    with suppress(MalformedError):
        found.extend(islice(_Reader(text, first).tokens(), TOKENS_MAX))
    return found


_kept = lru_cache(maxsize=16)(_read)


def _merged(parts: Iterator[Part]) -> tuple[Part, ...]:
    """Parts without those that only the end of a line has parted."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if (
            isinstance(part, Text)
            and isinstance(last, Text)
            and not (part.is_quoted or last.is_quoted)
        ):
            found[-1] = Text(last.text + part.text, False)
        else:
            found.append(part)
    return tuple(found)


class _Reader:
    """A position in a text."""

    def __init__(self, text: str, first: int) -> None:
        self._text = text
        self._at = 0
        self._line = first
        self._counted = 0
        self._heredocs: list[tuple[str, bool]] = []

    def tokens(self) -> Iterator[Token]:
        text = self._text
        is_redirected = False
        while self._at < len(text):
            if match := _SPACE.match(text, self._at):
                self._at = match.end()
                continue
            if text[self._at] == "#":
                end = text.find("\n", self._at)
                self._at = len(text) if end < 0 else end
                continue
            first = self._now()
            if match := _OPERATOR.match(text, self._at):
                self._at = match.end()
                operator = match[0]
                if operator in _REDIRECTS:
                    if operator in ("<", ">") and text.startswith("(", self._at):
                        self._skip_parentheses(self._at)  # of a process
                    elif operator in ("<<", "<<-"):
                        self._heredoc(operator == "<<-")
                    else:
                        is_redirected = True
                    continue
                if operator == "\n":
                    self._skip_heredocs()
                yield Token(operator, (), first, first)
                is_redirected = False
                continue
            parts = _merged(self._word())
            if is_redirected:
                is_redirected = False
                continue
            plain = parts[0].text if len(parts) == 1 and isinstance(parts[0], Text) else ""
            if plain.isdigit() and text[self._at : self._at + 1] in ("<", ">"):
                continue  # the descriptor that is redirected
            is_plain = plain and not parts[0].is_quoted
            yield Token("", parts, first, self._now(), plain if is_plain else "")

    def _now(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _word(self) -> Iterator[Part]:
        """The parts of the word at this position."""
        text = self._text
        while self._at < len(text):
            if match := _PLAIN.match(text, self._at):
                self._at = match.end()
                yield Text(match[0], False)
                continue
            letter = text[self._at]
            if letter == "'":
                end = text.find("'", self._at + 1)
                if end < 0:
                    raise MalformedError
                yield Text(text[self._at + 1 : end], True)
                self._at = end + 1
            elif letter == '"':
                self._at += 1
                yield Text("", True)
                yield from self._quoted(0)
            elif letter == "\\":
                escaped = text[self._at + 1 : self._at + 2]
                self._at += 2
                if escaped != "\n":
                    yield Text(escaped, True)
            elif letter in "$`":
                yield self._expansion(False, 0)
            else:
                return

    def _quoted(self, depth: int) -> Iterator[Part]:
        """The parts up to the closing quotation mark."""
        text = self._text
        while True:
            if match := _DOUBLE.match(text, self._at):
                self._at = match.end()
                yield Text(match[0], True)
            letter = text[self._at : self._at + 1]
            if letter == '"':
                self._at += 1
                return
            if letter == "\\":
                escaped = text[self._at + 1 : self._at + 2]
                self._at += 2
                if escaped != "\n":
                    yield Text(escaped if escaped in '$`"\\' else f"\\{escaped}", True)
            elif letter:
                yield self._expansion(True, depth)
            else:
                raise MalformedError

    def _expansion(self, is_quoted: bool, depth: int) -> Part:
        text = self._text
        if depth > DEPTH_MAX:
            raise MalformedError
        if text[self._at] == "`":
            end = self._at + 1
            while (end := text.find("`", end)) > 0 and text[end - 1] == "\\":
                end += 1
            if end < 0:
                raise MalformedError
            inside = re.sub(r"\\([\\`$])", r"\1", text[self._at + 1 : end])
            self._at = end + 1
            return Substitution(inside, is_quoted)
        if text.startswith("$(", self._at):
            begin = self._at + 2
            self._skip_parentheses(begin - 1)
            is_number = text.startswith("(", begin)
            inside = text[begin : self._at - 1]
            return Other(is_quoted) if is_number else Substitution(inside, is_quoted)
        if not is_quoted and (match := _ANSI.match(text, self._at)):
            self._at = match.end()
            return Other(True) if "\\" in match[1] else Text(match[1], True)
        if match := _PARAMETER.match(text, self._at):
            self._at = match.end()
            return Parameter(match[1] or match[2], is_quoted)
        if text.startswith("${", self._at):
            return self._braced(is_quoted, depth)
        self._at += 1
        return Text("$", is_quoted)

    def _braced(self, is_quoted: bool, depth: int) -> Part:
        text = self._text
        match = _BRACED.match(text, self._at)
        if match is None:
            raise MalformedError
        self._at = match.end()
        operator = match[3] or ""
        if match[2] == "BASH_SOURCE":
            operator = operator.removeprefix("[0]")
        is_known = not match[1] and operator.lstrip(":") in ("", "-", "=", "+", "?", *CUTS)
        word: list[Part] = []
        while not text.startswith("}", self._at):
            if self._at >= len(text):
                raise MalformedError
            letter = text[self._at]
            if letter in "$`":
                word.append(self._expansion(is_quoted, depth + 1))
            elif letter == '"':
                self._at += 1
                word += self._quoted(depth + 1)
            elif letter == "'" and not is_quoted:
                end = text.find("'", self._at + 1)
                if end < 0:
                    raise MalformedError
                word.append(Text(text[self._at + 1 : end], True))
                self._at = end + 1
            elif letter == "\\":
                word.append(Text(text[self._at + 1 : self._at + 2], True))
                self._at += 2
            else:
                end = next(i for i in range(self._at, len(text) + 1) if text[i : i + 1] in _STOPS)
                end = max(end, self._at + 1)
                word.append(Text(text[self._at : end], is_quoted))
                self._at = end
        self._at += 1
        if not is_known:
            return Other(is_quoted)
        return Parameter(match[2], is_quoted, operator, tuple(word))

    def _skip_parentheses(self, at: int) -> None:
        """Go on behind the closing one; quotation marks inside are minded."""
        text = self._text
        depth = 0
        for match in _BALANCE.finditer(text, at):
            if match[0] == "(":
                depth += 1
            elif match[0] == ")":
                depth -= 1
                if depth == 0:
                    self._at = match.end()
                    return
        raise MalformedError

    def _heredoc(self, is_indented: bool) -> None:
        if match := _SPACE.match(self._text, self._at):
            self._at = match.end()
        parts = [part.text for part in self._word() if isinstance(part, Text)]
        self._heredocs.append(("".join(parts), is_indented))

    def _skip_heredocs(self) -> None:
        """What the heredocs of a line hold, which begins after it."""
        for end, is_indented in self._heredocs:
            while self._at < len(self._text):
                stop = self._text.find("\n", self._at)
                stop = len(self._text) if stop < 0 else stop
                line = self._text[self._at : stop]
                self._at = stop + 1
                if (line.lstrip("\t") if is_indented else line) == end:
                    break
        self._heredocs.clear()


_STOPS = frozenset(["", "}", "$", "`", '"', "'", "\\"])
_BALANCE = re.compile(
    r"""'[^']*+'|"(?:[^"\\]|\\.)*+"|\\.|#(?<=[ \t\r\n]#)[^\n]*+|[()]""", re.DOTALL
)
