"""bench/publish: the figures and plots of the pages are those of the run that is kept."""

from __future__ import annotations

import copy
import json
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "bench")  # as where it runs by itself
    PUBLISH = SimpleNamespace(**runpy.run_path(str(ROOT / "bench/publish")))
SVG = "{http://www.w3.org/2000/svg}"
CHARACTER = 6.6  # pixels, of a wide font


@pytest.fixture
def run() -> Any:
    return json.loads((ROOT / "bench/published.json").read_text())


def test_pages_and_plots_have_the_published_figures(run: Any) -> None:
    """What is edited by hand, and a run that is kept without its pages, are told apart here."""
    for path, content in PUBLISH.pages(run).items():
        assert path.read_text() == content, f"{path}; try: bench/publish"


def test_another_figure_makes_other_pages(run: Any) -> None:
    """So the test above can fail, for the text and the plots alike."""
    run["measured"]["connections"]["added_ns"]["kabpf, three options"] = 1234
    made = PUBLISH.pages(run)
    stale = {path.name for path, content in made.items() if path.read_text() != content}
    assert stale == {"README.md", "performance.md", "connections.svg"}


def test_missed_budgets_are_named(run: Any) -> None:
    """Each stands in the table with its reason, and is marked in the plot by a word."""
    missed = [row["what"] for row in PUBLISH.budgeted(run) if row["met"] is False]
    plot = ElementTree.fromstring(PUBLISH.budgets_plot(run))
    marked = [each for each in texts(plot) if each.endswith(", missed")]
    assert missed
    assert len(marked) == len(missed)
    table = PUBLISH.missed(run)[4:]
    assert [line.split(" | ")[0][2:] for line in table] == missed
    assert all(len(line.strip("| ").split(" | ")) == 4 for line in table)


def test_run_that_misses_nothing_says_so(run: Any) -> None:
    """There is no table without rows."""
    run["table"] = [row for row in run["table"] if row["met"] is not False]
    assert PUBLISH.missed(run)[-1].endswith("missed none.")


def test_row_without_a_figure_is_left_out(run: Any) -> None:
    """A table of the page has what the run measured; a sentence needs its figure."""
    assert PUBLISH.filled("| a | {s measured/daemon/none_s} s |\nb\n", run) == "b\n"
    with pytest.raises(KeyError):
        PUBLISH.filled("It takes {s measured/daemon/none_s} s.\n", run)


@pytest.mark.parametrize("name", ["connections_plot", "updates_plot", "budgets_plot"])
def test_plot_is_read_as_a_picture(name: str, run: Any) -> None:
    """It has a title, an axis that says what is counted, a background of its own, and texts that
    lie within it."""
    plot = ElementTree.fromstring(getattr(PUBLISH, name)(run))
    width, height = (float(plot.attrib[side]) for side in ("width", "height"))
    assert plot.findtext(f"{SVG}title")
    assert plot.findtext(f"{SVG}desc")
    assert plot.find(f"{SVG}rect").attrib["fill"] == "#ffffff"  # type: ignore[union-attr]
    assert any("sockets" in text or "less is better" in text for text in texts(plot)[-1:])
    for text in plot.iter(f"{SVG}text"):
        x, long = float(text.attrib["x"]), CHARACTER * len(text.text or "")
        before = {"end": long, "middle": long / 2}.get(text.attrib.get("text-anchor", ""), 0)
        assert x - before >= 0
        assert x - before + long <= width
        assert 0 < float(text.attrib["y"]) < height


def test_figure_far_beyond_its_budget_stays_within_the_plot(run: Any) -> None:
    """Its bar is cut."""
    for row in run["table"]:
        row["figure"] *= 1 if row["at_least"] else 100
    plot = ElementTree.fromstring(PUBLISH.budgets_plot(run))
    ends = [
        float(bar.attrib["x"]) + float(bar.attrib["width"])
        for bar in plot.findall(f"{SVG}rect")[1:]
    ]
    assert max(ends) < float(plot.attrib["width"])


def test_kept_run_has_errors_in_place_of_its_rounds(run: Any) -> None:
    """The error is that of a median: three rounds that agree have none."""
    results = copy.deepcopy(run)
    measured = results["measured"]["connections"]
    names = list(measured["added_ns"])
    measured["rounds"] = [
        {"with_ns": dict.fromkeys(names, 7), "without_ns": dict.fromkeys(names, 5)}
    ] * 3
    kept = PUBLISH.condensed(results)["measured"]["connections"]
    assert kept["error_ns"] == dict.fromkeys(names, 0)
    assert "rounds" not in kept


def texts(plot: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in plot.iter(f"{SVG}text")]
