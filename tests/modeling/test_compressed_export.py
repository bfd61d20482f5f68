"""Compressed models that are exported, traced or compiled: right for other batches than those seen.

What the model itself computes is the oracle.
"""

from __future__ import annotations

import pytest
import torch
from compressed_models import BATCH, FAMILIES, FORMATS, made

from distilbert_fast import optimize

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the exporters, about what transformers does
    pytest.mark.covering,  # an export takes seconds
]
HEAD = "ForSequenceClassification"
NAMES = list(BATCH)
DYNAMIC = {name: {0: "batch", 1: "length"} for name in NAMES}


def batch(lengths, longest=None):
    torch.manual_seed(len(lengths))
    mask = (torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(2, 97, mask.shape), "attention_mask": mask}


BATCHES = [batch((9, 4, 1, 6)), batch((12, 5)), batch((1,) * 4), batch((7, 7)), batch((3, 2), 11)]


@torch.no_grad()
def check(call, model):
    expected = [model(**given).logits for given in BATCHES]
    for given, logits in zip(BATCHES, expected, strict=True):
        torch.testing.assert_close(call(given), logits, atol=1e-6, rtol=1e-4)


def to_onnx(model, dynamo, file):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model.config.return_dict = False
    given = {"dynamo": dynamo, "input_names": NAMES, "output_names": ["logits"]}
    if dynamo:
        torch.onnx.export(model, (), file, kwargs=BATCH, dynamic_shapes=DYNAMIC, verbose=False, **given)
    else:
        torch.onnx.export(model, (BATCH,), file, dynamic_axes=DYNAMIC, **given)
    model.config.return_dict = True
    session = onnxruntime.InferenceSession(file)
    return lambda given: torch.from_numpy(session.run(None, {name: x.numpy() for name, x in given.items()})[0])


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_pruned_models(family, dynamo, tmp_path):
    model = FORMATS["pruned"](made(family, HEAD))
    check(to_onnx(model, dynamo, tmp_path / "model.onnx"), model)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_of_a_sparse_and_pruned_model_on_the_engine(dynamo, tmp_path):
    model, same = (FORMATS["pruned and sparse"](made("Bert", HEAD)) for _ in range(2))
    keys = set(model.state_dict())
    check(to_onnx(optimize(model), dynamo, tmp_path / "model.onnx"), same)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["int8", "codebook 16"])
def test_onnx_knows_no_codes(name, tmp_path):
    model = FORMATS[name](made("Bert", HEAD))
    op = "dynamic_int8_linear" if name == "int8" else "codebook_linear"
    with pytest.raises(Exception, match=rf"distilbert_fast::{op}"):
        to_onnx(model, False, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def exported(model):
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=23)}
    program = torch.export.export(model, tuple(BATCH.values()), dynamic_shapes=(dynamic, dynamic), strict=False)
    return lambda given: program.module()(*given.values())["logits"]


def compiled(model):
    call = torch.compile(model, fullgraph=True, backend="eager")
    return lambda given: call(**given).logits


@torch.no_grad()
def traced(model):
    model.config.return_dict = False
    call = torch.jit.trace(model, tuple(BATCH.values()))
    model.config.return_dict = True
    return lambda given: call(*given.values())[0]


HOW = {"export": exported, "compile": compiled, "trace": traced}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("how", HOW)
def test_torchs_own_exporters(how, name, family):
    model = FORMATS[name](made(family, HEAD))
    check(HOW[how](model), model)
