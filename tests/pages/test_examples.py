"""The scripts of examples/ do what their first lines say, on small models."""

from __future__ import annotations

import runpy

import pytest
import transformers
from pages import given
from pages.fences import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return given.make(tmp_path_factory.mktemp("given"))


def main(name):
    return runpy.run_path(str(ROOT / f"examples/{name}.py"))["main"]


def test_each_script_is_tried():
    assert {f"test_{path.stem}" for path in SCRIPTS} <= set(globals())


def test_faster_pipeline(made, capsys):
    main("faster_pipeline")(str(made / "my-classifier"), "a small hammer", "the old cat")
    printed = capsys.readouterr().out
    assert [way in printed for way in ("transformers: ", "fp32: ", "int8: ")] == [True] * 3
    assert printed.count("'label': ") == 6


def test_nearest_texts(made, capsys):
    query = (made / "corpus/a.txt").read_text().splitlines()[7]
    found = main("nearest_texts")(str(made / "minilm"), str(made / "corpus/a.txt"), query)
    assert found[0] == query and len(found) == 3


def test_distil_half(made, tmp_path):
    main("distil_half")(str(made / "my-classifier"), str(made / "reviews.csv"), str(tmp_path))
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert student.config.num_hidden_layers == 1
    assert set(student.config.id2label.values()) == {"animal", "tool"}
