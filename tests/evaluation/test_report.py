"""The report says what its dict says."""

from __future__ import annotations

import copy
import io
import json

import pytest
from PIL import Image

from distilbert_fast.evaluation import report


def timing(median: float) -> dict[str, dict[str, float]]:
    return {
        "transformers": {"median": median, "low": median / 2, "high": median * 2},
        "distilbert_fast": {"median": median / 4, "low": median / 5, "high": median / 3},
    }


def model(architecture: str, layers: int, accuracy: float) -> dict[str, object]:
    return {
        "architecture": architecture,
        "layers": layers,
        "accuracy": accuracy,
        "macro_f1": accuracy - 0.01,
        "agreement": accuracy + 0.05,
        "kl_from_teacher": 0.1234,
        "optimized_agreement": 0.99,
        "parameters": 22_713_216,
        "file_bytes": 90_868,
        "latency_ms": timing(8.0),
        "throughput": timing(1234.5),
    }


@pytest.fixture
def content():
    proof = {"sentences": 50, "same_class": 50, "largest_difference": 0.0}
    return {
        "command": "distilbert-fast demo",
        "date": "2026-11-22T12:00:00+00:00",
        "settings": {"seed": 0},
        "machine": {"cpu": "A <CPU>", "cores": 2, "system": "Linux"},
        "environment": {"python": "3.11", "versions": {"torch": "2.13", "triton": None}, "cpu": {"tier": "avx2"}},
        "inputs": {
            "latency_sentences": 32,
            "throughput_sentences": 128,
            "mean_tokens": 60.4,
            "threads": 2,
            "device": "cpu",
        },
        "task": {
            "name": "stdlib-docs",
            "train_sentences": 100,
            "eval_sentences": 50,
            "eval_sentences_in_train": 3,
            "labels": ["a", "b"],
            "majority_share": 0.6,
        },
        "stages": {
            "teacher": {"seconds": 61.2, "resumed": True, "steps": 30, "read_back": proof},
            "student": {"seconds": 2.0, "resumed": False, "steps": 9, "layers": [0, 5], "read_back": proof},
            "student-int8": {"seconds": 0.1, "read_back": proof},
        },
        "models": {
            "teacher": model("BERT", 6, 0.9),
            "student": model("DistilBERT", 3, 0.889),
            "student-int8": model("DistilBERT", 1, 0.88),
        },
    }


def test_table_of_markdown(content):
    lines = report.markdown(content).splitlines()
    assert "|  | teacher | student | student-int8 |" in lines
    assert "| architecture | BERT | DistilBERT | DistilBERT |" in lines
    assert "| layers | 6 | 3 | 1 |" in lines
    assert "| accuracy | 90.0% | 88.9% | 88.0% |" in lines
    assert "| parameters | 22.7 M | 22.7 M | 22.7 M |" in lines
    assert "| weight file | 90.9 kB | 90.9 kB | 90.9 kB |" in lines
    assert "| ms, batch 1, transformers | 8 (4 to 16) | 8 (4 to 16) | 8 (4 to 16) |" in lines
    assert f"| sentences/s, batch 32, optimize() |{' 309 (247 to 412) |' * 3}" in lines


def test_a_busy_machine_is_named_beside_each_figure_that_it_spoils(content):
    """Slowest over fastest turn: 4 by transformers, 1.7 by the engine, where nothing is said."""
    lines = report.busy_lines(content)
    assert len(lines) == 6  # three models by two clocks
    said = "The machine was busy: the turns of student, ms, batch 1, transformers spread by more than 2×: 8 (4 to 16)."
    assert said in lines and f"- {said}" in report.markdown(content).splitlines()
    assert not [line for line in lines if "optimize()" in line]
    for row in content["models"].values():
        for key in ("latency_ms", "throughput"):
            row[key]["transformers"] |= {"low": 5.0, "high": 10.0}  # just twice
    assert report.busy_lines(content) == [] and "busy" not in report.markdown(content)


def test_what_markdown_says_besides(content):
    text = report.markdown(content)
    for said in (
        "Made by `distilbert-fast demo` on 2026-11-22T12:00:00+00:00.",
        "A <CPU>, 2 cores, Linux; 2 threads, device cpu, CPU tier avx2",
        "Python 3.11, torch 2.13\n",  # and not triton, which is not there
        "50 to evaluate (3 of them also in the training split), 2 classes: a, b",
        "Always saying the commonest class gives 60.0%.",
        "- **teacher**: 61 s since it was continued, 30 steps. Read back from disk it chose the same class for 50 of",
        "- **student**: 2 s, 9 steps, layers 0, 5 of the teacher. Read back",
        "99.0% (teacher), 99.0% (student), 99.0% (student-int8)",
        "![accuracy, size and speed](report.png)",
    ):
        assert said in text
    assert "None" not in text


def test_terminal_table_fits_80_columns(content):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    console.print(report.table(content))
    shown = console.file.getvalue()
    assert "22.7 M" in shown
    assert "90.0%" in shown
    assert max(map(len, shown.splitlines())) <= 80
    for head, *_ in report.rows(content):
        assert head in shown  # and not broken over lines


def test_files(content):
    before = copy.deepcopy(content)
    files = report.files(content)
    assert set(files) == {"report.md", "report.json", "report.png"}
    assert json.loads(files["report.json"]) == content == before
    assert files["report.md"].decode() == report.markdown(content)
    picture = Image.open(io.BytesIO(files["report.png"]))
    assert picture.format == "PNG"
    assert min(picture.size) > 600
    assert len(picture.convert("L").histogram()) > 50  # something is drawn
