"""Tables of embeddings in int8: the module, models with it on disk, and what they cannot be."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import SENTENCES, tiny
from torch import nn

import distilbert_fast
from distilbert_fast import Int8Config, explain, optimize, quantize_model
from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.files.durable import FileError
from distilbert_fast.ops.fit_scale import fit_scale
from distilbert_fast.ops.quantize import quantize

BOTH = Int8Config(embeddings=True)
IDS, IDS_MASK = torch.arange(27).view(3, 9) + 2, (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()


def answers(model, **given):
    with torch.no_grad():
        return model(IDS, IDS_MASK, **given)[0]


# The module -------------------------------------------------------------------------------------------------------


def test_vectors_are_rows_of_the_dequantized_table():
    torch.manual_seed(0)
    table = nn.Embedding(50, 30, padding_idx=1)
    made = Int8Embedding.from_embedding(table)
    assert made.weight.shape == (1, 50, 30) and made.weight.dtype == torch.int8 and not made.weight.requires_grad
    assert torch.equal(made.weight_scale, fit_scale(table.weight.detach())) and made.padding_idx == 1
    assert torch.equal(made.codes, quantize(table.weight.detach(), made.weight_scale)[0])
    ids = torch.randint(0, 50, (2, 3, 4))
    assert torch.equal(made(ids), made.dequantized()[ids]) and made(ids[:0]).shape == (0, 3, 4, 30)
    assert (made(ids) - table(ids)).abs().max() < 0.55 * made.weight_scale.max()


def test_dtype_follows_casts_and_scales_do_not():
    made = Int8Embedding.from_embedding(nn.Embedding(5, 8))
    scale = made.weight_scale.clone()
    for cast, dtype in ((made.bfloat16, torch.bfloat16), (made.half, torch.float16), (made.float, torch.float32)):
        cast()
        made.to("cpu")
        assert made(torch.tensor([1])).dtype == made.dtype == dtype
        assert torch.equal(made.weight_scale, scale) and made.weight.dtype == torch.int8
    assert copy.deepcopy(made.double()).dtype == torch.float64


@pytest.mark.parametrize("place", [5, -1])
def test_ids_outside_the_table_raise(place):
    with pytest.raises((IndexError, RuntimeError)):
        Int8Embedding.from_embedding(nn.Embedding(5, 8))(torch.tensor([place]))


# Models -----------------------------------------------------------------------------------------------------------

CLASSES = [
    f"{family}{head}"
    for family in ("DistilBert", "Bert", "Roberta")
    for head in ("Model", "ForSequenceClassification", "ForQuestionAnswering")
]


@pytest.mark.parametrize("name", CLASSES)
def test_saved_and_read_back_bit_for_bit_and_run_by_the_engine(name, tmp_path):
    floats = tiny(getattr(transformers, name))
    model = quantize_model(copy.deepcopy(floats), BOTH)
    tables = [module for module in model.modules() if isinstance(module, Int8Embedding)]
    assert len(tables) == (2 if name.startswith("Distil") else 3)
    want = answers(model)
    torch.testing.assert_close(want, answers(floats), rtol=0, atol=0.1)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "distilbert_fast",
        "format": 2,
        "linear": {"kind": "int8"},
        "embeddings": {"kind": "int8"},
    }
    auto = "AutoModel" if name.endswith("Model") else f"AutoModelFor{name.partition('For')[2]}"
    for reader in (type(model), getattr(transformers, auto)):
        assert torch.equal(answers(reader.from_pretrained(tmp_path)), want)
    read = optimize(type(model).from_pretrained(tmp_path), keep_padding=True)
    torch.testing.assert_close(answers(read), want, rtol=0, atol=0.02)
    assert explain(read).served == 1 and explain(read).engine.startswith("int8 by the C++ encoder")
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert answers(half).dtype == torch.bfloat16
    torch.testing.assert_close(answers(half).float(), want, rtol=0, atol=0.1)
    half.save_pretrained(tmp_path / "half")
    assert torch.equal(answers(type(model).from_pretrained(tmp_path / "half", dtype=torch.bfloat16)), answers(half))


def test_drop_in_classes(tmp_path):
    theirs = quantize_model(tiny(transformers.DistilBertForSequenceClassification), BOTH)
    theirs.save_pretrained(tmp_path)
    ours = distilbert_fast.DistilBertForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(answers(ours), answers(theirs), rtol=0, atol=0.02)
    assert torch.equal(answers(optimize(ours)), answers(optimize(theirs)))


def test_while_loading_and_with_exceptions(tmp_path):
    floats = tiny()
    floats.save_pretrained(tmp_path / "float")
    config = Int8Config(heads=True, embeddings=True, modules_to_not_convert=["layer.0.output", "key"])
    read = type(floats).from_pretrained(tmp_path / "float", quantization_config=copy.deepcopy(config))
    model = quantize_model(floats, config)
    assert torch.equal(answers(read), answers(model))
    read.save_pretrained(tmp_path / "int8")
    settings = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    left = {name for name, kind in settings["linears"].items() if kind == {"kind": "float"}}
    projections = {f"encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "key", "value")}
    assert left == projections | {"encoder.layer.0.output.dense"}
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert torch.equal(answers(again), answers(model))
    base = transformers.AutoModel.from_pretrained(tmp_path / "int8")
    assert torch.equal(answers(base), answers(model.bert))


def test_the_whole_file_is_a_quarter(bert, bert_dir, tokenizer, tmp_path):
    model = quantize_model(copy.deepcopy(bert), Int8Config(heads=True, embeddings=True))
    model.save_pretrained(tmp_path)
    before, after = ((place / "model.safetensors").stat().st_size for place in (bert_dir, tmp_path))
    assert after < 0.3 * before
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    weights = batch["attention_mask"][:, :, None].float()
    with torch.no_grad():
        a, b = ((m(**batch)[0] * weights).sum(1) / weights.sum(1) for m in (optimize(model), bert))
    cosine = torch.cosine_similarity(a, b, dim=-1)
    assert cosine.mean() >= 0.995 and cosine.min() >= 0.97


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        ("BertForMaskedLM", "cls.predictions.decoder"),
        ("DistilBertForMaskedLM", "vocab_projector"),
        ("RobertaForMaskedLM", "lm_head.decoder"),
    ],
)
def test_words_that_vocabulary_logits_share(name, projection, tmp_path):
    model = tiny(getattr(transformers, name))
    with pytest.raises(ValueError) as error:
        quantize_model(model, BOTH)
    shared = f"{name}, whose {projection} shares the table of words"
    assert str(error.value) == f"quantize_model: embeddings must be float for {shared}, got int8"
    assert not any(isinstance(module, Int8Embedding) for module in model.modules())
    quantize_model(tiny(getattr(transformers, name.replace("ForMaskedLM", "Model"))), BOTH).save_pretrained(tmp_path)
    with pytest.raises(FileError) as error:
        type(model).from_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    assert str(error.value) == f"{path!r}: quantization_config: embeddings must be float for {shared}, got int8"


def test_twice():
    model = quantize_model(tiny(), Int8Config(embeddings=True, modules_to_not_convert=["layer"]))
    with pytest.raises(ValueError, match="model must be a float model, got one that is int8 already"):
        quantize_model(model)


@pytest.fixture
def saved(tmp_path):
    quantize_model(tiny(), BOTH).save_pretrained(tmp_path)
    return tmp_path


def load(path):
    return transformers.AutoModelForSequenceClassification.from_pretrained(path)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({"kind": "int4"}, "quantization_config: embeddings.kind must be one of 'float', 'int8', got 'int4'"),
        ({"kind": "codebook"}, "quantization_config: embeddings.kind must be one of 'float', 'int8', got 'codebook'"),
        ({"kind": "int8", "bits": 4}, "bits"),
        ("int8", "quantization_config: embeddings must be"),
        ({}, "kind"),
    ],
)
def test_settings_that_are_none(saved, embeddings, message):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["embeddings"] = embeddings
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError) as error:
        load(saved)
    assert str(saved / "config.json") in str(error.value) and message in str(error.value)


def test_format_1_has_no_embeddings(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "distilbert_fast", "embeddings": True}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match="unexpected keyword argument 'embeddings'"):
        load(saved)


def test_a_config_that_says_float(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]["embeddings"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"config\.json"):
        load(saved)
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})  # without what it was saved with
    with pytest.raises(FileError, match=r"embeddings.weight is int8, but the model that config.json describes"):
        load(saved)


WORD = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{WORD}.weight", torch.zeros(1, 97, 30), rf"{WORD}.weight must be I8 \[1, 97, 30\], got F32 \[1, 97, 30\]"),
        (f"{WORD}.weight", torch.zeros(97, 30).char(), rf"{WORD}.weight must be I8 \[1, 97, 30\], got I8 \[97, 30\]"),
        (f"{WORD}.weight_scale", torch.ones(96), rf"{WORD}.weight_scale must be F32 \[97\], got F32 \[96\]"),
        (f"{WORD}.weight_scale", torch.full((97,), -1.0), "must be finite and not negative, got -1.0"),
        (f"{WORD}.weight_scale", None, f"lacks {WORD}.weight_scale"),
    ],
)
def test_tensors_that_do_not_fit(saved, name, tensor, message):
    tensors = load_file(saved / "model.safetensors") | {name: tensor}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match=message):
        load(saved)


def test_plain_transformers_does_not_take_codes_for_vectors(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched|shape"):
        load(saved)
