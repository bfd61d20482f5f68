"""int8 models on disk: written and read by transformers itself, by our classes, and refused when damaged."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import shutil

import pytest
import torch
import transformers
from mutations import assert_refused_or_same, cut, flipped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import answers, assert_same_bits, padded_batch

import distilbert_fast
from distilbert_fast import CodebookConfig, Int8Config, SparsityConfig, optimize, prune_connections, quantize_model
from distilbert_fast.files.durable import FileError
from distilbert_fast.layers import Int8Linear

SIZES = dict(vocab_size=97, max_position_embeddings=23, num_hidden_layers=2, num_attention_heads=3)
SIZES |= dict(hidden_size=30, intermediate_size=37, pad_token_id=0, num_labels=2)


def make(name):
    """A float model with random weights of odd sizes."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**SIZES)).eval()


@pytest.fixture
def batch():
    return padded_batch()


CLASSES = [
    (name, auto)
    for name in ("DistilBert", "Bert", "Roberta")
    for auto in ("Model", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
]


@pytest.mark.parametrize("family, head", CLASSES)
def test_saved_and_read_back_bit_for_bit(family, head, batch, tmp_path):
    model = quantize_model(make(family + head))
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    readers = [getattr(transformers, family + head), getattr(transformers, f"Auto{head}".replace("For", "ModelFor"))]
    for reader in readers:
        assert_same_bits(reader.from_pretrained(tmp_path), model, batch)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM"])
def test_our_own_classes_read_and_write_the_same_files(head, batch, tmp_path):
    theirs = quantize_model(make(f"DistilBert{head}"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(distilbert_fast, f"DistilBert{head}").from_pretrained(tmp_path / "theirs")
    assert sum(isinstance(module, Int8Linear) for module in ours.modules()) == 12
    ours.save_pretrained(tmp_path / "ours")
    type(theirs).from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert_same_bits(type(ours).from_pretrained(tmp_path / "ours"), ours, batch)
    full = {"input_ids": batch["input_ids"]}
    for x, y in zip(answers(ours, full), answers(theirs, full), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0.02)


def test_what_is_written(tmp_path):
    model = quantize_model(make("BertForSequenceClassification"), Int8Config(modules_to_not_convert=["layer.0"]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["quantization_config"] == {
        "quant_method": "distilbert_fast",
        "heads": False,
        "modules_to_not_convert": ["layer.0"],
    }
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.query"
    assert tensors[f"{name}.weight"].shape == (1, 30, 30) and tensors[f"{name}.weight"].dtype == torch.int8
    assert tensors[f"{name}.weight_scale"].shape == (30,) and tensors[f"{name}.weight_scale"].dtype == torch.float32
    assert tensors["bert.encoder.layer.0.attention.self.query.weight"].dtype == torch.float32


def test_real_model_is_read_back_and_smaller(bert, bert_dir, tokenizer, texts, tmp_path):
    model = quantize_model(copy.deepcopy(bert), Int8Config(heads=True))
    model.save_pretrained(tmp_path)
    read = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same_bits(read, model, tokenizer(texts, padding=True, return_tensors="pt"))
    linears = sum(module.weight.numel() for module in read.modules() if isinstance(module, Int8Linear))
    before, after = ((d / "model.safetensors").stat().st_size for d in (bert_dir, tmp_path))
    assert after < before - 2.9 * linears
    read.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_head_left_out_or_added(batch, tmp_path):
    model = quantize_model(make("BertForSequenceClassification"), Int8Config(heads=True))
    model.save_pretrained(tmp_path / "task")
    read = transformers.BertModel.from_pretrained(tmp_path / "task")
    assert_same_bits(read, model.bert, batch)
    quantize_model(make("BertModel")).save_pretrained(tmp_path / "base")
    read = transformers.BertForTokenClassification.from_pretrained(tmp_path / "base")
    assert sum(isinstance(module, Int8Linear) for module in read.modules()) == 12


def test_shards(batch, tmp_path):
    model = quantize_model(make("BertForSequenceClassification"))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path), model, batch)


def test_bfloat16_keeps_its_scales(batch, tmp_path):
    model = quantize_model(make("DistilBertForSequenceClassification"))
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layers = [module for module in read.modules() if isinstance(module, Int8Linear)]
    for ours, theirs in zip(layers, (m for m in model.modules() if isinstance(m, Int8Linear)), strict=True):
        assert ours.weight_scale.dtype == torch.float32 and torch.equal(ours.weight_scale, theirs.weight_scale)
        assert ours.weight.dtype == torch.int8 and ours.bias.dtype == torch.bfloat16
    assert read.classifier.weight.dtype == torch.bfloat16
    (a,), (b,) = answers(read, batch), answers(model, batch)
    assert a.dtype == torch.bfloat16
    torch.testing.assert_close(a.float(), b, rtol=0, atol=0.02)
    read.save_pretrained(tmp_path / "bf16")
    assert_same_bits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bf16"), read, batch)
    optimize(read)
    torch.testing.assert_close(answers(read, batch)[0].float(), b, rtol=0, atol=0.02)


@pytest.mark.parametrize("config", [Int8Config(), Int8Config(embeddings=True), CodebookConfig(16)])
@pytest.mark.parametrize("cast", [lambda model: model.double(), lambda model: model.to(torch.float64)])
def test_a_model_that_could_not_be_read_is_not_written(config, cast, tmp_path):
    model = quantize_model(make("BertForSequenceClassification"), config)
    model.save_pretrained(tmp_path / "float32")
    for one in (model, transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "float32")):
        with pytest.raises(TypeError) as error:
            cast(one).save_pretrained(tmp_path / "float64")
        expected = "float32 or bfloat16 or float16 for int8, got float64"
        assert str(error.value) == f"save_pretrained: model.dtype must be {expected}"
        assert not (tmp_path / "float64").exists()


def test_a_model_of_several_dtypes_is_not_written(tmp_path):
    model = quantize_model(make("BertForSequenceClassification"))
    model.bert.encoder.layer[1].to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"^save_pretrained: dtype of encoder\.layer\.1\.\S+ must be float32, as that "):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("sparse", [False, True])
def test_values_that_are_not_finite_are_not_written(sparse, tmp_path):
    model = make("BertForSequenceClassification")
    model = prune_connections(model, SparsityConfig(0.5)) if sparse else quantize_model(model, CodebookConfig(16))
    layer = model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        (layer.weight if sparse else layer.values).fill_(float("nan"))
    name = f"bert.encoder.layer.1.output.dense.{'weight' if sparse else 'values'}"
    with pytest.raises(ValueError, match=rf"^save_pretrained: {name} must be finite, got nan$"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_quantized_while_loading(batch, tmp_path):
    model = make("RobertaForSequenceClassification")
    model.save_pretrained(tmp_path)
    config = Int8Config(modules_to_not_convert=["layer.1"])
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert_same_bits(read, quantize_model(model, Int8Config(modules_to_not_convert=["layer.1"])), batch)
    read.save_pretrained(tmp_path / "int8")
    assert_same_bits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8"), read, batch)


# What else runs on it ------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path):
    quantize_model(make("BertForSequenceClassification")).save_pretrained(tmp_path / "int8")
    return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")


@pytest.mark.parametrize("optimized", [False, True])
def test_trainer_predicts_and_evaluates(optimized, classifier, batch, tmp_path):
    rows = [{key: value[i] for key, value in batch.items()} | {"labels": i % 2} for i in range(4)]
    expected = answers(classifier, batch)[0]
    if optimized:
        optimize(classifier)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "run", report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2
    )
    trainer = transformers.Trainer(classifier, arguments, eval_dataset=rows)
    found = torch.from_numpy(trainer.predict(rows).predictions)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 0, 1]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), abs=0.02)


def test_everything_but_the_codes_can_learn(classifier, batch):
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier.train()(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    torch.optim.SGD(classifier.parameters(), lr=1.0).step()
    changed = {name for name, tensor in classifier.state_dict().items() if not torch.equal(tensor, before[name])}
    for name, module in classifier.named_modules():
        if isinstance(module, Int8Linear):
            assert not changed & {f"{name}.weight", f"{name}.weight_scale"}
            assert f"{name}.bias" in changed or name.endswith("key")  # softmax does not see the bias of the keys
    assert {"bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "classifier.weight"} <= changed


def test_torch_compile(classifier, batch):
    compiled = torch.compile(classifier, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, batch)[0], answers(classifier, batch)[0])


def test_pipeline_with_the_real_tokenizer(bert, tokenizer, texts, tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(copy.deepcopy(bert.config)).eval()
    quantize_model(model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-classification", str(tmp_path), device="cpu")
    assert pipe.model.is_quantized
    found = pipe(texts, batch_size=3)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert found == pipe(texts, batch_size=3)


# Damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    quantize_model(make("BertForSequenceClassification")).save_pretrained(tmp_path)
    return tmp_path


def refused(directory, error=ValueError):
    with pytest.raises(error) as caught:
        transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(keep, saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(saved)
    assert message.startswith(f"distilbert_fast: {file} is truncated or no safetensors file (")


def test_pickle(saved):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    file = saved / "pytorch_model.bin"
    assert refused(saved) == f"distilbert_fast: weights must be in safetensors, pickle is never loaded, got {file}"


def test_missing_file(saved):
    (saved / "model.safetensors").unlink()
    message = refused(saved, OSError)
    assert message.startswith("Error no file named model.safetensors") and str(saved) in message


@pytest.mark.parametrize("part", ["weight", "weight_scale", "bias"])
def test_missing_tensor(part, saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = f"bert.encoder.layer.1.attention.output.dense.{part}"
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    assert refused(saved) == f"distilbert_fast: {file} lacks {name}"


def test_missing_shard(tmp_path):
    quantize_model(make("BertForSequenceClassification")).save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight_scale", lambda x: x.index_fill(0, torch.tensor([3]), NAN), "finite and not negative, got nan"),
        ("weight_scale", lambda x: x.index_fill(0, torch.tensor([3]), INF), "finite and not negative, got inf"),
        ("weight_scale", lambda x: -x, "finite and not negative, got -"),
        ("weight_scale", lambda x: x[:-1], "F32 [30], got F32 [29]"),
        ("weight_scale", lambda x: x.double(), "F32 [30], got F64 [30]"),
        ("weight", lambda x: x.float(), "I8 [1, 30, 30], got F32 [1, 30, 30]"),
        ("weight", lambda x: x.view(torch.uint8), "I8 [1, 30, 30], got U8 [1, 30, 30]"),
        ("weight", lambda x: x[0], "I8 [1, 30, 30], got I8 [30, 30]"),
        ("bias", lambda x: x.int(), "F64 or F32 or BF16 or F16 [30], got I32 [30]"),
    ],
)
def test_codes_and_scales_that_cannot_be(part, change, message, saved):
    file, name = saved / "model.safetensors", f"bert.encoder.layer.1.attention.output.dense.{part}"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file, {"format": "pt"})
    assert refused(saved, FileError).startswith(f"{str(file)!r}: {name} must be {message}")


def test_bits_and_ends_of_the_weights(saved, batch):
    file = saved / "model.safetensors"
    content, kind = file.read_bytes(), transformers.BertForSequenceClassification
    want = kind.from_pretrained(saved).state_dict()

    def same(model):
        return all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())

    damages = [*flipped(content, 0, 40), *cut(content, 1, 3)]
    assert assert_refused_or_same(file, iter(damages), lambda: kind.from_pretrained(saved), same) == len(damages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": "no"}, "heads must be true or false, got 'no'"),
        ({"heads": None}, "heads must be true or false, got None"),
        (
            {"modules_to_not_convert": "lin2"},
            "modules_to_not_convert must be a list of 0 to 1048576 values, got 'lin2'",
        ),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert[0] must be a text, got 1"),
        ({"static": True}, "unexpected keyword argument 'static'"),
    ],
)
def test_a_quantization_config_that_cannot_be(changes, message, saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] |= changes
    (saved / "config.json").write_text(json.dumps(config))
    assert refused(saved, FileError) == f"{str(saved / 'config.json')!r}: quantization_config: {message}"


@pytest.mark.parametrize("size", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size"])
def test_sizes_of_no_model_are_refused_before_it_is_made(size, saved):
    config = json.loads((saved / "config.json").read_text())
    for value in (2**40, -1):
        (saved / "config.json").write_text(json.dumps(config | {size: value}))
        assert f"{str(saved / 'config.json')!r}: {size} must be " in refused(saved, FileError)


READERS = [
    ("DistilBert", transformers.AutoModelForSequenceClassification),
    ("DistilBert", transformers.DistilBertForSequenceClassification),
    ("DistilBert", distilbert_fast.DistilBertForSequenceClassification),
    ("DistilBert", distilbert_fast.DistilBertModel),
    ("Bert", transformers.BertForSequenceClassification),
    ("Bert", transformers.BertModel),
    ("Roberta", transformers.RobertaForSequenceClassification),
]
DISTILBERT_NAMES = {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "hidden_size": "dim"}
DISTILBERT_NAMES |= {"intermediate_size": "hidden_dim", "hidden_act": "activation"}


def set_config(directory, family, **changes):
    """Change config.json, under the names that the family has."""
    names = DISTILBERT_NAMES if family == "DistilBert" else {}
    config = json.loads((directory / "config.json").read_text())
    config |= {names.get(name, name): value for name, value in changes.items()}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("family", "reader"), READERS)
def test_every_class_refuses_sizes_of_no_model(family, reader, tmp_path):
    quantize_model(make(f"{family}ForSequenceClassification")).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    for size, values in {
        "num_hidden_layers": (2**40, -1),
        "hidden_size": (2**40, -30, 0, 31),
        "num_attention_heads": (2**40, 0, -3, 4),
        "intermediate_size": (2**40, -1),
        "vocab_size": (2**40, -1),
        "max_position_embeddings": (2**40, -1),
    }.items():
        for value in values:
            (tmp_path / "config.json").write_text(written)
            set_config(tmp_path, family, **{size: value})
            with pytest.raises(FileError, match=r"config\.json': \w+ must be "):
                reader.from_pretrained(tmp_path)


@pytest.mark.parametrize(("family", "reader"), READERS)
def test_every_class_refuses_sizes_of_more_weights_than_there_are(family, reader, tmp_path):
    quantize_model(make(f"{family}ForSequenceClassification")).save_pretrained(tmp_path)
    set_config(tmp_path, family, vocab_size=2**26)
    with pytest.raises(FileError, match="its sizes must be those of the") as error:
        reader.from_pretrained(tmp_path)
    assert str(error.value).startswith(repr(str(tmp_path / "config.json")))


def without_metadata(directory):
    """As an earlier version wrote it."""
    file = directory / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


OTHER_NUMBERS = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "layer_norm_eps": 1.0,
    "hidden_act": "relu",
    "pad_token_id": 5,
    "is_decoder": True,
    "model_type": "xlm-roberta",
}


@pytest.mark.parametrize("name", OTHER_NUMBERS)
@pytest.mark.parametrize(("family", "reader"), READERS)
def test_a_config_that_gives_other_numbers(name, family, reader, tmp_path):
    quantize_model(make(f"{family}ForSequenceClassification")).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    set_config(tmp_path, family, **{name: OTHER_NUMBERS[name]})
    if family == "DistilBert" and name == "layer_norm_eps":  # which it does not have
        reader.from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError) as error:
        reader.from_pretrained(tmp_path)
    called = DISTILBERT_NAMES.get(name, name) if family == "DistilBert" else name
    old = json.loads(before).get(called)
    if name != "model_type" and old is not None:  # by its type an Auto class chooses another class
        weights = tmp_path / "model.safetensors"
        message = f"{called} must be {old!r}, as {weights} was saved with, got {OTHER_NUMBERS[name]!r}"
        assert isinstance(error.value, FileError)
        assert str(error.value) == f"{str(tmp_path / 'config.json')!r}: {message}"


@pytest.mark.parametrize(("family", "reader"), READERS)
def test_what_a_user_may_change_of_a_config(family, reader, tmp_path, batch):
    quantize_model(make(f"{family}ForSequenceClassification")).save_pretrained(tmp_path)
    want = reader.from_pretrained(tmp_path).eval()
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    changes = {"problem_type": "single_label_classification", "dropout": 0.3, "hidden_dropout_prob": 0.3}
    flags = {"output_attentions": False, "output_hidden_states": True, "_attn_implementation": "eager"}
    volatile = {"transformers_version": "5.0.0", "_name_or_path": "else", "architectures": None, "mine": 1}
    set_config(tmp_path, family, **labels, **changes, **flags, **volatile)
    model = reader.from_pretrained(tmp_path).eval()
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert torch.allclose(answers(model, batch)[0], answers(want, batch)[0], rtol=0, atol=1e-5)
    model.config.save_pretrained(tmp_path)  # and what is written again says the same
    reader.from_pretrained(tmp_path)


def test_what_a_caller_asks_for_is_given(saved):
    """What comes in place of the file's own is up to whoever asks."""
    model = transformers.BertForSequenceClassification.from_pretrained(saved, layer_norm_eps=0.5, num_labels=2)
    assert model.config.layer_norm_eps == 0.5
    model.save_pretrained(saved)
    assert transformers.BertForSequenceClassification.from_pretrained(saved).config.layer_norm_eps == 0.5


@pytest.mark.parametrize(
    ("heads", "changes", "message"),
    [
        (False, {"num_hidden_layers": 1}, "encoder.layer.1."),
        (False, {"modules_to_not_convert": ["layer.1"]}, "encoder.layer.1."),
        (True, {"heads": False}, "is int8, but the model that config.json describes has no int8 layer there"),
        (False, {"layer_norm_eps": NAN}, "layer_norm_eps must be a finite number"),
        (False, {"layer_norm_eps": INF}, "layer_norm_eps must be a finite number"),
        (False, {"layer_norm_eps": 0.0}, "layer_norm_eps must be a finite number"),
        (False, {"layer_norm_eps": -1e-12}, "layer_norm_eps must be a finite number"),
    ],
)
@pytest.mark.parametrize("reader", [READERS[4][1], READERS[5][1], READERS[0][1]])
def test_a_config_beside_weights_of_an_earlier_version(heads, changes, message, reader, tmp_path):
    quantize_model(make("BertForSequenceClassification"), heads=heads).save_pretrained(tmp_path)
    without_metadata(tmp_path)
    reader.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    part = config if changes.keys() <= config.keys() else config["quantization_config"]
    part |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError) as error:
        reader.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_int8_heads_are_left_out_where_there_is_no_place_for_them(tmp_path):
    quantize_model(make("BertForSequenceClassification"), Int8Config(heads=True)).save_pretrained(tmp_path)
    transformers.BertModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["heads"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    transformers.BertForMaskedLM.from_pretrained(tmp_path)  # has no pooler, and a head of its own


def test_a_model_is_copied_and_pickled_with_its_way_to_save(tmp_path):
    model = quantize_model(make("DistilBertModel"))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin.embeddings.LayerNorm.weight.data.fill_(7)
    twin.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["embeddings.LayerNorm.weight"].eq(7).all()


def test_full_disk(tmp_path):
    """A real write error: the process may write no file beyond 20,000 bytes."""
    model = quantize_model(make("BertModel"))
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError) as error:
            model.save_pretrained(tmp_path)
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(error.value) == f"[Errno 27] File too large: {str(tmp_path / 'model.safetensors')!r}"
    assert not any((tmp_path / "new").iterdir())
    (tmp_path / "new").rmdir()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space (os error 28)")]
)
def test_a_disk_that_is_full_when_the_weights_come(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError) as caught:
        quantize_model(make("BertModel")).save_pretrained(tmp_path)
    assert str(caught.value) == f"[Errno 28] No space left on device: {str(tmp_path / 'model.safetensors')!r}"
    assert not any(tmp_path.iterdir())


def test_weights_split_in_another_way_replace_the_old_ones(tmp_path, batch):
    first, second = (quantize_model(make("BertModel")) for _ in range(2))
    second.embeddings.LayerNorm.weight.data.fill_(3)
    for sizes in ({}, {"max_shard_size": "10KB"}), ({"max_shard_size": "10KB"}, {}):
        first.save_pretrained(tmp_path, **sizes[0])
        second.save_pretrained(tmp_path, **sizes[1])
        assert_same_bits(transformers.BertModel.from_pretrained(tmp_path), second, batch)


def test_float_weights_under_an_int8_config(saved, tmp_path):
    make("BertForSequenceClassification").save_pretrained(tmp_path / "float")
    shutil.copy(tmp_path / "float" / "model.safetensors", saved / "model.safetensors")
    assert refused(saved).endswith("lacks bert.encoder.layer.0.attention.self.query.weight_scale")


def test_a_config_from_the_future(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["activations"] = "static"
    (saved / "config.json").write_text(json.dumps(config))
    assert "unexpected keyword argument 'activations'" in refused(saved, TypeError)


def test_a_model_we_do_not_know(tmp_path):
    config = transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(TypeError) as error:
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=Int8Config())
    assert str(error.value) == ("distilbert_fast: model must be a DistilBERT, BERT or RoBERTa encoder, got GPT2Model")
