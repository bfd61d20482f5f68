"""`distilbert-fast quantize`: what it writes and says, and one line for each error."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from demo_input import bert, sentences, tsv
from typer.testing import CliRunner

from distilbert_fast import SparsityConfig, prune_connections
from distilbert_fast.cli import app
from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.jobs.quantize import quantize
from distilbert_fast.layers import CodebookLinear, Int8Linear
from distilbert_fast.modeling.compression_config import Int8Config
from distilbert_fast.sparse import SparseLinear

TEXTS = [text for text, _ in sentences(20, 3)]


def classifier(path, kind=transformers.BertForSequenceClassification, **config):
    """A checkpoint of a random model with a task head and a tokenizer."""
    body = bert(path.with_name(f"{path.name}-body"))
    torch.manual_seed(1)
    model = kind.from_pretrained(body, **config)
    with torch.no_grad():
        for parameter in model.classifier.parameters() if hasattr(model, "classifier") else ():
            parameter.mul_(20)
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("models") / "float")


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS[:4], "", " ", *TEXTS[4:]]) + "\n")
    return tmp_path / "texts.txt"


def run(*arguments):
    model = [] if arguments == ("--help",) else ["--model"]
    return CliRunner().invoke(app, ["quantize", *model, *map(str, arguments)], env={"COLUMNS": "100"})


def logits(path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    batch = transformers.AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.double(), model


def test_what_is_written_and_said(model, texts, tmp_path):
    output = tmp_path / "deep" / "int8"
    done = run(model, "-o", output, "--calibration", texts, "--embeddings", "--heads")
    assert done.exit_code == 0, done.output
    names = sorted(file.name for file in output.iterdir())
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert not [file for file in output.parent.iterdir() if file != output]
    found, read = logits(output)
    want, _ = logits(model)
    assert sum(isinstance(module, Int8Linear) for module in read.modules()) == 14
    assert sum(isinstance(module, Int8Embedding) for module in read.modules()) == 3
    p, q = want.log_softmax(-1), found.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    same = int((p.argmax(-1) == q.argmax(-1)).sum())
    lines = done.stdout.splitlines()
    before, after = ((place / "model.safetensors").stat().st_size for place in (model, output))
    assert lines[0] == f"{model}: BertForSequenceClassification, {before / 1e6:.1f} MB of weights"
    assert lines[1] == f"{output}: {after / 1e6:.1f} MB of weights, {100 * after / before:.1f}% of that"
    assert lines[2].startswith(f"compared: {100 * same / 20:.2f}% of 20 answers the same, mean KL ")
    assert float(lines[2].split()[-2]) == pytest.approx(kl, rel=0.01)
    card = (output / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card
    assert lines[2].removeprefix("compared: ") in card and "(20 texts)" in card


def test_without_texts_and_with_exceptions(model, tmp_path):
    done = run(model, "-o", tmp_path / "int8", "--keep", "layer.0", "--keep", "intermediate.dense")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[2].startswith("linear layers of the encoder left float: bert.encoder.layer.0.attention.self.query, ")
    assert lines[2].endswith("bert.encoder.layer.1.intermediate.dense")
    assert lines[3] == "not compared: no --calibration was given"
    _, read = logits(tmp_path / "int8")
    assert sum(isinstance(module, Int8Linear) for module in read.modules()) == 5


def test_shared_values(model, texts, tmp_path):
    output = tmp_path / "shared"
    done = run(model, "-o", output, "--calibration", texts, "--codebook", 16, "--group-size", 16)
    assert done.exit_code == 0, done.output
    _, read = logits(output)
    layers = [module for module in read.modules() if isinstance(module, CodebookLinear)]
    assert len(layers) == 12 and {(layer.values.shape[1], layer.group_size) for layer in layers} == {(16, 16)}
    card = (output / "README.md").read_text()
    assert "with 16 shared values" in card and "- codebook" in card and "which values were fitted to (20 texts)" in card


def test_a_sparse_model(model, tmp_path):
    sparse = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    prune_connections(sparse, SparsityConfig(amount=0.8)).save_pretrained(tmp_path / "sparse")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "sparse")
    done = run(tmp_path / "sparse", "-o", tmp_path / "int8", "--keep", "layer.0")
    assert done.exit_code == 0, done.output
    _, read = logits(tmp_path / "int8")
    kinds = [sum(isinstance(module, kind) for module in read.modules()) for kind in (Int8Linear, SparseLinear)]
    assert kinds == [6, 6] and "left float: bert.encoder.layer.0.attention.self.query, " in done.stdout


def test_budget(model, texts, tmp_path):
    whole = quantize(str(model), tmp_path / "whole", texts, say=lambda _: None)
    assert whole["float"] == [] and whole["texts"] == 20
    part = quantize(str(model), tmp_path / "part", texts, budget=whole["kl"] / 3, say=lambda _: None)
    assert part["kl"] <= whole["kl"] / 3 and part["float"] and part["after_bytes"] > whole["after_bytes"]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.BertModel, {}),
        (transformers.BertForSequenceClassification, {"num_labels": 1}),
        (transformers.BertForMaskedLM, {}),
        (transformers.BertForTokenClassification, {}),
        (transformers.BertForQuestionAnswering, {}),
    ],
)
def test_any_head(kind, config, texts, tmp_path):
    source = classifier(tmp_path / "float", kind, **config)
    made = quantize(str(source), tmp_path / "int8", texts, max_texts=7, say=lambda _: None)
    assert made["texts"] == 7
    if kind is transformers.BertModel or config:
        assert 0.9 < made["cosine"] < 1 and made["kl"] is None
    else:
        assert 0 <= made["kl"] < 0.1 and made["agreement"] > 0.9 and made["cosine"] is None
    read, report = kind.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not report["missing_keys"] and type(read) is kind


def test_texts_of_a_table(model, tmp_path):
    table = tsv(tmp_path / "rows.tsv", 12)
    assert quantize(str(model), tmp_path / "int8", table, say=lambda _: None)["texts"] == 12


def test_help_teaches():
    done = run("--help")
    assert done.exit_code == 0
    for word in ("--calibration", "--keep", "--budget", "--embeddings", "Examples", "dev.tsv", "nats"):
        assert word in done.output


def refused(*arguments):
    done = run(*arguments)
    assert done.exit_code == 2 and "Traceback" not in done.output
    return " ".join(done.output.split())


def test_one_line_for_each_error(model, texts, tmp_path):
    output = tmp_path / "int8"
    assert (
        refused(model, "-o", model) == f"error: quantize: output: '{model}' is there already; choose another directory"
    )
    assert refused(model, "-o", output, "--budget", "0.1") == (
        "error: quantize: --budget needs --calibration: a file of texts to keep it on"
    )
    assert "error: quantize: load_corpus: source must be files that are there, got" in refused(
        model, "-o", output, "--calibration", tmp_path / "nowhere.txt"
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    assert refused(model, "-o", output, "--calibration", tmp_path / "empty.txt") == (
        f"error: quantize: calibration: '{tmp_path / 'empty.txt'}' must hold at least one text, got none"
    )
    assert "modules_to_not_convert must be names of linear layers, got 'lin1'" in refused(
        model, "-o", output, "--keep", "lin1"
    )
    for given, message in (
        (("--codebook", 32), "CodebookConfig: values must be one of 256, 64, 16, got 32"),
        (("--group-size", 8), "group-size: expected a codebook, got 8"),
        (("--codebook", 16, "--embeddings"), "embeddings: expected int8, not with a codebook, got codebook 16"),
    ):
        assert refused(model, "-o", output, *given) == f"error: quantize: {message}"
    assert "error: quantize: max_texts must be 1 or more, got 0" in refused(model, "-o", output, "--max-texts", 0)
    assert "error: checkpoint: no such directory" in refused(tmp_path / "none", "-o", output)
    assert not output.exists()
    quantize(str(model), output, config=Int8Config(), say=lambda _: None)
    assert refused(output, "-o", tmp_path / "again") == f"error: quantize: model: '{output}' is quantized already"
    config = json.loads((model / "config.json").read_text())
    unknown = classifier(tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["MyBert"]}))
    assert "must be of a class that is known, got architectures ['MyBert']" in refused(unknown, "-o", tmp_path / "x")


def test_a_fault_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("distilbert_fast.jobs.quantize.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(str(model), tmp_path / "int8", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []
