"""The schema of policy files marks what `check` refuses, as far as a schema can."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import policy_schema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from language_server import LanguageServer
from malformed import CGROUPS, MALFORMED, SELECTORS, UNITS
from policy_schema import SCHEMA, is_marked, takes

from kabpf.errors import PolicyError
from kabpf.policy import options, parser
from kabpf.policy.model import OPTIONS, OptionRow

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
FILES = [*EXAMPLES, *sorted((ROOT / "tests" / "plans").glob("*/**/*.yaml"))]
FILES = [path for path in FILES if path.name not in ("plan.yaml", "containers.yaml")]
WRONG = [
    *MALFORMED,
    *((f"select: {text}\nkeepalive: on", message) for text, message in (*SELECTORS, *UNITS)),
    *((f"select: {text}\nkeepalive: on", message) for text, message in CGROUPS),
]
# What `check` alone refuses: in its messages.
ORDER = ("the lower bound first", "a range of one value")  # two values compared
BEYOND = (
    *ORDER,
    "has bits set beyond its prefix",
    "auto without", "auto makes",  # other keys, and other files
    ": an anchor", ": a tag", "unknown directive", "given twice, first in line",  # YAML's own
    "idle: 0x10,", "idle: 1e3,", "idle: +5,", "probes: 0x6,",  # an editor sees a number there
    "loopback: True,",  # and there true
    "names of at most 255 bytes",  # a schema counts characters
)  # fmt: skip
# What yaml-language-server does not look at: a merge key, and keys without a value in { }.
PASSED_OVER = tuple(
    message
    for text, message in MALFORMED
    if text in ("keepalive: {<<: {idle: 5}}", "defaults: {idle:5}", "keepalive: {idle}")
)


def test_schema_is_current() -> None:
    """The file in the repository is what scripts/schema makes of the tables."""
    program = "import json, runpy, sys; made = runpy.run_path(sys.argv[1])['schema']()"
    program = f"{program}; json.dump(made, sys.stdout)"
    command = [sys.executable, "-P", "-c", program, ROOT / "scripts" / "schema"]
    made = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    assert json.loads(made.stdout) == json.loads(policy_schema.PATH.read_text()), (
        "expected scripts/schema to be run"
    )


def test_schema_is_a_schema() -> None:
    """It is one of draft-07, which yaml-language-server reads."""
    policy_schema.VALIDATOR.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_right_file_is_not_marked(path: Path) -> None:
    """Examples and the files of the tests of precedence are right to an editor, too."""
    assert not is_marked(path.read_text())


@pytest.mark.parametrize("text", ["", "# a comment\n", "{}", "policies: {}"])
def test_file_that_says_nothing_is_not_marked(text: str) -> None:
    """A file may say nothing, in a schema as well."""
    assert not is_marked(text)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_names_the_schema(path: Path) -> None:
    """The first line of an example leads an editor to the schema that the package installs."""
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={policy_schema.INSTALLED}"
    install = (ROOT / "debian" / "kabpf.install").read_text().splitlines()
    directory = Path(policy_schema.INSTALLED).parent.relative_to("/")
    assert f"{policy_schema.PATH.relative_to(ROOT)} {directory}" in install


@pytest.mark.slow
def test_wrong_files_are_marked_but_for_what_a_schema_cannot_see() -> None:
    """Of the texts that `check` refuses, an editor marks all, but for those of BEYOND."""
    marked = 0
    for text, message in WRONG:
        try:
            seen = is_marked(text if isinstance(text, str) else text.decode())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            continue  # no YAML
        beyond = any(part in message for part in BEYOND)
        assert seen or beyond, (text, message)
        marked += seen
    assert marked >= 200


def test_language_server_marks_the_same() -> None:
    """yaml-language-server finds the schema by the modeline, and marks what is wrong alone."""
    program = shutil.which("yaml-language-server")
    if program is None:
        pytest.skip("it needs npm's yaml-language-server")
    modeline = f"# yaml-language-server: $schema={policy_schema.PATH}\n"
    wrong = []
    for text, message in WRONG:
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            if isinstance(text, str) and message not in PASSED_OVER and is_marked(text):
                wrong.append(text)
    with LanguageServer(program) as server:
        for number, path in enumerate(FILES):
            assert server.marks(f"file:///right/{number}.yaml", modeline + path.read_text()) == []
        found = [
            server.marks(f"file:///wrong/{number}.yaml", modeline + text)
            for number, text in enumerate(wrong)
        ]
    assert [text for text, marks in zip(wrong, found, strict=True) if not marks] == []
    assert len(wrong) >= 200


def texts(row: OptionRow) -> st.SearchStrategy[str]:
    """Values of an option, right ones and others that look alike."""
    numbers = st.integers(0, 2 * row.high).map(str) | st.integers(0, 200).map(str)
    ends = st.sampled_from([*options.SUFFIXES[row.unit], "", "s", "ms", "m", "h", "d", "%", "x"])
    bounds = st.builds("".join, st.tuples(st.sampled_from(["", "", "0", "-"]), numbers, ends))
    ranges = st.builds("..".join, st.tuples(bounds, bounds))
    pattern = SCHEMA["definitions"][row.key]["pattern"]
    words = st.sampled_from([*row.words, "on", "off", "auto", "no", "~", "1:30", "", "1.5", ".."])
    return bounds | ranges | words | st.from_regex(pattern, fullmatch=True) | st.text(max_size=4)


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row.key)
def test_schema_and_check_take_the_same_values(row: OptionRow) -> None:
    """What the schema takes for an option `check` takes, but for the order of a range, and the
    reverse; in quotes and without."""

    @settings(max_examples=200)
    @given(texts(row).filter(str.isprintable))
    @example(str(row.low - 1))
    @example(str(row.high + 1))
    def agree(text: str) -> None:
        try:
            options.check(row.key, text)
        except PolicyError as error:
            taken, order = False, any(part in str(error) for part in ORDER)
        else:
            taken, order = True, False
        assert takes(row.key, text) == (taken or order)
        plain = _plain(text)
        if isinstance(plain, int) and not isinstance(plain, bool) and str(plain) == text:
            assert takes(row.key, plain) == taken

    agree()


@settings(max_examples=200)
@given(
    st.from_regex(SCHEMA["definitions"]["timeout"]["pattern"], fullmatch=True)
    | st.builds("{}{}".format, st.integers(0, 500_000), st.sampled_from(["", *"smhdx"]))
)
def test_schema_and_check_take_the_same_timeouts(text: str) -> None:
    """The same of the idle timeout of a middlebox."""
    if text.isprintable():
        assert takes("timeout", text) == _is_right(f"keepalive: {{timeout: '{text}'}}")


ADDRESS = st.ip_addresses().map(str)
LENGTH = st.sampled_from(["", "/0", "/8", "/032", "/33", "/128", "/129", "/"])


@settings(max_examples=250)
@given(
    st.builds("{}{}".format, ADDRESS | st.text("0:.af1", min_size=1, max_size=20), LENGTH)
    | st.from_regex(
        SCHEMA["definitions"]["destinations"]["items"]["properties"]["to"]["pattern"],
        fullmatch=True,
    )
)
def test_schema_and_check_take_the_same_networks(to: str) -> None:
    """The same of networks and addresses, but for bits beyond a prefix."""
    if not to.isprintable():
        return
    text = f"keepalive: on\ndestinations: [{{to: '{to}', idle: 5}}]"
    assert is_marked(text) == (not _is_right(text, "bits set beyond"))


NAMES = st.sampled_from(["a", "*", "**", "a**", "***", ".", "..", "...", "", "é", "a b", "[a]?"])
PATHS = st.builds("".join, st.lists(st.sampled_from(["/"]) | NAMES, max_size=14))


@settings(max_examples=250)
@given(
    st.builds('{{cgroup: "{}"}}'.format, PATHS)
    | st.builds(
        "{{unit: '{}.{}'}}".format,
        st.text("a@*!\\:é ", max_size=6),
        st.sampled_from(["service", "conf", "slice", ""]),
    )
)
def test_schema_and_check_take_the_same_selectors(selector: str) -> None:
    """The same of cgroup paths and names of units."""
    text = f"select: [{selector}]\nkeepalive: on"
    assert is_marked(text) == (not _is_right(text))


def _plain(text: str) -> Any:
    try:
        return policy_schema.value(text)
    except yaml.YAMLError:
        return None


def _is_right(text: str, but: str = "\0") -> bool:
    """Whether `check` takes a file named after a unit, but for messages of a kind."""
    try:
        parser.parse(text.encode(), "a.service.yaml")
    except PolicyError as error:
        return but in str(error)
    return True
