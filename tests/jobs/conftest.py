"""What the tests of jobs share: a tiny BERT and tiny data."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_input import bert, sentences, tsv


@pytest.fixture(scope="module", autouse=True)
def quiet():
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    bert(path / "bert")
    (path / "text.txt").write_text("\n".join(text for text, _ in sentences(300, seed=3)))
    tsv(path / "train.tsv", 160, seed=1)
    tsv(path / "dev.tsv", 40, seed=2)
    return path
