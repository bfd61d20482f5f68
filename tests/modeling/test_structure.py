"""Pruned models: transformers' own forward and ours, on disk and back, with int8, refused when damaged.

The oracle of a pruned model is the whole one whose removed heads and neurons are multiplied by 0.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from operator import attrgetter

import pytest
import torch
import transformers
from demo_input import load_classifier
from safetensors.torch import load_file, save_file
from tiny_models import answers, padded_batch

import distilbert_fast
from distilbert_fast import Int8Config, explain, optimize, pack_encoder, quantize_model
from distilbert_fast.files.durable import FileError
from distilbert_fast.layers import Int8Linear
from distilbert_fast.modeling.architectures import architecture_of
from distilbert_fast.modeling.distilbert import adopt
from distilbert_fast.modeling.encoder import encoder_layers, find_encoder
from distilbert_fast.modeling.loading import CheckpointError
from distilbert_fast.modeling.quantizer import record_structure
from distilbert_fast.modeling.structure import LayerStructure, keep_heads, keep_neurons, structure_of

SIZES = dict(vocab_size=97, max_position_embeddings=23, num_hidden_layers=4, num_attention_heads=3)
SIZES |= dict(hidden_size=30, intermediate_size=37, hidden_dim=37, pad_token_id=0, num_labels=2)
LEFT = [((0, 2), 33), ((), 1), ((1,), 0), ((), 0)]
FAMILIES = ("DistilBert", "Bert", "Roberta")
CLASSES = [f"{family}{head}" for family in FAMILIES for head in ("Model", "ForSequenceClassification", "ForMaskedLM")]


def make(name, library=transformers, **changes):
    torch.manual_seed(0)
    kind = getattr(library, name)
    model = kind(kind.config_class(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def cut(model, left=LEFT):
    """Prune a model as ``left`` says, of the neurons the last ones."""
    encoder = find_encoder(model, "test")
    for i, (heads, ffn) in enumerate(left):
        keep_heads(encoder, i, heads)
        keep_neurons(encoder, i, torch.arange(37 - ffn, 37))
    return record_structure(model)


@torch.no_grad()
def zeroed(model, left=LEFT):
    """What ``cut`` removes, multiplied by 0."""
    model = copy.deepcopy(model)
    layers = encoder_layers(find_encoder(model, "test"))
    names = architecture_of(model).layer
    for layer, (heads, ffn) in zip(layers, left, strict=True):
        gone = [10 * head + i for head in range(3) if head not in heads for i in range(10)]
        attrgetter(names["out"])(layer).weight[:, gone] = 0
        attrgetter(names["ffn_out"])(layer).weight[:, : 37 - ffn] = 0
    return model


@pytest.fixture
def batch():
    return padded_batch()


def assert_close(a, b, atol=1e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "distilbert_fast"])
@pytest.mark.parametrize("name", CLASSES)
def test_their_own_forward_is_that_of_the_masked_model(name, attention, batch):
    whole = make(name)
    whole.set_attn_implementation(attention)
    model = cut(copy.deepcopy(whole))
    assert structure_of(model.base_model) == tuple(LayerStructure(*layer) for layer in LEFT)
    assert_close(answers(model, batch), answers(zeroed(whole), batch))
    if attention != "sdpa":  # which has none
        outputs = model(**batch, output_attentions=True)
        assert [x.shape[1] for x in outputs.attentions] == [2, 0, 1, 0]


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel"])
def test_it_is_copied_and_pickled(name, batch, tmp_path):
    model = cut(make(name))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(answers(copied, batch), answers(model, batch), atol=0)
        copied.save_pretrained(tmp_path)
        assert_close(answers(transformers.AutoModel.from_pretrained(tmp_path).eval(), batch), answers(model, batch), 0)


@pytest.mark.parametrize("name", CLASSES)
def test_a_pruned_model_trains(name, batch):
    model = cut(make(name)).train()
    model(**batch)[0].square().mean().backward()
    for parameter in model.base_model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    inner = attrgetter(architecture_of(model).layer["ffn_in"])(encoder_layers(model.base_model)[0]).weight
    assert inner.shape == (33, 30) and inner.grad.any()


@pytest.mark.parametrize("precision", [None, "int8", "bf16"])
@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel", "RobertaForSequenceClassification"])
def test_the_engine_serves_it(name, precision, batch):
    whole = make(name)
    model = optimize(cut(copy.deepcopy(whole)), precision)
    want, found = answers(zeroed(whole), batch)[0], answers(model, batch)[0]
    real = batch["attention_mask"].bool() if found.dim() == 3 else slice(None)
    torch.testing.assert_close(found[real], want[real], rtol=0, atol={None: 1e-4, "int8": 0.3, "bf16": 0.1}[precision])
    assert (explain(model).served, explain(model).fallbacks) == (1, {})
    left = pack_encoder(model).packed.shape
    assert left.heads == tuple(heads for heads, _ in LEFT) and left.ffn == tuple(ffn for _, ffn in LEFT)


def test_what_is_pruned_after_it_was_packed_is_packed_again(batch):
    model = optimize(make("BertModel"))
    answers(model, batch)
    whole = make("BertModel")
    cut(model)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(answers(model, batch)[0][real], answers(zeroed(whole), batch)[0][real])
    assert explain(model).served == 2


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel"])
def test_head_masks_name_heads_by_their_first_numbers(name, optimized, batch):
    whole = make(name)
    mask = torch.rand(4, 3)
    for model in (whole, copy.deepcopy(whole)):
        model.set_attn_implementation("distilbert_fast")
        distilbert_fast.number_layers(model)
    pruned = cut(copy.deepcopy(whole))
    if optimized:
        optimize(pruned)
    with torch.no_grad():
        want = zeroed(whole)(**batch, head_mask=mask)[0]
        one = zeroed(whole)(**batch, head_mask=mask[0])[0]
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(pruned(**batch, head_mask=mask)[0][real], want[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pruned(**batch, head_mask=mask[0])[0][real], one[real], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"of shape \[3\]"):
        pruned(**batch, head_mask=torch.ones(2))


# On disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_saved_and_read_back_bit_for_bit(name, int8, batch, tmp_path):
    model = cut(make(name))
    if int8:
        quantize_model(model, Int8Config(heads=True, modules_to_not_convert=["layer.0"]))
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for family in FAMILIES:
        name = name.removeprefix(family)
    auto = f"Auto{name}".replace("For", "ModelFor")
    readers = [type(model), getattr(transformers, auto)]
    for reader in readers:
        with warnings.catch_warnings(action="error"):
            read, info = reader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_close(answers(read.eval(), batch), answers(model, batch), atol=0)
        read.save_pretrained(tmp_path / "again")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_our_classes_read_and_write_the_same_files(batch, tmp_path):
    theirs = cut(make("DistilBertForSequenceClassification"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = distilbert_fast.DistilBertForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    assert_close(answers(ours, batch), answers(theirs, batch))
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()
    adopt(theirs)
    assert type(theirs) is distilbert_fast.DistilBertForSequenceClassification
    assert_close(answers(theirs, batch), answers(ours, batch))


def test_what_is_written(tmp_path):
    model = cut(make("BertForSequenceClassification"))
    structure = [{"heads": list(heads), "ffn": ffn} for heads, ffn in LEFT]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "distilbert_fast", "format": 2, "structure": structure}
    assert (config["num_attention_heads"], config["intermediate_size"]) == (3, 37)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "bert.encoder.layer"
    assert tensors[f"{layer}.0.attention.self.query.weight"].shape == (20, 30)
    assert tensors[f"{layer}.0.output.dense.weight"].shape == (30, 33)
    assert tensors[f"{layer}.1.attention.output.dense.weight"].shape == (30, 0)
    quantize_model(model, Int8Config(heads=True, modules_to_not_convert=["layer.0.output"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "distilbert_fast",
        "format": 2,
        "structure": structure,
        "linear": {"kind": "int8"},
        "linears": {
            "encoder.layer.0.output.dense": {"kind": "float"},
            "pooler.dense": {"kind": "int8"},
            "classifier": {"kind": "int8"},
        },
    }


def test_a_pruned_float_model_is_cast_and_int8_refuses_to_be_pruned(batch, tmp_path):
    cut(make("BertModel")).save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert not model.is_quantized
    assert model.half().float().dtype == torch.float32
    assert transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    quantize_model(model)
    assert model.is_quantized and sum(isinstance(module, Int8Linear) for module in model.modules()) == 24
    ours = make("DistilBertModel", distilbert_fast)
    quantize_model(ours)
    with pytest.raises(
        TypeError, match=r"^DistilBertModel: q_lin of layer 0 must be nn\.Linear to be pruned, got Int8"
    ):
        ours.prune_heads({0: [1]})


def test_the_trainer_takes_it(batch, tmp_path):
    cut(make("BertForSequenceClassification")).save_pretrained(tmp_path / "pruned")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    rows = [{key: value[i] for key, value in batch.items()} | {"labels": i % 2} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "run", report_to=[], use_cpu=True, disable_tqdm=True, max_steps=2, save_steps=2
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/checkpoint-2")
    assert_close(answers(read.eval(), batch), answers(model.eval(), batch), atol=0)


def test_bases_and_heads_of_each_other(batch, tmp_path):
    model = quantize_model(cut(make("BertForSequenceClassification")), Int8Config(heads=True))
    model.save_pretrained(tmp_path / "task")
    read = transformers.BertModel.from_pretrained(tmp_path / "task")
    assert_close(answers(read.eval(), batch), answers(model.bert, batch), atol=0)
    read.save_pretrained(tmp_path / "base")
    read = transformers.BertForTokenClassification.from_pretrained(tmp_path / "base")
    assert structure_of(read.base_model) == structure_of(model.base_model)


# Damage -------------------------------------------------------------------------------------------------------------

GOOD = [{"heads": list(heads), "ffn": ffn} for heads, ffn in LEFT]
READERS = [
    ("DistilBert", transformers.AutoModelForSequenceClassification),
    ("DistilBert", transformers.DistilBertModel),
    ("DistilBert", distilbert_fast.DistilBertForSequenceClassification),
    ("Bert", transformers.BertForSequenceClassification),
    ("Roberta", transformers.AutoModelForSequenceClassification),
]


def instead(**changes):
    return [GOOD[0] | changes, *GOOD[1:]]


STRUCTURES = {
    "out of range": (instead(heads=[0, 3]), "structure[0].heads[1] must be an integer from 0 to 2, got 3"),
    "repeated": (instead(heads=[0, 0]), "structure[0].heads must be ascending, each once, got [0, 0]"),
    "descending": (instead(heads=[2, 0]), "structure[0].heads must be ascending, each once, got [2, 0]"),
    "negative head": (instead(heads=[-1, 2]), "structure[0].heads[0] must be an integer from 0 to "),
    "negative width": (instead(ffn=-1), "structure[0].ffn must be an integer from 0 to "),
    "endless width": (instead(ffn=2**40), "structure[0].ffn must be an integer from 0 to "),
    "wider than it was": (instead(ffn=38), "structure[0].ffn must be an integer from 0 to 37, got 38"),
    "no number": (instead(ffn=True), "structure[0].ffn must be an integer from 0 to "),
    "too few layers": (GOOD[:-1], "structure must be a list of 4 values, got "),
    "too many layers": ([*GOOD, GOOD[0]], "structure must be a list of 4 values, got "),
    "a key too many": (instead(neurons=[1]), "structure[0] must be an object of heads, ffn alone, got 'neurons'"),
    "a key too few": ([{"heads": []}, *GOOD[1:]], "structure[0].ffn must be given, got nothing"),
    "no list": ({"0": {}}, "structure must be a list of "),
}


def write_structure(directory, structure, sealed=False, **more):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"structure": structure} | more
    path.write_text(json.dumps(config))
    if not sealed:
        file = directory / "model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})


@pytest.mark.parametrize("case", STRUCTURES)
@pytest.mark.parametrize(("family", "reader"), READERS)
def test_structures_that_cannot_be(family, reader, case, tmp_path):
    structure, message = STRUCTURES[case]
    cut(make(f"{family}ForSequenceClassification")).save_pretrained(tmp_path)
    write_structure(tmp_path, structure)
    with pytest.raises(FileError) as error:
        reader.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{str(tmp_path / 'config.json')!r}: quantization_config: {message}")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("changes", [{"heads": [0]}, {"heads": [0, 1, 2]}, {"ffn": 32}, {"ffn": 37}, {"ffn": 0}])
@pytest.mark.parametrize(("family", "reader"), READERS)
def test_widths_that_do_not_match_the_tensors(family, reader, changes, int8, tmp_path):
    model = cut(make(f"{family}ForSequenceClassification"))
    if int8:
        quantize_model(model)
    model.save_pretrained(tmp_path)
    write_structure(tmp_path, instead(**changes))
    with pytest.raises(FileError) as error:
        reader.from_pretrained(tmp_path)
    assert str(error.value).startswith(repr(str(tmp_path / "model.safetensors")))
    write_structure(tmp_path, GOOD)
    reader.from_pretrained(tmp_path)


def test_other_heads_of_the_same_number_do_not_fit_the_checksum(tmp_path):
    cut(make("BertModel")).save_pretrained(tmp_path)
    write_structure(tmp_path, instead(heads=[0, 1]), sealed=True)
    with pytest.raises(FileError, match=r"quantization_config must be .* was saved with, got "):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "format must be 2, got 3"),
        ({"format": "2"}, "format must be 2, got '2'"),
        (
            {"sparsity": 0.5},
            "expected an object of quant_method, format, structure, linear, linears, embeddings alone, got",
        ),
        ({"linear": {"kind": "int3"}}, "linear.kind must be one of 'float', 'int8'"),
        ({"linear": {"kind": "int8", "bits": 8}}, "linear must be an object of kind alone, got 'bits'"),
        ({"linear": "int8"}, "linear must be an object, got 'int8'"),
        ({"linears": {"encoder.layer.0.output.dense": {}}}, "linears.encoder.layer.0.output.dense.kind must be given"),
        (
            {"linears": {"encoder.layer.9.output.dense": {"kind": "int8"}}},
            "linears must name linear layers, got 'encoder",
        ),
    ],
)
def test_settings_of_format_2_that_cannot_be(changes, message, tmp_path):
    cut(make("BertModel")).save_pretrained(tmp_path)
    write_structure(tmp_path, GOOD, **changes)
    with pytest.raises(FileError) as error:
        transformers.AutoModel.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{str(tmp_path / 'config.json')!r}: quantization_config: {message}")


def test_sizes_of_a_pruned_model_are_those_of_its_file(tmp_path):
    """A file may be far smaller than the whole model, and a structure may not claim more than the file holds."""
    sizes = dict(hidden_size=4096, num_attention_heads=4, intermediate_size=2**20, num_hidden_layers=12)
    config = transformers.BertConfig(
        **SIZES | sizes, quantization_config={"quant_method": "distilbert_fast", "format": 2}
    )
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    write_structure(tmp_path, [{"heads": [0, 1, 2, 3], "ffn": 2**20}] * 12)
    with pytest.raises(FileError, match=r"its sizes must be those of the .* bytes of weights beside it"):
        transformers.AutoModel.from_pretrained(tmp_path)
    write_structure(tmp_path, [{"heads": [0], "ffn": 0}] * 12)
    with pytest.raises(FileError, match="lacks"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_a_command_is_refused_as_such(tmp_path):
    cut(make("BertForSequenceClassification")).save_pretrained(tmp_path)
    write_structure(tmp_path, instead(ffn=2**40))
    with pytest.raises(CheckpointError, match=r"^checkpoint: .*config\.json.*structure\[0\]\.ffn"):
        load_classifier(tmp_path)
