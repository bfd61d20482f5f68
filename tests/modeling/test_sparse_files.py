"""Models with sparse layers on disk: written and read by transformers, run by the engine, refused when damaged."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from mutations import assert_refused_or_same, cut, flipped
from safetensors.torch import load_file, save_file
from tiny_models import answers, assert_same_bits, padded_batch, tiny

import distilbert_fast
from distilbert_fast import CodebookConfig, Int8Config, SparsityConfig, optimize, prune_connections, quantize_model
from distilbert_fast.files.durable import FileError
from distilbert_fast.layers import Int8Linear
from distilbert_fast.modeling.quantizer import record_structure
from distilbert_fast.modeling.structure import LayerStructure, restructure
from distilbert_fast.sparse import SparseLinear

CONFIG = SparsityConfig(amount=0.8, scope="global")
DENSE = "bert.encoder.layer.1.attention.output.dense"
AUTO = transformers.AutoModelForSequenceClassification


@pytest.fixture
def batch():
    return padded_batch()


def sparse(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def made(name="BertForSequenceClassification", config=CONFIG):
    return prune_connections(tiny(getattr(transformers, name)), config)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM", "ForQuestionAnswering"])
@pytest.mark.parametrize("family", ["DistilBert", "Bert", "Roberta"])
def test_saved_and_read_back_bit_for_bit(family, head, batch, tmp_path):
    model = made(family + head)
    assert len(sparse(model)) == 12
    model.save_pretrained(tmp_path)
    readers = [getattr(transformers, family + head), getattr(transformers, f"Auto{head}".replace("For", "ModelFor"))]
    if family == "DistilBert":
        readers.append(getattr(distilbert_fast, family + head))
    for reader in readers:
        read = reader.from_pretrained(tmp_path)
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(sparse(model), sparse(read), strict=True))
        state = model.state_dict()
        assert all(torch.equal(state[name], x) for name, x in read.state_dict().items())
        if not reader.__module__.startswith("distilbert_fast"):  # whose attention sums in another order
            assert_same_bits(read, model, batch)
        read.save_pretrained(tmp_path / "again")
        again, written = (d / "model.safetensors" for d in (tmp_path / "again", tmp_path))
        assert load_file(again).keys() == load_file(written).keys()
    assert all(parameter.requires_grad for parameter in read.parameters())


def test_what_is_written(tmp_path):
    before = tiny().state_dict()
    made().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "distilbert_fast",
        "format": 2,
        "linear": {"kind": "sparse"},
    }
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense"
    mask, values = tensors[f"{name}.weight"], tensors[f"{name}.values"].tolist()
    assert mask.shape == (1, 30, 5) and mask.dtype == torch.uint8
    for row, packed in zip(before[f"{name}.weight"].tolist(), mask[0].tolist(), strict=True):  # byte by byte
        bits = int.from_bytes(bytes(packed), "little")
        assert bits >> 37 == 0
        for c, weight in enumerate(row):
            if bits >> c & 1:
                assert values.pop(0) == weight
    assert not values
    layers = [key.removesuffix(".values") for key in tensors if key.endswith(".values")]
    stored = sum(tensors[f"{key}.{part}"].nbytes for key in layers for part in ("weight", "values"))
    assert stored / sum(before[f"{key}.weight"].nbytes for key in layers) < 0.24


def test_shards_and_bfloat16(batch, tmp_path):
    model = made()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(AUTO.from_pretrained(tmp_path), model, batch)
    read = AUTO.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {layer.weight.dtype for layer in sparse(read)} == {torch.bfloat16}
    read.save_pretrained(tmp_path / "bf16")
    assert_same_bits(AUTO.from_pretrained(tmp_path / "bf16"), read, batch)


def test_a_pruned_model_with_sparse_layers(batch, tmp_path):
    model = tiny()
    restructure(model.bert, [LayerStructure((0, 2), 5), LayerStructure((), 0)])
    prune_connections(record_structure(model), CONFIG).save_pretrained(tmp_path)
    read = AUTO.from_pretrained(tmp_path)
    assert_same_bits(read, model, batch)
    expected = answers(read, batch)[0]
    torch.testing.assert_close(answers(optimize(read, "fp32"), batch)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_engine_serves_what_was_read_and_sees_changes(precision, batch, tmp_path):
    made().save_pretrained(tmp_path)
    model, fresh = AUTO.from_pretrained(tmp_path), AUTO.from_pretrained(tmp_path)
    optimize(model, precision)
    tolerance = 1e-5 if precision is None else 0.01
    for change in (
        lambda m: None,
        lambda m: [layer.weight.data.mul_(5) for layer in sparse(m)],
        lambda m: [layer.mask.logical_and_(torch.arange(layer.in_features) % 2 == 0) for layer in sparse(m)],
        lambda m: m.load_state_dict(AUTO.from_pretrained(tmp_path).state_dict()),
    ):
        with torch.no_grad():
            change(model), change(fresh)
        torch.testing.assert_close(answers(model, batch)[0], answers(fresh, batch)[0], rtol=0, atol=tolerance)
    assert distilbert_fast.explain(model).served == 4


# Quantized too -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [[], ["layer.0"]])
def test_int8_keeps_what_is_gone_at_0(left, batch, tmp_path):
    model = made()
    masks = {name: layer.mask for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    with torch.no_grad():
        for layer in sparse(model):
            layer.weight[~layer.mask] = 5.0  # as an optimizer may leave it
    quantize_model(model, Int8Config(modules_to_not_convert=left), calibration=[batch])
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    assert len(layers) == (6 if left else 12) and len(sparse(model)) == 12 - len(layers)
    assert not any(bool(layer.codes[~masks[name]].any()) for name, layer in layers.items())
    model.save_pretrained(tmp_path)
    assert_same_bits(AUTO.from_pretrained(tmp_path), model, batch)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert ("format" in settings) == bool(left)
    if left:
        assert settings["linear"] == {"kind": "int8"}
        assert settings["linears"]["encoder.layer.0.output.dense"] == {"kind": "sparse"}


def test_shared_values_are_for_dense_layers():
    with pytest.raises(ValueError) as caught:
        quantize_model(made(), CodebookConfig(16))
    name = "bert.encoder.layer.0.attention.self.query"
    assert str(caught.value) == f"quantize_model: {name} must be dense to be made codebook, got a layer that is sparse"


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    made().save_pretrained(tmp_path)
    return tmp_path


def refused(directory):
    with pytest.raises(FileError) as caught:
        AUTO.from_pretrained(directory)
    return str(caught.value)


NAN = float("nan")
FLOATS = "F64 or F32 or BF16 or F16"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", lambda x: x[:, :, :-1], "U8 [1, 30, 4], got U8 [1, 30, 3]"),
        ("weight", lambda x: x[0], "U8 [1, 30, 4], got U8 [30, 4]"),
        ("weight", lambda x: x.view(torch.int8), "U8 [1, 30, 4], got I8 [1, 30, 4]"),
        ("weight", lambda x: x.float(), "U8 [1, 30, 4], got F32 [1, 30, 4]"),
        (
            "weight",
            lambda x: torch.cat([x[..., :-1], x[..., -1:] | 128], -1),
            "must have 0 in the 2 bits after the last of 30 columns, got other ones",
        ),
        ("values", lambda x: x[1:], f"must be {FLOATS} [{{n}}], got F32 [{{less}}]"),
        ("values", lambda x: x[None], f"must be {FLOATS} [{{n}}], got F32 [1, {{n}}]"),
        ("values", lambda x: x.int(), f"must be {FLOATS} [{{n}}], got I32 [{{n}}]"),
        ("values", lambda x: x.index_fill(0, torch.tensor([1]), NAN), "must be finite, got nan"),
        ("bias", lambda x: x[:-1], f"{FLOATS} [30], got F32 [29]"),
    ],
)
def test_masks_and_values_that_cannot_be(part, change, message, saved):
    file, name = saved / "model.safetensors", f"{DENSE}.{part}"
    tensors = load_file(file)
    n = len(tensors[f"{DENSE}.values"])
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file, {"format": "pt"})
    found = refused(saved)
    assert found.startswith(f"{str(file)!r}: {name} ") and message.format(n=n, less=n - 1) in found


def test_a_mask_that_does_not_match_its_values(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{DENSE}.weight"][0, 3, 0] ^= 1
    n = len(tensors[f"{DENSE}.values"])
    save_file(tensors, file, {"format": "pt"})
    assert f"{DENSE}.values must be {FLOATS} [" in (message := refused(saved)) and message.endswith(f"got F32 [{n}]")


@pytest.mark.parametrize("part", ["weight", "values", "bias"])
def test_missing_tensor(part, saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{DENSE}.{part}"]
    save_file(tensors, file, {"format": "pt"})
    assert refused(saved) == f"distilbert_fast: {file} lacks {DENSE}.{part}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linear": {"kind": "sparse", "pattern": "2:4"}}, "linear must be an object of kind alone, got 'pattern'"),
        ({"linear": {"kind": "int8"}}, "lacks bert.encoder.layer.0.attention.self.query.weight_scale"),
        ({"linear": {"kind": "float"}}, "is uint8, but the model that config.json describes has no codebook or sparse"),
    ],
)
def test_settings_that_do_not_match_the_tensors(settings, message, saved):
    path, file = saved / "config.json", saved / "model.safetensors"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
    save_file(load_file(file), file, {"format": "pt"})
    assert message in refused(saved)


def test_bits_and_ends_of_the_weights(saved):
    file, kind = saved / "model.safetensors", transformers.BertForSequenceClassification
    content, want = file.read_bytes(), kind.from_pretrained(saved).state_dict()

    def same(model):
        return all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())

    damages = [*flipped(content, 0, 30), *cut(content, 1, 3)]
    assert assert_refused_or_same(file, iter(damages), lambda: kind.from_pretrained(saved), same) == len(damages)
