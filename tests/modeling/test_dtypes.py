"""Weights of every dtype, and of several, in every precision: computed as transformers does, or refused at the call."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from modeling.test_encoders import inputs, make
from modeling.test_optimize import calls, expect  # noqa: F401  (a fixture)

from distilbert_fast import optimize, pack_encoder, quantize_model

CALLS = {
    "optimize": lambda model, precision: optimize(model, precision),
    "pack_encoder": lambda model, precision: pack_encoder(model, precision),
    "quantize_model": lambda model, precision: quantize_model(model) if precision == "int8" else model,
    "optimize quantized": lambda model, precision: optimize(quantize_model(model), precision),
}


def tolerance(precision, dtype):
    return max({"int8": 0.04, "bf16": 0.02, "fp16": 0.01}.get(precision, 1e-5), 0.02 if "16" in dtype else 0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("norms", ["as the model", "float32"])
def test_every_precision_of_every_dtype_runs_or_is_refused_at_the_call(call, precision, dtype, norms):
    theirs = make("bert").to(getattr(torch, dtype))
    if norms == "float32":
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
    batch, real = inputs(theirs), inputs(theirs)["attention_mask"].bool()
    refused = None
    if dtype == "float64" and norms == "float32" and not (precision == "int8" or "quant" in call):
        refused = "dtype of embeddings.LayerNorm.weight must be float64, as that of the word embeddings, got float32"
    if dtype == "float64" and (precision == "int8" or call == "optimize quantized"):
        refused = "model.dtype must be float32 or bfloat16 or float16 for int8, got float64"
    if "quantized" in call and dtype != "float64" and precision not in (None, "int8"):
        refused = "precision must be 'int8' or None for a model that holds int8 weights"
    if call == "quantize_model" and precision != "int8":
        return
    if refused is not None:
        with pytest.raises((TypeError, ValueError)) as error:
            CALLS[call](copy.deepcopy(theirs), precision)
        assert refused in str(error.value)
        return
    made = CALLS[call](copy.deepcopy(theirs), precision)
    with torch.no_grad():
        wanted = make("bert").double()(**batch).last_hidden_state[real]
        assert theirs(**batch).last_hidden_state.dtype == getattr(torch, dtype)  # transformers runs it
        got = made(**batch)
    got = (got if isinstance(got, torch.Tensor) else got.last_hidden_state)[real]
    assert got.dtype == getattr(torch, dtype)
    share = tolerance("int8" if "quantize" in call else precision, dtype)
    assert (got - wanted).norm() <= share * wanted.norm()


MIXED = {
    "one layer": ("encoder.layer.1", torch.bfloat16, "encoder.layer.1.attention.self.query.weight"),
    "the layers": ("encoder", torch.float16, "encoder.layer.0.attention.self.query.weight"),
    "in float64": ("encoder", torch.float64, "encoder.layer.0.attention.self.query.weight"),
    "a norm": ("encoder.layer.0.output.LayerNorm", torch.float64, "encoder.layer.0.output.LayerNorm.weight"),
    "a norm below": ("encoder.layer.0.output.LayerNorm", torch.float16, "encoder.layer.0.output.LayerNorm.weight"),
    "a table": ("embeddings.position_embeddings", torch.bfloat16, "embeddings.position_embeddings.weight"),
    "the pooler": ("pooler", torch.bfloat16, "pooler.dense.weight"),
}


@pytest.mark.parametrize("call", ["optimize", "pack_encoder", "quantize_model"])
@pytest.mark.parametrize("case", MIXED)
def test_mixed_dtypes_are_refused_at_the_call(call, case):
    name, dtype, tensor = MIXED[case]
    model = make("bert")
    model.get_submodule(name).to(dtype)
    kind = type(model)
    for precision in [None, "fp32", "bf16", "fp16", "int8"] if call != "quantize_model" else ["int8"]:
        with pytest.raises(TypeError) as error:
            CALLS[call](model, precision)
        expected = f"dtype of {tensor} must be float32, as that of the word embeddings, got {str(dtype)[6:]}"
        assert str(error.value) == f"{call}: {expected}"
    assert type(model) is kind and type(model.encoder.layer[0].output.dense) is torch.nn.Linear


def test_other_weights_are_refused_by_name():
    model = make("bert")
    model.encoder.layer[0].output.dense.weight = torch.nn.Parameter(
        model.encoder.layer[0].output.dense.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    for precision in (None, "int8"):
        with pytest.raises(TypeError, match=r"output\.dense\.weight must be float32, .*, got float8_e4m3fn$"):
            optimize(model, precision)
    with pytest.raises(ValueError, match=r"^pack_encoder: model weights must be on one device, got meta$"):
        pack_encoder(make("bert").to("meta"))


def test_int8_files_are_not_read_as_float64(tmp_path):
    quantize_model(make("bert")).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model\.dtype must be float32 or bfloat16 or float16 for int8, got float64$"):
        transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64)


def test_an_int8_engine_steps_aside_for_a_model_cast_to_float64(calls):  # noqa: F811
    model = optimize(make("bert"), "int8").double()
    batch = inputs(model)
    with torch.no_grad(), expect(calls, 0):
        torch.testing.assert_close(model(**batch), make("bert").double()(**batch), rtol=0, atol=0)


def test_a_tensor_that_torch_negates_when_it_reads_it():
    model = make("bert")
    weight = model.encoder.layer[0].output.dense.weight
    weight.data = torch._neg_view(weight.data)
    with pytest.raises(ValueError, match=r"output.dense.weight must be a tensor without torch's negative bit"):
        optimize(model)
