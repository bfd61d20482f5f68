"""The figures of README and docs are those of bench/results, and none is typed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is importable from the checkout only

from bench import figures  # noqa: E402


@pytest.mark.parametrize("page", figures.PAGES)
def test_pages_hold_what_was_measured(page):
    text = (ROOT / page).read_text()
    assert figures.written(text, page) == text, "run `make figures`"


def test_every_figure_is_in_a_page_once():
    pages = "".join((ROOT / page).read_text() for page in figures.PAGES)
    assert {name: pages.count(f"<!-- figure: {name} -->") for name in figures.FIGURES} == dict.fromkeys(
        figures.FIGURES, 1
    )


def test_a_typed_figure_is_found_and_written_again():
    text = (ROOT / "README.md").read_text()
    typed = text.replace("distilbert_fast, int8        126", "distilbert_fast, int8        121")
    assert typed != text and figures.written(typed, "README.md") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figure: nothing -->\n<!-- /figure -->", "p.md: expected a figure of .*, got 'nothing'"),
        ("<!-- figure: readme-chart -->\n", "p.md: a figure lacks its <!-- /figure -->"),
        ("<!-- /figure -->\n", "p.md: a figure lacks its <!-- /figure -->"),
    ],
)
def test_bad_markers_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        figures.written(text, "p.md")


def test_three_digits():
    assert [figures.three(x) for x in (1.104, 9.996, 55.14, 99.96, 1844.9)] == ["1.10", "10.0", "55.1", "100", "1845"]
