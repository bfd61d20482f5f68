"""The figures of README and docs are those of bench/results, and none is typed by hand."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize(
    ("page", "records", "of_a_block", "count"),
    [
        ("README.md", ["epyc-avx512_bf16-2-threads"], 25, 8),
        ("docs/index.md", ["xeon-amx-2-threads-int8", "xeon-amx-2-threads-bf16"], 5, 6),
    ],
)
def test_a_chart_shows_what_was_measured(page, records, of_a_block, count):
    results = [
        one for name in records for one in json.loads((ROOT / f"bench/results/{name}.json").read_text())["results"]
    ]
    measured = {one["engine"]: 1e3 * one["seconds"]["median"] for one in results if one["workload"] == "32x128-ragged"}
    engines = {"transformers": "transformers-sdpa", "ONNX Runtime": "onnxruntime"}
    bars = re.findall(r"^(.+), (\w+) +(\d+)  (█+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(bars) == count
    for engine, precision, shown, bar in bars:
        milliseconds = measured[f"{engines.get(engine, engine.lower())}-{precision}"]
        assert int(shown) == round(milliseconds)
        assert abs(len(bar) - milliseconds / of_a_block) < 1


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
