"""README, docs/ and the pages beside them: links, commands, policies and tables are right."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import parsers
import pytest

from kabpf import cli
from kabpf.commands import status
from kabpf.daemon import main as daemon
from kabpf.policy import model, parser
from kabpf.policy.presets import presets

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
# For operators. The others are a log of their days.
GUIDES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "decisions.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\S+=\S+ )*(?:\S*/)?(kabpfctl|kabpfd)((?: .*)?)")


def text(page: Path) -> str:
    return (ROOT / page).read_text()


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def links(page: Path) -> list[str]:
    """Where a page leads within the repository."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(page)))
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose)
    return [a or b for a, b in found if not re.match(r"\w+:", a or b)]


def target(page: Path, link: str) -> Path:
    """The file that a link leads to, from the repository's root."""
    name = link.partition("#")[0]
    return ((ROOT / page).parent / name).resolve().relative_to(ROOT) if name else page


LINKS = [(page, link) for page in PAGES for link in links(page)]


def commands(page: Path) -> list[str]:
    """The commands of kabpf that a page shows, in blocks and within lines."""
    lines = [
        re.sub(r"^[#$] ", "", line)
        for language, block in FENCE.findall(text(page))
        if language != "yaml"
        for line in block.splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text(page)))
    return [line for line in lines if COMMAND.fullmatch(line)]


COMMANDS = [(page, line) for page in GUIDES for line in commands(page)]
POLICIES = [
    (page, block)
    for page in GUIDES
    for language, block in FENCE.findall(text(page))
    if language == "yaml"
]


def refused(line: str) -> str:
    """Why the program's parser refuses a command line; a program's or a command's bare name is no
    command line but a word."""
    found = COMMAND.fullmatch(line)
    assert found
    words = shlex.split(found[2], comments=True)
    known: argparse.ArgumentParser = cli.parser() if found[1] == "kabpfctl" else daemon.parser()
    if not words or (len(words) == 1 and words[0] in parsers.commands()):
        return ""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            known.parse_args(words)
        except SystemExit as end:
            return said.getvalue() if end.code else ""
    return ""


def test_readme_is_short() -> None:
    """It has at most 150 lines, and the demo and the tests stand on the first screen."""
    lines = text(Path("README.md")).splitlines()
    assert len(lines) <= 150
    assert {"demo/run", "tests/run"} <= set(re.findall(r"`(\S+?)`", "\n".join(lines[:24])))


def test_readme_leads_to_every_page() -> None:
    """A page that nothing leads to is not found."""
    found = {target(Path("README.md"), link) for link in links(Path("README.md"))}
    assert {page for page in PAGES if page.parent.name == "docs"} <= found


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda each: str(each))
def test_link_leads_somewhere(page: Path, link: str) -> None:
    """Its file is there, and so is the heading in it."""
    found = target(page, link)
    assert (ROOT / found).exists()
    anchor = link.partition("#")[2]
    assert not anchor or anchor in anchors(found)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda each: str(each))
def test_link_leads_somewhere_in_the_package(page: Path, link: str) -> None:
    """Debian's package has what its pages lead to, at the same places."""
    shipped = (ROOT / "debian/kabpf.docs").read_text().split()
    assert page.parts[0] in shipped
    assert target(page, link).parts[0] in (*shipped, "examples")


def test_package_does_not_compress_pages() -> None:
    """A compressed page is one that no link leads to."""
    assert re.search(r"^\tdh_compress .*-X\.md\b.* -X\.svg\b", text(Path("debian/rules")), re.M)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda each: str(each))
def test_command_is_one(page: Path, line: str) -> None:
    """The program's own parser takes each command that a page shows."""
    assert refused(line) == ""


@pytest.mark.parametrize("line", ["kabpfctl verfy", "kabpfctl attach --idle 60s", "kabpfd --no"])
def test_wrong_command_is_told(line: str) -> None:
    """So the test above can fail."""
    assert refused(line)


@pytest.mark.parametrize(("page", "block"), POLICIES, ids=lambda each: str(each)[:60])
def test_policy_is_right(page: Path, block: str) -> None:
    """Each policy of a page says its file in its first line, and is one without a warning."""
    named = re.match(r"# (/etc/kabpf/(?:policy\.d/)?(\S+\.yaml))\n", block)
    assert named
    found = parser.combine([parser.parse(block.encode(), named[2])])
    assert found
    assert [*model.warnings(found)] == []


@pytest.mark.parametrize("page", [Path("README.md"), Path("docs/quickstart.md")])
def test_first_policy_has_no_user_timeout(page: Path) -> None:
    """Which ends connections of a peer that is there and does not read, too."""
    blocks = [block for each, block in POLICIES if each == page]
    assert blocks
    assert not [block for block in blocks if "user_timeout" in block]


def test_table_of_presets_is_whole() -> None:
    """docs/choosing-values.md has each preset with its numbers, and no other."""
    lines = text(Path("docs/choosing-values.md")).splitlines()
    rows = [found[1] for line in lines if (found := re.match(r"\| `([\w-]+)` \|", line))]
    assert rows == list(presets())
    for row in presets().values():
        numbers = f"{row.timeout_s} s | {row.idle_s} s | {row.interval_s} s | {row.probes}"
        start, end = f"| `{row.name}` | ", f" | {numbers} | {row.after} |"
        assert any(line.startswith(start) and line.endswith(end) for line in lines)


def test_table_of_modes_has_each_mode() -> None:
    """docs/policies.md compares all modes."""
    assert f"| the application | {' | '.join(f'`{mode}`' for mode in model.Mode)} |" in text(
        Path("docs/policies.md")
    )


RECORD = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/record")))


def recorded() -> list[str]:
    lines: list[str] = RECORD.texts(text(Path("docs/pictures/demo.svg")))
    return lines


def test_recording_is_of_the_demo_as_it_is() -> None:
    """It has the demo's headings and each command that it shows, with the policy file. Running it
    (scripts/record --check) compares every line."""
    script = (ROOT / "demo/run").read_text()
    lines = recorded()
    headings = re.findall(r"^== (\d\. .*)$", script, re.MULTILINE)
    assert [line[3:] for line in lines if re.match(r"== \d", line)] == headings
    assert [line for line in lines if line.startswith("ok ")] == lines[-len(headings) :]
    shown = [line.strip()[2:] for line in lines if line.strip().startswith("# ")]
    named = re.findall(r"^(?:show kabpfctl|show_timer$|  # cat|  # rm)", script, re.MULTILINE)
    assert len(shown) == len(named)
    assert [refused(line) for line in shown if line.startswith("kabpfctl")] == [""] * 4


def test_recording_shows_the_status_of_now() -> None:
    """A column or a line that has another name is recorded again."""
    lines = [line.strip() for line in recorded()]
    assert "  ".join(column.head for column in status.COLUMNS) in [
        re.sub(r" {2,}", "  ", line) for line in lines
    ]
    start = lines.index("# kabpfctl status")
    starts = [line.partition(":")[0] for line in lines[start + 1 : start + 5]]
    assert starts == ["data plane", "kernel", "daemon", "policy files"]


def test_recordings_are_compared_without_their_numbers() -> None:
    """Another kernel, port or time is no other recording; another word is."""
    one, other = "kernel: Linux 6.1.0-40-amd64, with BTF", "  kernel: Linux 6.18.4, with BTF"
    assert RECORD.lasting([one]) == RECORD.lasting([other])
    assert RECORD.lasting([one]) != RECORD.lasting([one.replace("with", "without")])


def test_recording_is_read_as_it_was_written() -> None:
    """What the picture shows comes back, whatever characters it has."""
    lines = [(0.0, "== <a> & b"), (99.0, "  # kabpfctl"), (99.1, "")]
    assert RECORD.texts(RECORD.picture(lines)) == [line for _, line in lines]
