"""optimize(calibration=…): texts and batches give static scales, close to float; what it refuses."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from distilbert_fast import Engine, optimize, pack_encoder, quantize_model
from distilbert_fast.modeling.accelerator import warn_once

TEXTS = [
    "a gorgeous, witty and seductive movie.",
    "the plot is nothing but boilerplate cliches from start to finish.",
    "Compile the module before the first call, or pass the flag that skips it.",
    "it 's a charming and often affecting journey.",
    "Rain fell on the harbour all night, and by morning the boats had gone.",
] * 8


@pytest.fixture
def encode(tokenizer):
    def run(model, texts=tuple(TEXTS[:5])):
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        with torch.no_grad():
            x = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return (x * mask).sum(1) / mask.sum(1)

    return run


def scales(model):
    return model._accelerator._packed[1].packed.shape.scales


def test_texts_and_batches_give_the_same_static_scales(bert, bert_dir, tokenizer, encode):
    want = encode(bert)
    by_texts = optimize(copy.deepcopy(bert), "int8", calibration=TEXTS, tokenizer=tokenizer)
    assert all(context > 0 and ffn > 0 for context, ffn in scales(by_texts))
    assert F.cosine_similarity(encode(by_texts), want).min() > 0.99
    beside = AutoModel.from_pretrained(bert_dir)  # whose tokenizer lies where it came from
    assert scales(optimize(beside, "int8", calibration=iter(TEXTS))) == scales(by_texts)
    chunks = [TEXTS[:32], TEXTS[32:]]
    batches = [tokenizer(chunk, padding=True, return_tensors="pt") for chunk in chunks]
    by_batches = optimize(copy.deepcopy(bert), "int8", calibration=batches)
    assert scales(by_batches) == scales(by_texts)
    assert torch.equal(encode(by_batches), encode(by_texts))


def test_int8_models_are_calibrated_too(bert, tokenizer, encode):
    model = quantize_model(copy.deepcopy(bert))
    want = encode(bert)
    optimize(model, calibration=TEXTS, tokenizer=tokenizer)
    assert all(context > 0 and ffn > 0 for context, ffn in scales(model))
    assert F.cosine_similarity(encode(model), want).min() > 0.99


@pytest.mark.parametrize("calibration", [None, TEXTS], ids=["dynamic", "static"])
def test_an_encoder_is_packed_saved_and_loaded_with_the_bits_of_optimize(bert, tokenizer, calibration, tmp_path):
    batch = tokenizer(TEXTS[:5], padding=True, return_tensors="pt")
    pack_encoder(bert, "int8", calibration, tokenizer).save(tmp_path / "encoder.safetensors")
    loaded = Engine.load(tmp_path / "encoder.safetensors")
    model = optimize(copy.deepcopy(bert), "int8", calibration, tokenizer)
    with torch.no_grad():
        assert torch.equal(loaded(**batch), model(**batch).last_hidden_state)


def test_an_encoder_is_packed_without_masked_heads(bert, tokenizer):
    head_mask = torch.ones(bert.config.num_hidden_layers, bert.config.num_attention_heads)
    head_mask[0, :4] = head_mask[2] = 0
    batch = tokenizer(TEXTS[:5], padding=True, return_tensors="pt")
    smaller, whole = pack_encoder(bert, head_mask=head_mask), pack_encoder(bert)
    assert [len(heads) for heads in smaller.heads] == [8, 12, 0, 12, 12, 12]
    torch.testing.assert_close(smaller(**batch), whole(**batch, head_mask=head_mask), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^engine: head_mask must be of shape \[12\] or \[6, 12\], got \[6\]$"):
        pack_encoder(bert, head_mask=torch.ones(6))


def test_changed_weights_find_their_scales_again(bert, tokenizer, encode, caplog):
    warn_once.cache_clear()
    model = optimize(copy.deepcopy(bert), "int8", calibration=TEXTS, tokenizer=tokenizer)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1.01)
    with caplog.at_level(logging.WARNING, "distilbert_fast"):
        encode(model)
    assert set(scales(model)) == {(0.0, 0.0)}
    assert [record.message for record in caplog.records] == [
        "optimize: weights have changed since calibration, so each token finds its own scales again"
    ]


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("a text", TypeError, "optimize: calibration must be an iterable of texts or batches, got str"),
        (7, TypeError, "optimize: calibration must be an iterable of texts or batches, got int"),
        ([], ValueError, "optimize: calibration must be at least one text or batch, got none"),
        (
            [{"labels": 1}],
            TypeError,
            "optimize: calibration must be of texts, of tensors of ids or of mappings with input_ids, got dict",
        ),
        (["text", 3], TypeError, "optimize: calibration must be texts or batches, not both, got int"),
    ],
)
def test_refuses(bert, tokenizer, calibration, error, message):
    with pytest.raises(error) as raised:
        optimize(copy.deepcopy(bert), "int8", calibration=calibration, tokenizer=tokenizer)
    assert str(raised.value) == message


def test_refuses_texts_without_a_tokenizer_and_models_that_are_not_int8(bert, tokenizer, tmp_path):
    model = copy.deepcopy(bert)
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"^optimize: tokenizer must be given to calibrate on texts"):
        optimize(model, "int8", calibration=TEXTS)
    with pytest.raises(ValueError, match=r"^engine: model must be an int8 one, not"):
        optimize(copy.deepcopy(bert), "fp32", calibration=TEXTS, tokenizer=tokenizer)
