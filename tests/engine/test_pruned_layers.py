"""Layers that differ in heads and in feed-forward width, down to none: what is left out costs nothing and changes
nothing in the rest.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_encoder import CLOSE, MASK, PRECISIONS, H, V, make, ragged, reference

import distilbert_fast
from distilbert_fast.engine.engine import Engine

ALL = tuple(range(H))
ODD = ((ALL, 33), ((1,), 1), ((), 70), ((0, 2), 0), ((), 0), ((2,), 7))
NONE = (((), 0), ((), 0))
NARROW_FIRST = (((), 7), ((1,), 70), ((), 0), (ALL, 33))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


@pytest.mark.covering(together=2)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("structure", [ODD, NONE, NARROW_FIRST], ids=["odd", "none", "narrow first"])
def test_every_tier_against_plain_modules(structure, tier, precision, ids, threads):
    for model in (make(structure=structure), make(structure=structure, bias=False, types=0)):
        want = reference(model, ids, MASK).detach()
        engine = Engine.from_model(model, precision)
        assert engine.packed.shape.ffn == tuple(ffn for _, ffn in structure)
        found = engine.encode(ids, MASK, hidden_states=True)
        torch.testing.assert_close(found.last, want, rtol=0, atol=CLOSE[precision])
        for n, state in enumerate(found.hidden_states):
            part = reference(model._replace(layers=model.layers[:n]), ids, MASK).detach()
            torch.testing.assert_close(state, part, rtol=0, atol=CLOSE[precision])
        rows, mask = ragged(40)
        threads(1)
        alone = engine(rows, mask)
        threads(3)
        assert torch.equal(engine(rows, mask), alone)
        padded = reference(model, rows, mask, padding=True).detach()
        torch.testing.assert_close(engine.encode(rows, mask, padding=True).last, padded, rtol=0, atol=CLOSE[precision])


@pytest.mark.covering(together=2)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("structure", [ODD, NARROW_FIRST], ids=["odd", "narrow first"])
def test_head_masks_name_heads_by_their_first_numbers(structure, tier, precision, ids):
    model, mask = make(structure=structure), torch.rand(len(structure), H)
    mask[0, 1] = mask[-1, 2] = 0
    want = reference(model, ids, MASK, head_mask=mask).detach()
    for found in (
        Engine.from_model(model, precision)(ids, MASK, head_mask=mask),
        Engine.from_model(model, precision, mask)(ids, MASK),
    ):
        torch.testing.assert_close(found, want, rtol=0, atol=CLOSE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_in_its_call(tier, precision):
    """Narrow layers meet what wider ones, and earlier calls, left in the memory that all share."""
    model = make(structure=NARROW_FIRST)
    with torch.no_grad():
        model.word.weight[3] = float("nan")
    engine, fresh = Engine.from_model(model, precision), Engine.from_model(model, precision)
    ids, bad = torch.full((3, 20), 4), torch.full((3, 20), 3)
    assert engine(bad).isnan().all()
    assert torch.equal(engine(ids), fresh(ids)) and fresh(ids).isfinite().all()


@pytest.mark.parametrize("precision", [*PRECISIONS, None])
def test_ops_compute_the_same(precision, ids):
    for structure in (ODD, NONE, NARROW_FIRST):
        model = make(structure=structure)
        want = reference(model, ids, MASK).detach()
        engine = Engine(None, model, precision, [None] * len(structure))
        close = 2 * CLOSE[precision or "fp32"]
        torch.testing.assert_close(engine(ids, MASK), want, rtol=0, atol=close)
        with distilbert_fast.backend("torch"):
            torch.testing.assert_close(engine(ids, MASK), want, rtol=0, atol=close)
            first = engine.encode(ids, MASK, rows="first").last
        torch.testing.assert_close(first[[0, 1, 3]], want[[0, 1, 3], :1], rtol=0, atol=close)


@pytest.mark.parametrize("structure", [ODD, NONE, NARROW_FIRST], ids=["odd", "none", "narrow first"])
def test_static_scales_and_files(structure, tier, tmp_path):
    model = make(structure=structure)
    batches = [dict(zip(("input_ids", "attention_mask"), ragged(8, seed), strict=True)) for seed in range(4)]
    engine = Engine.from_model(model, "int8").calibrated(batches)
    for (heads, ffn), scales in zip(structure, engine.packed.shape.scales, strict=True):
        assert (scales[0] > 0, scales[1] > 0) == (bool(heads), bool(ffn))
    ids, mask = ragged(12, 9)
    want = reference(model, ids, mask).detach()
    torch.testing.assert_close(engine(ids, mask), want, rtol=0, atol=CLOSE["int8"])
    engine.save(tmp_path / "engine")
    assert torch.equal(Engine.load(tmp_path / "engine")(ids, mask), engine(ids, mask))
    by_ops = Engine(None, model, "int8", [None] * len(structure)).calibrated(batches) if structure != NONE else engine
    torch.testing.assert_close(by_ops(ids, mask), want, rtol=0, atol=0.15)


def test_int8_modules_may_be_as_narrow(ids):
    for structure in (ODD, NARROW_FIRST):
        plain, packed = make(structure=structure), make(structure=structure, int8=True)
        assert torch.equal(Engine.from_model(plain, "int8")(ids, MASK), Engine.from_model(packed)(ids, MASK))
        torch.testing.assert_close(
            Engine.from_model(packed)(ids, MASK), reference(packed, ids, MASK), rtol=0, atol=0.08
        )


def test_what_is_left_out_takes_no_memory():
    tensors = Engine.from_model(make(structure=NONE), "int8").packed.tensors
    for name in ("qkv", "ffn_in"):
        assert tensors[f"0.{name}"].numel() == 0
    for name in ("out", "ffn_out"):  # sums, scales and biases of one panel
        assert tensors[f"0.{name}"].numel() == 3 * 32 * 4


# Files of format 1 -------------------------------------------------------------------------------------------------


def as_format_1(path, **fields):
    with safe_open(path, framework="pt") as file:
        shape = json.loads(file.metadata()["shape"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    kinds, _ = shape.pop("kinds"), shape.pop("dtype")
    shape |= {"ffn": shape["ffn"][0] if kinds else 1, "precision": kinds[0][0] if kinds else "fp32"} | fields
    save_file(tensors, path, {"format": "distilbert_fast.encoder.1", "shape": json.dumps(shape)})


@pytest.mark.parametrize("layers", [0, 2])
def test_files_of_format_1_keep_loading(layers, ids, tmp_path):
    path = tmp_path / "engine"
    engine = Engine.from_model(make(layers), "int8")
    engine.save(path)
    as_format_1(path)
    loaded = Engine.load(path)
    assert torch.equal(loaded(ids, MASK), engine(ids, MASK))
    loaded.save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "distilbert_fast.encoder.2"
    assert torch.equal(Engine.load(path)(ids, MASK), engine(ids, MASK))


@pytest.mark.parametrize("ffn", [0, 70, 2**40, [37, 37], None])
def test_damaged_files_of_format_1(ffn, tmp_path):
    path = tmp_path / "engine"
    Engine.from_model(make(), "int8").save(path)
    as_format_1(path, ffn=ffn)
    with pytest.raises(ValueError, match=f"^engine: .*{path}"):
        Engine.load(path)
