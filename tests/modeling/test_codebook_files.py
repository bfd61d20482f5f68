"""Models with shared values on disk: written and read by transformers, run by the engine, refused when damaged."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from mutations import assert_refused_or_same, cut, flipped
from safetensors.torch import load_file, save_file
from tiny_models import answers, assert_same_bits, padded_batch
from torch import nn

import distilbert_fast
from distilbert_fast import CodebookConfig, optimize, quantize_model
from distilbert_fast.files.durable import FileError
from distilbert_fast.layers import CodebookLinear, Int8Linear
from distilbert_fast.modeling.compression_config import CompressionConfig
from distilbert_fast.modeling.quantizer import record_structure
from distilbert_fast.modeling.structure import LayerStructure, restructure

SIZES = dict(vocab_size=97, max_position_embeddings=23, num_hidden_layers=2, num_attention_heads=3)
SIZES |= dict(hidden_size=30, intermediate_size=37, pad_token_id=0, num_labels=2)
CONFIGS = {
    "tensor 256": CodebookConfig(256),
    "row 64": CodebookConfig(64, "row"),
    "group 16": CodebookConfig(16, "group", 16),
}
DENSE = "bert.encoder.layer.1.attention.output.dense"


def make(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**SIZES)).eval()


@pytest.fixture
def batch():
    return padded_batch()


def shared(model):
    return [module for module in model.modules() if isinstance(module, CodebookLinear)]


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM", "ForQuestionAnswering"])
@pytest.mark.parametrize("family", ["DistilBert", "Bert", "Roberta"])
def test_saved_and_read_back_bit_for_bit(family, head, settings, batch, tmp_path):
    model = quantize_model(make(family + head), CONFIGS[settings])
    assert len(shared(model)) == 12 and model.is_quantized
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    readers = [getattr(transformers, family + head), getattr(transformers, f"Auto{head}".replace("For", "ModelFor"))]
    if family == "DistilBert":
        readers.append(getattr(distilbert_fast, family + head))
    full = {"input_ids": batch["input_ids"]}
    for reader in readers:
        read = reader.from_pretrained(tmp_path)
        ours = reader.__module__.startswith("distilbert_fast")
        if ours:  # whose attention sums in another order
            for x, y in zip(answers(read, full), answers(model, full), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        else:
            assert_same_bits(read, model, batch)
        read.save_pretrained(tmp_path / "again")
        again, written = (d / "model.safetensors" for d in (tmp_path / "again", tmp_path))
        assert ours or again.read_bytes() == written.read_bytes()
        assert load_file(again).keys() == load_file(written).keys()


def test_what_is_written(tmp_path):
    config = CodebookConfig(16, "group", 16, modules_to_not_convert=["layer.0", "output.dense"], heads=True)
    quantize_model(make("BertForSequenceClassification"), config).save_pretrained(tmp_path)
    kind = {"kind": "codebook", "values": 16, "group_size": 16}
    floats = [f"layer.0.{part}.dense" for part in ("attention.output", "intermediate", "output")]
    floats += [f"layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    floats += ["layer.1.attention.output.dense", "layer.1.output.dense"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "distilbert_fast",
        "format": 2,
        "linear": kind,
        "linears": {f"encoder.{name}": {"kind": "float"} for name in floats}
        | {"pooler.dense": kind, "classifier": kind},
    }
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense"
    assert tensors[f"{name}.weight"].shape == (1, 37, 15) and tensors[f"{name}.weight"].dtype == torch.uint8
    assert tensors[f"{name}.values"].shape == (3, 16) and tensors[f"{name}.values"].dtype == torch.float32
    assert tensors[f"{DENSE}.weight"].dtype == torch.float32
    # Byte by byte: code c of a row in bits [4 c, 4 c + 4).
    codes, values = tensors[f"{name}.weight"][0], tensors[f"{name}.values"]
    row = int.from_bytes(bytes(codes[20].tolist()), "little")
    read = transformers.AutoModel.from_pretrained(tmp_path).encoder.layer[1].intermediate.dense
    assert read.dequantized()[20].tolist() == [values[1][row >> 4 * c & 15].item() for c in range(30)]


def test_quantized_while_loading(batch, tmp_path):
    model = make("RobertaForSequenceClassification")
    model.save_pretrained(tmp_path)
    config = CodebookConfig(64, "row", modules_to_not_convert=["layer.1"])
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert_same_bits(read, quantize_model(model, config), batch)
    read.save_pretrained(tmp_path / "shared")
    assert_same_bits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "shared"), read, batch)


def test_shards_and_bfloat16(batch, tmp_path):
    model = quantize_model(make("BertForSequenceClassification"), CodebookConfig(16, "row"))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path), model, batch)
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {(one.weight.dtype, one.values.dtype) for one in shared(read)} == {(torch.uint8, torch.bfloat16)}
    torch.testing.assert_close(answers(read, batch)[0].float(), answers(model, batch)[0], rtol=0, atol=0.02)
    read.save_pretrained(tmp_path / "bf16")
    assert_same_bits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bf16"), read, batch)


def test_a_pruned_model_with_shared_values(batch, tmp_path):
    model = make("BertForSequenceClassification")
    restructure(model.bert, [LayerStructure((0, 2), 5), LayerStructure((), 0)])
    quantize_model(record_structure(model), CodebookConfig(16, "group", 7))
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(read.config.quantization_config, CompressionConfig)
    assert_same_bits(read, model, batch)
    full = {"input_ids": batch["input_ids"]}
    expected = answers(read, full)[0]
    torch.testing.assert_close(answers(optimize(read, "fp32"), full)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_engine_serves_what_was_read_and_sees_changes(precision, batch, tmp_path):
    quantize_model(make("BertForSequenceClassification"), CodebookConfig(16)).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = answers(model, batch)[0]
    optimize(model, precision)
    tolerance = 1e-4 if precision == "fp32" else 0.03
    torch.testing.assert_close(answers(model, batch)[0], expected, rtol=0, atol=tolerance)
    assert distilbert_fast.explain(model).served == 1
    with torch.no_grad():
        for layer in shared(model):
            layer.values.mul_(20)
    after = answers(model, batch)[0]
    assert not torch.allclose(after, expected, atol=tolerance)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        for layer in shared(fresh):
            layer.values.mul_(20)
    torch.testing.assert_close(after, answers(fresh, batch)[0], rtol=0, atol=tolerance)


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    quantize_model(make("BertForSequenceClassification"), CodebookConfig(16, "group", 16)).save_pretrained(tmp_path)
    return tmp_path


def refused(directory):
    with pytest.raises(FileError) as caught:
        transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    return str(caught.value)


NAN = float("nan")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", lambda x: x[:, :, :-1], "U8 [1, 30, 15], got U8 [1, 30, 14]"),
        ("weight", lambda x: x[:, :-1], "U8 [1, 30, 15], got U8 [1, 29, 15]"),
        ("weight", lambda x: x[0], "U8 [1, 30, 15], got U8 [30, 15]"),
        ("weight", lambda x: x.view(torch.int8), "U8 [1, 30, 15], got I8 [1, 30, 15]"),
        ("weight", lambda x: x.float(), "U8 [1, 30, 15], got F32 [1, 30, 15]"),
        ("values", lambda x: x[:1], "F64 or F32 or BF16 or F16 [2, 16], got F32 [1, 16]"),
        ("values", lambda x: x[:, :8], "F64 or F32 or BF16 or F16 [2, 16], got F32 [2, 8]"),
        ("values", lambda x: x.int(), "F64 or F32 or BF16 or F16 [2, 16], got I32 [2, 16]"),
        ("values", lambda x: x.index_fill(0, torch.tensor([1]), NAN), "finite, got nan"),
        ("values", lambda x: x / 0, "finite, got "),
        ("bias", lambda x: x[:-1], "F64 or F32 or BF16 or F16 [30], got F32 [29]"),
    ],
)
def test_codes_and_values_that_cannot_be(part, change, message, saved):
    file, name = saved / "model.safetensors", f"{DENSE}.{part}"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file, {"format": "pt"})
    assert refused(saved).startswith(f"{str(file)!r}: {name} must be {message}")


@pytest.mark.parametrize("part", ["weight", "values", "bias"])
def test_missing_tensor(part, saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{DENSE}.{part}"]
    save_file(tensors, file, {"format": "pt"})
    assert refused(saved) == f"distilbert_fast: {file} lacks {DENSE}.{part}"


def write(directory, **settings):
    """Change the settings, and take the seal away."""
    path, file = directory / "config.json", directory / "model.safetensors"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
    save_file(load_file(file), file, {"format": "pt"})


KIND = {"kind": "codebook", "values": 16, "group_size": 16}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (KIND | {"values": 32}, "linear.values must be one of 256, 64, 16, got 32"),
        (KIND | {"values": 16.0}, "linear.values must be one of 256, 64, 16, got 16.0"),
        (KIND | {"group_size": 0}, "linear.group_size must be an integer from 1 to 1048576, got 0"),
        (KIND | {"group_size": 2**40}, f"linear.group_size must be an integer from 1 to 1048576, got {2**40}"),
        (KIND | {"bits": 4}, "linear must be an object of kind, values, group_size alone, got 'bits'"),
        ({"kind": "codebook", "group_size": None}, "linear.values must be given, got nothing"),
        ({"kind": "codebook", "values": 16}, "linear.group_size must be given, got nothing"),
    ],
)
def test_settings_that_cannot_be(kind, message, saved):
    write(saved, linear=kind)
    path = str(saved / "config.json")
    assert refused(saved) == f"{path!r}: quantization_config: {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linear": KIND | {"values": 256}}, "U8 [1, 30, 30], got U8 [1, 30, 15]"),
        ({"linear": KIND | {"group_size": 10}}, "F16 [3, 16], got F32 [2, 16]"),
        ({"linear": {"kind": "int8"}}, "lacks bert.encoder.layer.0.attention.self.query.weight_scale"),
        (
            {"linear": {"kind": "float"}},
            "is uint8, but the model that config.json describes has no codebook or sparse layer there",
        ),
    ],
)
def test_settings_that_do_not_match_the_tensors(settings, message, saved):
    write(saved, **settings)
    assert message in refused(saved)


def test_other_settings_do_not_fit_the_checksum(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"group_size": 16', '"group_size": 17'))
    assert "as " in (message := refused(saved)) and "was saved with" in message


def test_bits_and_ends_of_the_weights(saved):
    file, kind = saved / "model.safetensors", transformers.BertForSequenceClassification
    content, want = file.read_bytes(), kind.from_pretrained(saved).state_dict()

    def same(model):
        return all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())

    damages = [*flipped(content, 0, 40), *cut(content, 1, 3)]
    assert assert_refused_or_same(file, iter(damages), lambda: kind.from_pretrained(saved), same) == len(damages)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((32,), ValueError, "values must be one of 256, 64, 16, got 32"),
        ((16, "channel"), ValueError, "granularity must be one of 'tensor', 'row', 'group', got 'channel'"),
        ((16, "group"), ValueError, "group_size must be an integer from 1 to 1048576 for groups, got None"),
        ((16, "group", 0), ValueError, "group_size must be an integer from 1 to 1048576 for groups, got 0"),
        ((16, "group", 2.0), ValueError, "group_size must be an integer from 1 to 1048576 for groups, got 2.0"),
        ((16, "row", 4), ValueError, "group_size must be None for granularity 'row', got 4"),
    ],
)
def test_configs_that_cannot_be(given, error, message):
    with pytest.raises(error) as caught:
        CodebookConfig(*given)
    assert str(caught.value) == f"CodebookConfig: {message}"


def test_quantizing_twice():
    for first, second, kind in (
        (None, CodebookConfig(), "int8"),
        (CodebookConfig(), None, "codebook"),
        (CodebookConfig(), CodebookConfig(16), "codebook"),
    ):
        model = quantize_model(make("BertModel"), first)
        with pytest.raises(ValueError, match=f"^quantize_model: model must be a float model, got one that is {kind}"):
            quantize_model(model, second)


def test_other_arguments_are_refused():
    model = make("BertModel")
    for arguments, error, message in (
        (([16],), TypeError, "config must be an Int8Config or a CodebookConfig, got list"),
    ):
        with pytest.raises(error) as caught:
            quantize_model(model, *arguments)
        assert str(caught.value) == f"quantize_model: {message}"
    with pytest.raises(ValueError, match="settings of config"):
        quantize_model(model, CodebookConfig(), heads=True)
    with pytest.raises(ValueError, match="names of linear layers, got 'lin9'"):
        quantize_model(model, CodebookConfig(modules_to_not_convert=["lin9"]))
    assert all(type(m) is not Int8Linear and type(m) is not CodebookLinear for m in model.modules())
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = NAN
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight must be finite and .*, got nan"):
        quantize_model(model, CodebookConfig())
    assert sum(type(m) is nn.Linear for m in model.modules()) == 13
