"""Encoders whose linear layers, and tables, are of different kinds: in the C++ encoder, by ops, in files."""

from __future__ import annotations

import pytest
import torch
from tiny_encoder import CLOSE, MASK, C, V, make, ragged, reference
from torch import nn

import distilbert_fast
from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.engine.engine import Engine
from distilbert_fast.engine.native_encoder import PackedEncoder
from distilbert_fast.layers import Int8Linear

QKV, OTHERS = ("query", "key", "value"), ("out", "ffn_in", "ffn_out")
# Which linear layers are int8, layer by layer.
MIXTURES = {
    "projections": (QKV, QKV),
    "all but one": ((*QKV, "out", "ffn_in"), (*QKV, *OTHERS)),
    "one": ((), ("ffn_out",)),
    "one layer": ((*QKV, *OTHERS), ()),
    "alternating": ((*QKV, "ffn_in"), OTHERS[::2]),
}


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


def mixed(which, dtype=torch.float32, tables=False, **sizes):
    """A tiny encoder with these layers int8, and its tables if asked for."""
    model = make(**sizes)
    for part in (*model[:4], *(part for layer in model.layers for part in layer[:8])):
        if part is not None:
            part.to(dtype)
    layers = [
        layer._replace(**{name: Int8Linear.from_linear(getattr(layer, name)) for name in names})
        for layer, names in zip(model.layers, which, strict=True)
    ]
    return with_tables(model._replace(layers=layers)) if tables else model._replace(layers=layers)


def with_tables(model):
    tables = {name: getattr(model, name) for name in ("word", "position", "token_type")}
    return model._replace(**{n: Int8Embedding.from_embedding(t) for n, t in tables.items() if t is not None})


@pytest.mark.parametrize("name", MIXTURES)
def test_every_tier_against_the_float_model(tier, name, ids):
    want = reference(make(), ids, MASK).detach()
    for tables in (False, True):
        engine = Engine.from_model(mixed(MIXTURES[name], tables=tables))
        kinds = [kind for layer in engine.packed.shape.kinds for kind in layer]
        assert set(kinds) == {"int8", "fp32"} and engine.is_native
        torch.testing.assert_close(engine(ids, MASK), want, rtol=0, atol=CLOSE["int8"])


@pytest.mark.parametrize("name", MIXTURES)
def test_bfloat16_models(tier, name, ids):
    want = reference(make(), ids, MASK).detach()
    engine = Engine.from_model(mixed(MIXTURES[name], torch.bfloat16, tables=True))
    assert {kind for layer in engine.packed.shape.kinds for kind in layer} == {"int8", "bf16"}
    found = engine(ids, MASK)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), want, rtol=0, atol=CLOSE["bf16"] + CLOSE["int8"])


@pytest.mark.parametrize("name", MIXTURES)
def test_ops_compute_the_same(name, ids):
    engine = Engine.from_model(mixed(MIXTURES[name], tables=True))
    native = engine.encode(ids, MASK, hidden_states=True).hidden_states
    with distilbert_fast.backend("torch"):
        ops = engine.encode(ids, MASK, hidden_states=True).hidden_states
    for a, b in zip(native, ops, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)  # a rounding apart, and so now and then a code
    torch.testing.assert_close(native[0], ops[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_same_bits_however_it_is_run_and_from_a_file(tier, name, tmp_path):
    engine = Engine.from_model(mixed(MIXTURES[name], tables=True))
    ids, mask = ragged(40)
    want = engine(ids, mask)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(engine(ids, mask), want)
    torch.set_num_threads(before)
    for b in (0, 7, 39):
        assert torch.equal(engine(ids[b : b + 1], mask[b : b + 1])[0], want[b])
    engine.save(tmp_path / "engine.safetensors")
    loaded = Engine.load(tmp_path / "engine.safetensors")
    assert torch.equal(loaded(ids, mask), want) and loaded.packed.shape == engine.packed.shape
    head_mask = torch.tensor([0.0, 1.0, 0.5])
    masked = engine(ids, mask, head_mask=head_mask)
    assert torch.equal(loaded(ids, mask, head_mask=head_mask), masked) and not torch.equal(masked, want)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_left_in_the_buffers_changes_nothing(tier, name):
    """Rows of a call that found NaN are followed by clean ones, of layers that keep them in another form."""
    model = mixed(MIXTURES[name])
    engine = Engine.from_model(model)
    ids, mask = ragged(8)
    want = engine(ids, mask)
    with torch.no_grad():
        row = model.word.weight[3].clone()
        model.word.weight[3] = float("nan")  # the engine reads the table of the model
    assert engine(torch.full_like(ids, 3), mask)[mask != 0].isnan().all()
    with torch.no_grad():
        model.word.weight[3] = row
    assert torch.equal(engine(ids, mask), want)


@pytest.mark.parametrize("name", MIXTURES)
def test_calibrated(tier, name):
    which = MIXTURES[name]
    batches = [dict(zip(("input_ids", "attention_mask"), ragged(8, seed), strict=True)) for seed in range(3)]
    static = Engine.from_model(mixed(which)).calibrated(batches)
    ids, mask = ragged(12, 9)
    torch.testing.assert_close(static(ids, mask), reference(make(), ids, mask).detach(), rtol=0, atol=CLOSE["int8"])
    found = [tuple(scale > 0 for scale in scales) for scales in static.packed.shape.scales]
    assert found == [("out" in names, "ffn_out" in names) for names in which]


def test_projections_of_two_kinds_are_refused():
    with pytest.raises(ValueError) as error:
        Engine.from_model(mixed((("query",), ())))
    assert str(error.value) == (
        "engine: query, key and value of a layer must be all int8 or all float, with or without bias, got both"
    )


# Tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [0, 2])
@pytest.mark.parametrize("layers", [0, 2])
def test_int8_tables_are_their_dequantized_selves(tier, types, layers, ids):
    model = with_tables(make(layers=layers, types=types))
    floats = model._replace(
        **{
            name: nn.Embedding.from_pretrained(getattr(model, name).dequantized())
            for name in ("word", "position", *(["token_type"] if types else []))
        }
    )
    given = (ids, MASK, torch.randint(0, 2, MASK.shape) if types else None, torch.randint(0, 20, MASK.shape))
    found, want = Engine.from_model(model)(*given), Engine.from_model(floats)(*given)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5)


def test_ids_outside_int8_tables_are_refused():
    engine = Engine.from_model(with_tables(make()))
    for given, name in (((torch.full((1, 2), V),), "input_ids"), ((torch.full((1, 2), -1),), "input_ids")):
        with pytest.raises(ValueError, match=rf"^engine: {name} must be in \[0, {V}\), got"):
            engine(*given)
    with pytest.raises(ValueError, match=r"^engine: token_type_ids must be in \[0, 2\), got 2"):
        engine(torch.ones(1, 2, dtype=torch.int64), None, torch.full((1, 2), 2))


def test_some_tables_alone_are_left_to_ops(ids):
    model = make()
    engine = Engine.from_model(model._replace(word=Int8Embedding.from_embedding(model.word)))
    assert engine.packed is None
    torch.testing.assert_close(engine(ids, MASK), reference(model, ids, MASK).detach(), rtol=0, atol=0.05)


def test_parts_that_do_not_fit_are_refused():
    packed = Engine.from_model(with_tables(make())).packed
    with pytest.raises(ValueError, match=r"^engine: word.scale must be of shape \[50\], got \[49\]"):
        PackedEncoder(packed.shape, packed.tensors | {"word.scale": torch.ones(V - 1)})
    with pytest.raises(ValueError, match=r"^engine: tables must all have scales, or none, got some"):
        floats = {"position": torch.zeros(20, C)}
        held = {name: x for name, x in packed.tensors.items() if name != "position.scale"}
        PackedEncoder(packed.shape, held | floats)
