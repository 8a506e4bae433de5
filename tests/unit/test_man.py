"""The manual pages say what the parsers and the language of policy files know, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import built_docs
import pytest
from parsers import commands, flags

from kabpf import cli
from kabpf.daemon import main
from kabpf.doctor import findings
from kabpf.errors import PolicyError
from kabpf.migration import variables
from kabpf.observe import sockets
from kabpf.policy import model, options, parser, selectors
from kabpf.policy.presets import presets

ROOT = Path(__file__).parents[2]
PAGES = ("kabpf.7", "kabpf.yaml.5", "kabpfctl.1", "kabpfd.8")
LIBRARIES = "FROM LIBKEEPALIVE AND LIBDONTDIE"
FILE = "nginx.service.yaml"  # that the examples of kabpf.yaml(5) speak of


def section(page: str, title: str) -> str:
    """The text below a title, up to the next one of its rank or a higher."""
    text = (ROOT / "man" / f"{page}.rst").read_text()
    found = re.search(rf"^{re.escape(title)}\n([=-])\1+\n", text, re.MULTILINE)
    assert found, f"{page} has no section {title}"
    ranks = "=" if found[1] == "=" else "=-"
    end = re.compile(rf"^\S.*\n([{ranks}])\1{{2,}}\n", re.MULTILINE).search(text, found.end())
    return text[found.end() : end.start() if end else None]


def mentioned(text: str) -> set[str]:
    """The options of kabpf's own; that of a container engine has a value behind it."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w-]|=disabled)", text))


def terms(page: str, title: str) -> tuple[str, ...]:
    """The bold words that a section explains in an indented text below each."""
    text = section(page, title).partition("\n---")[0]
    return tuple(re.findall(r"^\*\*([^*\n]+)\*\*[^\n]*\n {4}", text, re.MULTILINE))


def blocks(page: str, title: str) -> list[str]:
    """The literal blocks of a section."""
    found = re.findall(r"^::\n\n((?: {4}.*\n|\n)+)", section(page, title), re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def test_pages_are_built_without_a_warning(built: Path) -> None:
    """Every page is built, with the version and the date of SOURCE_DATE_EPOCH."""
    assert sorted(path.name for path in (built / "man").iterdir()) == sorted(PAGES)
    for page in PAGES:
        text = (built / "man" / page).read_text()
        assert '"2023-11-14" "kabpf ' in text.partition(".SH NAME")[0]


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_eighty_columns(built: Path, page: str) -> None:
    """man has nothing to warn of, and no line is wider. tests/system/test_pages.py has the same for
    each Debian's groff."""
    if not shutil.which("man"):
        pytest.skip("man is not installed")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True)

    assert built_docs.faults(run, "--local-file", str(built / "man" / page)) == []


def test_pages_and_completions_are_reproducible(built: Path, tmp_path: Path) -> None:
    """Built twice they are the same."""
    again = built_docs.build(tmp_path)
    files = [path.relative_to(built) for path in built.rglob("*") if path.is_file()]
    assert len(files) == len(PAGES) + 6
    for file in files:
        assert (again / file).read_bytes() == (built / file).read_bytes()


@pytest.mark.parametrize("name", sorted(commands()))
def test_options_of_a_command_are_in_its_section(name: str) -> None:
    """kabpfctl(1) has a section for each command that names its options and no other's; --json and
    --help are explained for all together."""
    command = flags(commands()[name]) - {"--help"}
    assert mentioned(section("kabpfctl.1", name)) == command - {"--json"}
    (synopsis,) = re.findall(
        rf"\*\*kabpfctl\*\* \*\*{name}\*\*(.*(?:\n\|  .*)*)", section("kabpfctl.1", "SYNOPSIS")
    )
    assert mentioned(synopsis) == command


def test_commands_of_the_page_are_the_parsers() -> None:
    """kabpfctl(1) has no section for what is no command."""
    titles = re.findall(r"^(\S.*)\n-+\n", section("kabpfctl.1", "COMMANDS"), re.MULTILINE)
    assert titles == list(commands())


def test_options_of_all_commands_are_explained() -> None:
    """The options that are explained for all commands together are those that all have, but for
    run, which becomes another command, edit, which asks, and metrics, which have a form already."""
    others = ("run", "edit", "metrics")
    of_each = [flags(parser) for name, parser in commands().items() if name not in others]
    everywhere = set.intersection(*of_each) | flags(cli.parser())
    assert mentioned(section("kabpfctl.1", "OPTIONS")) == everywhere


def test_options_of_kabpfd_are_in_its_page() -> None:
    """kabpfd(8) explains the daemon's options and no other, and so says its synopsis."""
    assert mentioned(section("kabpfd.8", "OPTIONS")) == flags(main.parser())
    assert mentioned(section("kabpfd.8", "SYNOPSIS")) == flags(main.parser())


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_option_that_is_not_there(page: str) -> None:
    """What looks like an option in a page is one of kabpf's commands, or of systemctl or podman."""
    known = {"--now", "--cgroups"}.union(
        *map(flags, (cli.parser(), main.parser(), *commands().values()))
    )
    assert mentioned((ROOT / "man" / f"{page}.rst").read_text()) <= known


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        ("A FILE", parser.FILE_KEYS),
        ("A POLICY", parser.POLICY_KEYS),
        ("SELECTORS", selectors.KEYS),
        ("OPTIONS", options.KEYS),
        ("DESTINATIONS", parser.DESTINATION_KEYS),
        ("MODES", tuple(model.Mode)),
        ("PRESETS", tuple(presets())),
    ],
)
def test_keys_of_the_language_are_in_the_page(title: str, keys: tuple[str, ...]) -> None:
    """kabpf.yaml(5) explains every key, mode and preset, and none that there is not."""
    found = terms("kabpf.yaml.5", title)
    left = set(keys) - set(found)
    if title == "DESTINATIONS":
        assert left == set(options.KEYS)  # "any key of OPTIONS"
    else:
        assert not left
    assert set(found) <= set(keys)


@pytest.mark.parametrize(
    ("page", "title", "words"),
    [
        ("kabpf.7", "MODES", tuple(model.Mode)),
        ("kabpf.7", LIBRARIES, (*chain(*variables.VARIABLES.values()), "TCP_SYNCNT")),
        ("kabpf.yaml.5", "A POLICY", (*model.Mode, *model.Direction, "on", "off", "true")),
        ("kabpf.yaml.5", "OPTIONS", ("auto", "off", "s", "m", "h", "d", "ms")),
        ("kabpfctl.1", "doctor", tuple(findings.Grade)),
        ("kabpfctl.1", "sockets", sockets.SETTERS[:2] + sockets.SETTERS[3:]),
    ],
)
def test_words_are_in_the_page(page: str, title: str, words: tuple[str, ...]) -> None:
    """What a key may say, and what a column may show, is in the page."""
    text = section(page, title)
    assert [word for word in words if f"**{word}**" not in text] == []


def test_limits_are_in_the_page() -> None:
    """kabpf.yaml(5) has the limits that the language holds options to."""
    text = section("kabpf.yaml.5", "OPTIONS")
    assert model.BY_KEY["idle"].limits == "1 to 32767 seconds"
    limits = [row.limits for row in model.OPTIONS if row.unit in ("", "%")]
    for limit in (*limits, "1 s to 32767 s", f"{model.BY_KEY['user_timeout'].high} ms"):
        assert limit in text


@pytest.mark.parametrize("name", list(presets()))
def test_time_outs_of_presets_are_in_the_page(name: str) -> None:
    """Each preset stands with its time-out."""
    text = section("kabpf.yaml.5", "PRESETS")
    assert f"\n**{name}**\n    {presets()[name].timeout_s} s: " in text


@pytest.mark.parametrize("text", blocks("kabpf.yaml.5", "EXAMPLES") + blocks("kabpf.7", LIBRARIES))
def test_example_of_the_page_is_right(text: str) -> None:
    """An example of a page is a policy file, without a warning."""
    assert said(text) == ""


@pytest.mark.parametrize("block", blocks("kabpf.yaml.5", "MISTAKES"))
def test_message_of_the_page_is_what_is_said(block: str) -> None:
    """A mistake that kabpf.yaml(5) shows is answered as it says there."""
    text, _, message = block.strip().partition("\n\n")
    assert said(text) == message


def said(text: str) -> str:
    """What kabpfctl check says of a file alone."""
    try:
        found = parser.combine([parser.parse(text.encode(), FILE)])
    except PolicyError as error:
        return str(error)
    return "\n".join(f"warning: {warning}" for warning in model.warnings(found))
