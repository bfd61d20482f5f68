"""The packed encoder against the same modules in plain torch; no transformers here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_encoder import MASK, C, D, P, V, make, reference

from distilbert_fast import backend
from distilbert_fast.engine import op_encoder as module
from distilbert_fast.engine.engine import PRECISIONS, Engine


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


@torch.no_grad()
def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected.detach(), **tolerance or dict(rtol=1e-4, atol=1e-5))


# What it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.float() * 3, torch.zeros_like(MASK)])
@pytest.mark.parametrize("bias", [True, False])
def test_against_plain_torch(mask, bias, ids):
    model = make(bias=bias)
    same(Engine.from_model(model)(ids, mask), reference(model, ids, mask))


def test_token_types_and_positions(ids):
    model = make()
    engine = Engine.from_model(model)
    types, positions = torch.randint(0, 2, ids.shape), torch.randint(0, P, ids.shape)
    same(engine(ids, MASK, types, positions), reference(model, ids, MASK, types, positions))
    same(
        engine(ids, MASK, types[:1], positions[:1]), reference(model, ids, MASK, types[:1].expand(4, -1), positions[:1])
    )
    same(engine(ids.int(), MASK, types.int(), positions.int()), reference(model, ids, MASK, types, positions))
    without = make(types=0)
    same(Engine.from_model(without)(ids, MASK), reference(without, ids, MASK))


def test_positions_of_roberta(ids):
    model = make(padding_idx=1)
    ids[ids == 1] = 9
    ids[0, 4:], ids[3, 2] = 1, 1
    positions = torch.tensor([[2, 3, 4, 5, 1, 1], [2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7], [2, 3, 1, 4, 5, 6]])
    same(Engine.from_model(model)(ids, MASK), reference(model, ids, MASK, positions=positions))


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (1, 1), (2, 1)])
def test_small_and_empty_batches(shape):
    model = make()
    ids = torch.full(shape, 3)
    for precision in (None, "bf16", "int8"):
        engine = Engine.from_model(model, precision)
        for mask in (None, torch.ones(shape)):
            assert engine(ids, mask).shape == (*shape, C)
    same(Engine.from_model(model)(ids), reference(model, ids))


def test_no_layers(ids):
    model = make(layers=0)
    for precision in (None, "bf16", "int8"):
        same(Engine.from_model(model, precision)(ids, MASK), reference(model, ids, MASK), rtol=0, atol=0.02)


def test_hidden_states(ids):
    model = make()
    encoded = Engine.from_model(model).encode(ids, MASK, hidden_states=True)
    assert encoded.hidden_states[2] is encoded.last and len(encoded.hidden_states) == 3
    for n, state in enumerate(encoded.hidden_states):
        same(state, reference(model._replace(layers=model.layers[:n]), ids, MASK))
    assert Engine.from_model(model).encode(ids, MASK).hidden_states == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16"])
def test_precisions(dtype, precision, ids):
    model = make(dtype=dtype)
    found = Engine.from_model(model, precision)(ids, MASK)
    assert found.dtype == dtype
    for part in (*model[:4], *(part for layer in model.layers for part in layer[:-1])):
        part.double()
    computed = {dtype, PRECISIONS.get(precision)}
    bound = 0.1 if torch.bfloat16 in computed else 0.02 if torch.float16 in computed else 1e-5
    same(found.double(), reference(model, ids, MASK), rtol=0, atol=bound)


def test_int8_is_what_int8_layers_compute(ids):
    plain, packed = make(), make(int8=True)
    expected = reference(packed, ids, MASK)
    same(Engine.from_model(packed)(ids, MASK), expected, rtol=0, atol=0.05)
    assert torch.equal(Engine.from_model(plain, "int8")(ids, MASK), Engine.from_model(packed)(ids, MASK))
    assert torch.equal(Engine.from_model(packed, "int8")(ids, MASK), Engine.from_model(packed)(ids, MASK))
    cosine = torch.cosine_similarity(expected[MASK.bool()], reference(plain, ids, MASK)[MASK.bool()], dim=-1)
    assert cosine.min() > 0.99


def test_same_bits_every_time_and_inputs_unchanged(ids):
    for precision in (None, "bf16", "int8"):
        engine = Engine.from_model(make(), precision)
        before, mask = ids.clone(), MASK.clone()
        first = engine(ids, mask)
        assert all(torch.equal(engine(ids, mask), first) for _ in range(20))
        assert torch.equal(ids, before) and torch.equal(mask, MASK)


def test_a_sequence_does_not_see_its_neighbours(ids):
    engine = Engine.from_model(make())
    whole = engine(ids, MASK)
    for b in (0, 1, 3):
        same(whole[b : b + 1], engine(ids[b : b + 1], MASK[b : b + 1]))
    other = torch.where(MASK == 1, ids, 7)  # what stands at padding is nobody's business
    assert torch.equal(whole, engine(other, MASK))


def op_engine(model, precision=None):
    """Run by ops also where the C++ encoder could."""
    return Engine(None, model, precision, [None] * len(model.layers))


@pytest.mark.parametrize("ops", [False, True], ids=["packed", "ops"])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_first_rows(precision, layers, ops, ids):
    model = make(layers=layers)
    engine = (op_engine if ops else Engine.from_model)(model, precision)
    for mask in (None, MASK):
        found = engine.encode(ids, mask, rows="first").last
        assert found.shape == (4, 1, C)
        same(found[:, 0], engine(ids, mask)[:, 0])  # every sequence of MASK begins with a token or has none
    behind = torch.tensor([[0, 1, 1, 0, 0, 0]]).expand_as(ids)
    same(engine.encode(ids, behind, rows="first").last[:, 0], engine(ids, behind)[:, 1])
    assert engine.encode(ids[:0], rows="first").last.shape == (0, 1, C)
    assert engine.encode(ids, torch.zeros_like(ids), rows="first").last.eq(0).all()


def test_first_rows_of_heads_left_out(ids):
    head_mask = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    for engine in (Engine.from_model(make(), head_mask=head_mask), Engine.from_model(make(), "fp16", head_mask)):
        same(engine.encode(ids, MASK, rows="first").last[:, 0], engine(ids, MASK)[:, 0], rtol=1e-3, atol=1e-3)


def test_behind_the_last_attention_only_first_rows_are_computed(ids, monkeypatch):
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *a: (rows.append(x.shape[0]), linear(x, *a))[1])
    op_engine(make()).encode(ids, rows="first")
    assert rows == [24, 24, 24, 24, 24, 4, 4, 4]  # QKV, out and both of the FFN; twice


def test_the_number_of_tokens_may_be_given(ids):
    engine = op_engine(make())
    assert torch.equal(engine.encode(ids, MASK, num_tokens=int(MASK.sum())).last, engine(ids, MASK))


@pytest.mark.parametrize("int8", [False, True])
def test_static_scales_of_ops(int8, ids):
    model = make(int8=int8)
    engine = op_engine(model, "int8")
    batches = [{"input_ids": torch.randint(0, V, (8, 20))}, {"input_ids": ids, "attention_mask": MASK}]
    static = engine.calibrated(batches)
    for layer in static.layers:
        assert layer.context_scale.shape == layer.gelu_scale.shape == () and layer.gelu_scale > 0
    assert all(layer.context_scale is None for layer in engine.layers)
    found = static(ids, MASK)
    assert not torch.equal(found, engine(ids, MASK))
    same(found, engine(ids, MASK), rtol=0, atol=0.1)
    assert torch.equal(static.calibrated(batches)(ids, MASK), found)
    largest = torch.zeros(2, 2)
    with torch.no_grad():
        for batch in batches:
            engine._run_ops(**batch, largest=largest)
    scales = torch.tensor([[layer.context_scale, layer.gelu_scale] for layer in static.layers])
    same(scales * 127, largest, rtol=1e-6, atol=0)


def test_static_scales_of_ops_without_heads(ids):
    model = make()
    engine = Engine(None, model, "int8", [torch.zeros(3), None])
    static = engine.calibrated([{"input_ids": ids}])
    same(static(ids), engine(ids), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("precision", "batches", "message"),
    [
        (None, [], "model must be an int8 one, not from a file, to be calibrated, got another"),
        ("int8", [], "calibration must be at least one batch with a token, got none"),
    ],
)
def test_calibration_of_ops_refuses(precision, batches, message):
    with pytest.raises(ValueError) as error:
        op_engine(make(), precision).calibrated(batches)
    assert str(error.value) == f"engine: {message}"


# Head masks ----------------------------------------------------------------------------------------------------

HEAD_MASKS = [
    torch.tensor([1.0, 0.0, 1.0]),
    torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.5, 0.0]]),
    torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
    torch.tensor([True, False, False]),
]


@pytest.mark.parametrize("head_mask", HEAD_MASKS)
def test_head_masks(head_mask, ids):
    model = make()
    expected = reference(model, ids, MASK, head_mask=head_mask.float())
    same(Engine.from_model(model)(ids, MASK, head_mask=head_mask), expected)
    same(Engine.from_model(model, head_mask=head_mask)(ids, MASK), expected)
    squared = reference(model, ids, MASK, head_mask=head_mask.float() ** 2)
    same(Engine.from_model(model, head_mask=head_mask)(ids, MASK, head_mask=head_mask), squared)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_head_masks_in_other_precisions(precision, ids):
    for head_mask in HEAD_MASKS:
        fixed = Engine.from_model(make(), precision, head_mask)(ids, MASK)
        passed = Engine.from_model(make(), precision)(ids, MASK, head_mask=head_mask)
        same(fixed, passed, rtol=0, atol=0.05)


def test_masked_heads_are_left_out_of_the_weights():
    engine = Engine.from_model(make(), head_mask=torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))
    first, second = engine.layers
    assert first.heads == (1, 2) and second.heads == ()
    assert first.qkv.weight.shape == (3 * 2 * D, C) and first.qkv.bias.shape == (3 * 2 * D,)
    assert first.out.weight.shape == (C, 2 * D) and second.out.weight.shape == (C, 0)
    assert first.mask.tolist() == [1.0, 0.5]
    assert Engine.from_model(make(), head_mask=torch.tensor([0, 1, 1])).layers[0].mask is None


# What it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "int8"])
def test_only_real_tokens_are_computed(precision, ids, monkeypatch):
    rows = set()
    ops = ("attention", "layer_norm", "layer_norm_quantize", "embedding", "embedding_quantize", "int8_linear")
    for name in ops:
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *a, op=op, **k: (rows.add(x.shape[0]), op(x, *a, **k))[1])
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *a: (rows.add(x.shape[0]), linear(x, *a))[1])
    with backend("torch"):
        Engine.from_model(make(), precision)(ids, MASK)
    assert rows == {int(MASK.sum())}


def test_weights_are_shared_where_nothing_needs_packing():
    model = make()
    engine = Engine.from_model(model)
    layer, packed = model.layers[0], engine.layers[0]
    pairs = [
        (engine.word, model.word.weight),
        (engine.position, model.position.weight),
        (engine.token_type, model.token_type.weight),
        (packed.out.weight, layer.out.weight),
        (packed.ffn_in.weight, layer.ffn_in.weight),
        (packed.ffn_out.bias, layer.ffn_out.bias),
        (packed.ffn_norm.weight, layer.ffn_norm.weight),
    ]
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)
    assert torch.equal(packed.qkv.weight, torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
    int8 = make(int8=True)
    packed = Engine.from_model(int8).layers[0]
    assert packed.ffn_in.weight.data_ptr() == int8.layers[0].ffn_in.weight.data_ptr()


def test_works_without_transformers():
    code = "import sys; import distilbert_fast.engine.engine; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


# Refusals ------------------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    "ids": (lambda e: e(IDS[0]), "input_ids must be of shape [B, T], got [3]"),
    "dtype": (lambda e: e(IDS.float()), "input_ids must be int64 or int32, got float32"),
    "length": (lambda e: e(IDS.expand(7, 2, 3).reshape(2, 21)), "input_ids must be at most 20 tokens long, got 21"),
    "mask": (lambda e: e(IDS, torch.ones(2, 4)), "attention_mask must be of shape [2, 3], got [2, 4]"),
    "no mask": (lambda e: e(IDS, [[1, 1, 1]] * 2), "attention_mask must be a tensor, got list"),
    "types": (lambda e: e(IDS, None, IDS[:, :2]), "token_type_ids must be of shape [B, 3], got [2, 2]"),
    "batch": (lambda e: e(IDS, None, None, IDS.repeat(2, 1)), "position_ids must be of shape [2 or 1, 3], got [4, 3]"),
    "head mask": (
        lambda e: e(IDS, head_mask=torch.ones(4)),
        "head_mask must be of shape [3] or [2, 3], got [4]",
    ),
    "head list": (lambda e: e(IDS, head_mask=[1, 0, 1]), "head_mask must be a tensor, got list"),
    "no types": (
        lambda e: Engine.from_model(make(types=0))(IDS, None, IDS),
        "token_type_ids must be None, this model has no token types, got a tensor",
    ),
    "rows": (lambda e: e.encode(IDS, rows="last"), "rows must be one of 'all', 'first', got 'last'"),
    "states of first rows": (
        lambda e: e.encode(IDS, hidden_states=True, rows="first"),
        "hidden_states must be False where only the first rows are wanted, got True",
    ),
    "precision": (
        lambda e: Engine.from_model(make(), "int4"),
        "precision must be one of 'fp32', 'bf16', 'fp16', 'int8', got 'int4'",
    ),
    "int8 as float": (
        lambda e: Engine.from_model(make(int8=True), "fp32"),
        "precision must be 'int8' or None for a model that holds int8 weights, got 'fp32'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError)) as error:
        call(Engine.from_model(make()))
    assert str(error.value) == f"engine: {message}"


@pytest.mark.parametrize("bad", [V, -1])
def test_ids_outside_the_vocabulary(bad):
    engine = Engine.from_model(make())
    for given in ({"input_ids": torch.full((2, 3), bad)}, {"input_ids": IDS, "position_ids": torch.full((2, 3), bad)}):
        with pytest.raises(ValueError, match=r"^(engine|embedding): (input_ids|position_ids) must be "):
            engine(**given)
