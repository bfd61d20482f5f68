"""Checkpoints that can be used, and the exact reason why others cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from demo_input import bert, load_classifier
from safetensors.torch import load_file, save_file

from distilbert_fast.modeling.loading import CheckpointError, checkpoint_digest, locate


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return bert(tmp_path_factory.mktemp("original") / "bert")


@pytest.fixture
def checkpoint(original, tmp_path, monkeypatch) -> Path:
    """A copy to spoil, known by its relative name."""
    shutil.copytree(original, tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    return Path("bert")


def refused(message: str, *arguments: object, call=locate) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        call(*arguments)


def test_a_good_checkpoint(checkpoint):
    model, tokenizer = load_classifier(checkpoint, ["no", "yes"], new_head=True)
    assert locate(checkpoint) == checkpoint
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert not model.training
    torch.testing.assert_close(
        model.bert.embeddings.word_embeddings.weight.detach().cpu(),
        load_file(checkpoint / "model.safetensors")["embeddings.word_embeddings.weight"],
    )
    model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    again, _ = load_classifier("saved")
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_is_missing_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refused("checkpoint: 'bert' holds no model.safetensors", checkpoint)
    (checkpoint / "config.json").unlink()
    refused("checkpoint: 'bert' holds no config.json", checkpoint)
    refused("checkpoint: no such directory: './nowhere'", "./nowhere")


def test_a_pickle_is_never_loaded(checkpoint):
    """Not even opened: this one would raise if it were unpickled, and is unreadable."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").chmod(0)
    message = (
        "checkpoint: 'bert' holds its weights as a pickle (pytorch_model.bin), which is never loaded because it can "
        "run any code; convert it to model.safetensors first"
    )
    refused(message, checkpoint)
    refused(message, checkpoint, ["a", "b"], True, call=load_classifier)


@pytest.mark.parametrize("kept", [0, 5, 100, 10_000, -1])
def test_a_truncated_file_is_named(checkpoint, kept):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"^checkpoint: 'bert/model\.safetensors' is truncated or no safetensors file: .+"
    ) as error:
        locate(checkpoint)
    assert "\n" not in str(error.value)


def test_shards(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    (checkpoint / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: weights[name] for name in names if places[name] == file}
        save_file(part, checkpoint / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    load_classifier(checkpoint, ["a", "b"], new_head=True)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    refused(
        "checkpoint: 'bert' lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json names",
        checkpoint,
    )


def test_other_architectures_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused("checkpoint: 'bert': expected a BERT, RoBERTa, DistilBERT model, got model_type 'gpt2'", checkpoint)
    (checkpoint / "config.json").write_text("[1]")
    refused("checkpoint: 'bert/config.json' is not a model's config: 'list' object has no attribute 'get'", checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": ')
    refused(
        "checkpoint: 'bert/config.json' is not a model's config: Expecting value: line 1 column 16 (char 15)",
        checkpoint,
    )


def test_missing_tensors_are_named(checkpoint):
    refused(
        "checkpoint: 'bert' lacks 2 tensors that BertForSequenceClassification needs, or has them in other shapes: "
        "classifier.bias, classifier.weight",
        checkpoint,
        ["a", "b"],
        call=load_classifier,
    )
    weights = load_file(checkpoint / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(
        "checkpoint: 'bert' lacks 1 tensors that BertForSequenceClassification needs, or has them in other shapes: "
        "bert.encoder.layer.1.output.dense.weight",
        checkpoint,
        ["a", "b"],
        True,
        call=load_classifier,
    )


def test_a_head_of_another_size_is_new_only_if_that_is_asked_for(checkpoint):
    model, tokenizer = load_classifier(checkpoint, ["a", "b"], new_head=True)
    model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    assert load_classifier("saved", ["a", "b", "c"], new_head=True)[0].config.num_labels == 3
    with pytest.raises(CheckpointError, match=r"^checkpoint: 'saved' lacks 2 tensors that BertForSequence"):
        load_classifier("saved", ["a", "b", "c"])


def test_a_tokenizer_is_not_made_up(checkpoint):
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    refused(
        "checkpoint: 'bert' holds no tokenizer: expected one of tokenizer.json, vocab.txt, vocab.json",
        checkpoint,
        ["a", "b"],
        True,
        call=load_classifier,
    )


def test_a_tokenizer_larger_than_the_embeddings(checkpoint, tmp_path):
    small = bert(tmp_path / "small", vocab_size=20)
    with pytest.raises(CheckpointError) as error:
        load_classifier(small, ["a", "b"], new_head=True)
    assert str(error.value) == (
        f"checkpoint: {str(small)!r}: expected a tokenizer of 1 to 20 tokens, as many as the model has "
        "embeddings, got 37"
    )


def test_fingerprint_is_of_the_content(checkpoint, original):
    assert checkpoint_digest(checkpoint) == checkpoint_digest(original)
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpoint_digest(checkpoint) != checkpoint_digest(original)


# Damage -----------------------------------------------------------------------------------------------------------


def spoiled(checkpoint: Path, **changes: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2**40),
        ("num_hidden_layers", "two"),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("hidden_size", 2**18),
        ("intermediate_size", 2**20),
        ("vocab_size", 2**26),
        ("max_position_embeddings", 2**40),
        ("num_labels", 2**40),
        ("id2label", {"x": "a"}),
        ("id2label", [1]),
        ("hidden_act", "no such thing"),
        ("layer_norm_eps", "x"),
        ("pad_token_id", 10**6),
    ],
)
def test_a_config_that_cannot_be(checkpoint, field, value):
    spoiled(checkpoint, **{field: value})
    with pytest.raises(CheckpointError, match=r"^checkpoint: '?'?bert"):
        load_classifier(checkpoint, ["a", "b"], new_head=True)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"model_type": "bert", "model_type": "bert"}', b"\xff"])
def test_configs_that_are_no_json(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^checkpoint: 'bert/config\.json' is not a model's config: "):
        load_classifier(checkpoint, ["a", "b"], new_head=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}', "[" * 100_000])
def test_a_damaged_index(checkpoint, content):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^checkpoint: 'bert/model\.safetensors\.index\.json': "):
        load_classifier(checkpoint, ["a", "b"], new_head=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"a": ', '{"model": 3, "added_tokens": 4}', "[" * 100_000])
def test_a_damaged_tokenizer(checkpoint, name, content):
    (checkpoint / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"^checkpoint: 'bert'") as error:
        load_classifier(checkpoint, ["a", "b"], new_head=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"])
def test_a_fifo_in_the_place_of_a_file(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    refused(f"checkpoint: 'bert/{name}': expected a regular file, got a FIFO", checkpoint)
