"""compare: tiny models of every architecture, by the processes that a user's run starts."""

from __future__ import annotations

import dataclasses
import json
import statistics

import pytest
import torch
from cases import many
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.data.stsb_lengths import PairLengths, spread_over, stsb_pairs, words
from distilbert_fast.evaluation.comparison_report import FILES, rows
from distilbert_fast.jobs import compare as job
from distilbert_fast.jobs.contenders import CONTENDERS, PRUNED, batch_of, load_contender, make, vocabulary
from distilbert_fast.jobs.settings import RecipeError
from distilbert_fast.runs.run_directory import StageError

TINY = job.Workload(pairs=3, batches=1, turns=2, starts=1, threads=1, size="tiny")
PAIR = PairLengths(12, 5, 4)


def test_the_lengths_are_those_of_the_development_set():
    pairs = stsb_pairs()
    assert len(pairs) == 1500 and statistics.mean(pair.tokens for pair in pairs) == pytest.approx(31.47, abs=0.01)
    sample = spread_over(pairs, 100)
    assert statistics.mean(pair.tokens for pair in sample) == pytest.approx(31.47, rel=0.02)
    assert words("A man's hat, twice.") == 8


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_made_and_read_back(name, tmp_path):
    one = CONTENDERS[name]
    made = make(one, tmp_path, "tiny", None, PAIR)
    call, ids = load_contender(one, tmp_path), vocabulary(one, tmp_path)
    with torch.inference_mode():
        for pairs in ([PAIR], [PAIR, PairLengths(7, 1, 3)]):
            answers = call(batch_of(one, pairs, ids, 0))
            assert answers.shape == (len(pairs), 1) and answers.isfinite().all()
    assert made.parameters < made.with_head and made.flops > 0 and made.file_bytes > 0


def test_sizes_are_those_that_were_published():
    import transformers

    for family, published in (("bert", 110e6), ("distilbert", 66e6)):
        config = transformers.AutoConfig.for_model(family, num_labels=1)
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        assert sum(p.numel() for p in model.base_model.parameters()) == pytest.approx(published, rel=0.01)


def test_what_pruning_leaves_and_what_it_computes(tmp_path):
    """Half of the heads and neurons: half of the layers' FLOPs, and the head's as before."""
    names = "distilbert-base:int8", "distilbert-base:pruned", "distilbert-base:codebook16"
    whole, pruned, codebook = (make(CONTENDERS[name], tmp_path / name, "tiny", None, PAIR) for name in names)
    head = 2 * (64 * 64 + 64)  # of one token, by pre_classifier and classifier
    assert 2 * (pruned.flops - head) == whole.flops - head
    assert codebook.flops == whole.flops and codebook.parameters == whole.parameters
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    biases = 2 * (3 * 64 + 128)
    assert whole.parameters - pruned.parameters == (weights + biases) // 2


def run(tmp_path, *only, **how):
    said: list[object] = []
    content = job.compare(tmp_path / "out", only, plan=TINY, say=lambda *lines: said.extend(lines), **how)
    return content, [line for line in said if isinstance(line, str)]


@pytest.fixture
def rated(tmp_path):
    """A BERT that gives numbers, and pairs with such."""
    from demo_input import bert
    from transformers import BertForSequenceClassification

    source = bert(tmp_path / "bert")
    model = BertForSequenceClassification.from_pretrained(source, num_labels=1)
    model.save_pretrained(source)
    data = tmp_path / "pairs.tsv"
    lines = [f"a b c\td e {'f ' * i}\t{i}.5" for i in range(8)]
    data.write_text("\n".join(["sentence1\tsentence2\tlabel", *lines]) + "\n")
    return {"models": [f"bert-base={source}"], "data": data}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("bert-base", "bert-base:fp32"), *many([], [("elmo-bilstm", "distilbert-base:int8")])]
)
def test_a_run_is_continued_by_rows(first, second, rated, tmp_path):
    given = rated if first == "bert-base" else {}
    content, _ = run(tmp_path, first, **given)
    assert list(content["rows"]) == [first]
    content, said = run(tmp_path, first, second, command="compare <&>", **given)
    assert said[0] == f"[1/2] {CONTENDERS[first].title}: done before"
    found = content["rows"]
    assert list(found) == [first, second]
    out = tmp_path / "out"
    assert json.loads((out / "compare.json").read_text())["rows"] == found
    page = (out / "compare.html").read_text()
    assert "data:image/png;base64," in page and "compare &lt;&amp;&gt;" in page and 'src="http' not in page
    assert all((out / name).stat().st_size for name in FILES)
    table = rows(content)
    scores = 3 if given else 0
    assert len(table) == 3 and {len(row) for row in table} == {12 + scores}
    for row in found.values():
        for name in ("latency_ms", "throughput", "cold_start_s"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["peak_bytes"] > 1e8
    with pytest.raises(StageError, match="holds a compare with other settings \\(turns: 2 there, 3 given"):
        job.compare(out, plan=dataclasses.replace(TINY, turns=3), say=lambda *lines: None, **given)
    if given:  # checkpoints are scored
        assert found[first]["weights"] == given["models"][0].partition("=")[2]
        assert found[first]["scores"] == pytest.approx(found[second]["scores"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "gpt*"], f"compare: only: expected some of {', '.join(CONTENDERS)}, got 'gpt*'"),
        (
            ["--model", "bert"],
            "compare: model: expected NAME=PATH, NAME being bert-base, roberta-base, distilbert-base, "
            "distilbert-base:pruned, distilbert-base:codebook16, got 'bert'",
        ),
        (["--model", "bert-base=./none"], "compare: model: checkpoint: no such directory: './none'"),
        (["--threads", "0"], "compare: threads: expected 1 or more, got 0"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    made = CliRunner().invoke(app, ["compare", "-o", str(tmp_path / "out"), *arguments])
    assert made.exit_code == 2 and made.stderr == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture(tmp_path):
    from demo_input import bert

    with pytest.raises(RecipeError, match="distilbert-base: expected a model of the type 'distilbert', got 'bert'"):
        run(tmp_path, "distilbert-base", models=[f"distilbert-base={bert(tmp_path / 'bert')}"])
    assert not any((tmp_path / "out").glob("row-*"))


def test_a_process_that_fails_is_named(tmp_path):
    one = CONTENDERS["distilbert-base"]
    with pytest.raises(RecipeError, match="compare: distilbert-base: "):
        job._Process(one, tmp_path / "nothing", 1, PAIR)
    assert one.precision != PRUNED
