"""Layers of 16 values in the C++ encoder: 4 bits a weight, and the numbers of their int8 weights."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from mutations import assert_refused_or_same, cut, edited, flipped
from packed import metadata_of, rewrite
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import nn

import distilbert_fast
from distilbert_fast import CodebookConfig, Engine, optimize, pack_encoder, quantize_model
from distilbert_fast.engine.weights import _coded_weights, has_tables, layer_weights, looked_up
from distilbert_fast.files.durable import FileError
from distilbert_fast.layers import CodebookLinear, Int8Linear
from distilbert_fast.modeling.encoder import encoder_modules
from distilbert_fast.modeling.structure import LayerStructure, restructure
from distilbert_fast.ops.codebook_linear import pack_codes

SIZES = dict(num_attention_heads=4, hidden_size=128, intermediate_size=192, max_position_embeddings=60)
MASK = (torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]).long()
IDS = torch.randint(2, 97, (4, 9), generator=torch.Generator().manual_seed(1))
ALL = ("codebook16",) * 4


def make(config=None, kind=transformers.BertModel, **changes):
    config = CodebookConfig(16, "group", 16) if config is None else config
    return quantize_model(tiny(kind, **SIZES | changes), config)


def as_int8(model):
    """The same with int8 layers that hold the int8 weights of these values."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if has_tables(child):
                coded = _coded_weights(child)
                made = Int8Linear(child.in_features, child.out_features)
                made.weight = nn.Parameter(looked_up(coded)[None], requires_grad=False)
                made.weight_scale, made.bias = coded.scale, child.bias
                setattr(module, name, made)
    return model


def engine_of(model, precision=None, **arguments):
    return pack_encoder(model, precision, **arguments)


def kinds(engine):
    return {kind for layer in engine.packed.shape.kinds for kind in layer}


@pytest.mark.parametrize("precision", [None, "int8"])
def test_every_tier_gives_the_bits_of_the_int8_weights(tier, precision):
    engine, expected = engine_of(make(), precision), engine_of(as_int8(make()))
    assert kinds(engine) == {"codebook16"} and kinds(expected) == {"int8"}
    assert engine.packed.shape.precision == "codebook16"
    masks = (None, torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]))
    for rows in (slice(2, 3), slice(1, 2), slice(0, 4)):
        for mask in masks:
            found, want = (e(IDS[rows], MASK[rows], head_mask=mask) for e in (engine, expected))
            assert torch.equal(found, want)
    ids = torch.randint(2, 97, (9, 60), generator=torch.Generator().manual_seed(2))  # many rows; AVX2 has matches now
    for _ in range(2):
        assert torch.equal(engine(ids), expected(ids))


def test_beside_transformers(tier):
    """As near to the model of these values in floats as int8 is to its own."""
    model = make().eval()
    with torch.no_grad():
        want = model(IDS, MASK).last_hidden_state
    found = engine_of(model)(IDS, MASK)
    real = MASK.bool()
    torch.testing.assert_close(found[real], want[real], rtol=0, atol=0.08)


@pytest.mark.parametrize("granularity", [("tensor", None), ("group", 4), ("group", 16), ("group", 128)])
def test_granularities_whose_strips_of_four_rows_share_values(granularity):
    assert kinds(engine_of(make(CodebookConfig(16, *granularity)))) == {"codebook16"}


@pytest.mark.parametrize(
    "config", [CodebookConfig(16, "row"), CodebookConfig(16, "group", 6), CodebookConfig(64), CodebookConfig(256)]
)
def test_others_are_int8(config):
    assert kinds(engine_of(make(config))) == {"int8"}


def test_depths_that_are_no_whole_blocks_are_int8():
    engine = engine_of(make(intermediate_size=100))
    assert engine.packed.shape.kinds == (("codebook16", "codebook16", "codebook16", "int8"),) * 2
    expected = engine_of(as_int8(make(intermediate_size=100)))
    assert torch.equal(engine(IDS, MASK), expected(IDS, MASK))


def test_of_unlike_projections_all_three_are_int8():
    model = make()
    model.encoder.layer[0].attention.self.key = Int8Linear.from_linear(nn.Linear(128, 128))
    assert engine_of(model).packed.shape.kinds == (("int8", *ALL[1:]), ALL)


@pytest.mark.parametrize("mask", [[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 0.0], [0.0] * 4])
def test_heads_that_leave_the_weights(mask):
    mask = torch.tensor(mask)
    engine = engine_of(make(), head_mask=mask)
    depth = 32 * int(mask.count_nonzero())
    assert engine.packed.shape.kinds[0][1] == ("codebook16" if depth % 64 == 0 else "int8")
    torch.testing.assert_close(engine(IDS, MASK), engine_of(make())(IDS, MASK, head_mask=mask), rtol=0, atol=1e-5)


def test_ops_compute_the_same_numbers():
    engine = engine_of(make())
    native = engine(IDS, MASK)
    with distilbert_fast.backend("torch"):
        torch.testing.assert_close(engine(IDS, MASK), native, rtol=0, atol=0.02)
        assert torch.equal(engine(IDS, MASK), engine_of(as_int8(make()))(IDS, MASK))


def test_pruned_layers():
    model = tiny(transformers.BertModel, **SIZES)
    restructure(model, [LayerStructure((0, 3), 64), LayerStructure((), 0)])
    engine = engine_of(quantize_model(model, CodebookConfig(16, "group", 16)))
    assert kinds(engine) == {"codebook16"}
    with distilbert_fast.backend("torch"):
        want = engine(IDS, MASK)
    torch.testing.assert_close(engine(IDS, MASK), want, rtol=0, atol=0.02)


def test_calibrated_the_last_layer_of_the_feed_forward_is_int8():
    batches = [{"input_ids": IDS, "attention_mask": MASK}]
    found, expected = (engine_of(model, calibration=batches) for model in (make(), as_int8(make())))
    assert found.packed.shape.kinds == ((*ALL[:3], "int8"),) * 2
    assert found.packed.shape.scales[0][0] > 0
    # Of ffn_out the floats of the values are quantized, not their int8 ones.
    torch.testing.assert_close(found(IDS, MASK), expected(IDS, MASK), rtol=0, atol=0.03)


def test_optimize_says_so_and_sees_new_values():
    model = optimize(make())
    assert str(distilbert_fast.explain(model)).startswith("engine: codebook16 by the C++ encoder on cpu\n")
    with torch.no_grad():
        before = model(IDS, MASK).last_hidden_state
        model.encoder.layer[1].output.dense.values.mul_(1.5)
        after = model(IDS, MASK).last_hidden_state
    assert not torch.equal(before, after)
    assert torch.equal(after, engine_of(model)(IDS, MASK))


def test_a_model_of_half_precision():
    model = make().bfloat16()
    found = engine_of(model)(IDS, MASK)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), engine_of(make())(IDS, MASK), rtol=0, atol=0.06)


def test_rounding_adds_little_to_the_error_of_the_values(bert):
    """Of a real BERT: less than a tenth of the squared error that 16 values make, and of no layer a fifth."""
    errors = torch.zeros(2)
    for layer in (bert.encoder.layer[0], bert.encoder.layer[5]):
        for linear in (layer.attention.self.query, layer.intermediate.dense, layer.output.dense):
            made = CodebookLinear.from_linear(linear, 16, 16)
            coded = _coded_weights(made)
            weight, values = linear.weight.detach(), made.dequantized().detach()
            rounded = looked_up(coded) * coded.scale[:, None]
            found = torch.stack([((values - weight) ** 2).sum(), ((rounded - values) ** 2).sum()])
            assert float(found[1]) < 0.2 * float(found[0])
            errors += found
    assert float(errors[1]) < 0.1 * float(errors[0])


def test_scales_are_those_of_the_values_in_use():
    """A value that no weight of four rows has changes nothing for them."""
    made = CodebookLinear.from_linear(nn.Linear(64, 8), 16, 8)
    with torch.no_grad():
        made.values[0, 3] = 1e6
        codes = made.codes
        codes[:4][codes[:4] == 3] = 4
        made.weight.copy_(pack_codes(codes, 4)[None])
    coded = _coded_weights(made)
    exact = made.dequantized().detach()
    assert float(coded.scale[0]) < 1 and float(coded.scale[4]) > 1000
    bound = exact[:4].abs().amax() / 254
    assert bool(((looked_up(coded) * coded.scale[:, None] - exact)[:4].abs() <= bound * 1.001).all())


def test_layers_without_rows_or_columns():
    for c, f in ((0, 4), (64, 0)):
        coded = _coded_weights(CodebookLinear.from_linear(nn.Linear(c, f), 16, 4))
        assert coded.weight.shape == (f, c) and looked_up(coded).shape == (f, c)


def test_codes_are_kept_where_they_are_asked_for():
    modules = encoder_modules(make(), "test", None)
    plain = layer_weights(modules.layers[0], 32, None, None)
    coded = layer_weights(modules.layers[0], 32, None, None, (True, False, True, False))
    assert plain.qkv.tables is None and coded.out.tables is None and coded.qkv.weight.dtype == torch.uint8
    assert torch.equal(looked_up(coded.qkv), plain.qkv.weight) and torch.equal(coded.qkv.scale, plain.qkv.scale)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return engine_of(make(), head_mask=torch.tensor([[0.0, 1.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]))


@pytest.fixture
def path(engine, tmp_path):
    engine.save(tmp_path / "engine.safetensors")
    return tmp_path / "engine.safetensors"


def test_files_hold_half_of_the_bytes(engine, path):
    found = Engine.load(path, verify=True)
    assert found.packed.shape == engine.packed.shape and torch.equal(found(IDS, MASK), engine(IDS, MASK))
    int8 = engine_of(as_int8(make()), head_mask=torch.tensor([[0.0, 1.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    for i, sizes in enumerate(map(engine.packed.shape.linears, range(2))):
        for name, (f, k) in sizes.items():
            saved = len(int8.packed.tensors[f"{i}.{name}"]) - len(engine.packed.tensors[f"{i}.{name}"])
            assert saved == f * k // 2 - f * 4  # whole panels of 32 rows; a table of 16 bytes for four


def test_damaged_files_are_refused(engine, path):
    want, content = engine(IDS, MASK), path.read_bytes()
    damages = [*flipped(content, 0, 60), *cut(content, 1, 10)]

    def same(found):
        return torch.equal(found(IDS, MASK), want)

    assert assert_refused_or_same(path, iter(damages), lambda: Engine.load(path), same) == len(damages)


def test_edited_shapes_of_files_without_a_checksum(path):
    """Another kind, width or head asks for blobs of another size."""
    tensors, metadata = load_file(path), metadata_of(path)
    edits = []
    for label, text in edited(json.loads(metadata["shape"]), 0, 60):
        save_file(tensors, path, {"format": metadata["format"], "shape": text.decode(errors="replace")})
        edits.append((label, path.read_bytes()))

    def runs(found):
        return found(IDS, MASK).shape == (4, 9, 128)

    assert assert_refused_or_same(path, iter(edits), lambda: Engine.load(path), runs) > 45


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kinds": [["int8", *ALL[1:]], ALL]}, "tensor: 0.qkv must be of shape ["),
        ({"kinds": [["codebook64", *ALL[1:]], ALL]}, "shape: kinds[0][0] must be one of"),
        ({"kinds": [["fp32", *ALL[1:]], ["bf16", *ALL[1:]]]}, "shape: kinds must be int8, codebook16 and one of the"),
        ({"ffn": [100, 192]}, "pack: columns must be a multiple of 4 and k one of 64 for codebook16, got 128 and 100"),
    ],
)
def test_kinds_that_cannot_be(changes, problem, path):
    rewrite(path, **changes)
    with pytest.raises(FileError) as error:
        Engine.load(path)
    assert problem in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
