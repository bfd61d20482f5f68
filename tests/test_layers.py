"""Padded batches, masks, int8 layers, and whether a call is traced."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from distilbert_fast.layers import (
    Int8Linear,
    Tokens,
    head_masks,
    is_token,
    labels_padding,
    pad,
    parse_head_mask,
    traced,
    unpad,
)

MASKS = {
    "ragged": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
    "full": [[1] * 5] * 3,
    "one empty": [[1, 1, 1, 0, 0], [0] * 5, [1, 1, 0, 0, 0]],
    "all empty": [[0] * 5] * 3,
}


@pytest.fixture(params=MASKS)
def mask(request):
    return torch.tensor(MASKS[request.param])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_pad_undoes_unpad(mask, shape):
    x = torch.randn(3, 5, *shape)
    rows, cu_seqlens, indices = unpad(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert indices.dtype == torch.int64 and torch.equal(indices, mask.flatten().nonzero().flatten())
    back = pad(rows, indices, 3, 5)
    assert torch.equal(back, torch.where(mask.bool().view(3, 5, *[1] * len(shape)), x, 0.0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_unpad_takes_any_mask_dtype(dtype):
    mask = torch.tensor(MASKS["holes"])
    x = torch.arange(15).view(3, 5)
    for ours, expected in zip(unpad(x, mask.to(dtype)), unpad(x, mask), strict=True):
        assert torch.equal(ours, expected)


def test_unpad_of_nothing():
    rows, cu_seqlens, indices = unpad(torch.empty(0, 5, 4), torch.empty(0, 5))
    assert rows.shape == (0, 4) and cu_seqlens.tolist() == [0] and indices.shape == (0,)
    assert pad(rows, indices, 0, 5).shape == (0, 5, 4)
    rows, cu_seqlens, indices = unpad(torch.empty(2, 0, 4), torch.empty(2, 0))
    assert rows.shape == (0, 4) and cu_seqlens.tolist() == [0, 0, 0]
    assert pad(rows, indices, 2, 0).shape == (2, 0, 4)


def test_unpad_and_pad_have_gradients(mask):
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)

    def through(x):
        rows, _, indices = unpad(x, mask)
        return pad(rows * rows, indices, 3, 5)

    assert torch.autograd.gradcheck(through, (x,))


def test_unpad_of_a_transposed_view_changes_nothing():
    x = torch.randn(5, 3, 4).transpose(0, 1)
    before = x.clone()
    rows, _, _ = unpad(x, torch.tensor(MASKS["holes"]))
    rows.add_(1)
    assert torch.equal(x, before)


def test_unpad_and_pad_refuse():
    with pytest.raises(ValueError, match=r"^unpad: attention_mask must be of shape \[3, 5\], got \[3, 4\]$"):
        unpad(torch.randn(3, 5, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"^unpad: attention_mask must be of shape \[3, 5\], got \[3, 1, 5, 5\]$"):
        unpad(torch.randn(3, 5, 2), torch.ones(3, 1, 5, 5))
    with pytest.raises(TypeError, match=r"^unpad: attention_mask must be a tensor, got list$"):
        unpad(torch.randn(3, 5, 2), MASKS["full"])
    with pytest.raises(ValueError, match=r"^pad: x must be of 2 rows, one for each index, got \[3, 4\]$"):
        pad(torch.randn(3, 4), torch.tensor([0, 1]), 1, 5)


@pytest.mark.parametrize("count", [None, "known"])
def test_tokens_are_unpads_rows_and_come_back(mask, count):
    x = torch.randn(3, 5, 4)
    tokens = Tokens.unpadded(mask, 3, 5, mask.device, None if count is None else int(mask.sum()))
    rows, cu_seqlens, indices = unpad(x, mask)
    assert torch.equal(tokens.rows(x), rows) and torch.equal(tokens.padded(rows), pad(rows, indices, 3, 5))
    assert torch.equal(tokens.cu_seqlens, cu_seqlens) and torch.equal(tokens.indices, indices)


def test_tokens_without_a_mask_are_all():
    x = torch.randn(3, 5, 4)
    tokens = Tokens.unpadded(None, 3, 5, x.device)
    assert tokens.indices is None and tokens.cu_seqlens.tolist() == [0, 5, 10, 15]
    assert torch.equal(tokens.rows(x), x.flatten(0, 1)) and torch.equal(tokens.padded(x.flatten(0, 1)), x)


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_are_not_traced():
    x = torch.ones(2)
    with torch.no_grad(), torch.device("cpu"):
        assert not traced() and not traced(x, nn.Parameter(x), torch.ones(2, requires_grad=True) * 2)


def test_what_is_traced():
    x, seen = torch.ones(2), []

    def see(x):
        seen.append(traced(x))
        return x + 1

    torch.jit.trace(see, x, check_trace=False)  # the check calls it untraced
    torch.compile(see, backend="eager")(x)
    torch.fx.symbolic_trace(see)
    make_fx(see)(x)
    torch.vmap(see)(x)
    torch.func.jvp(see, (x,), (x,))
    torch.func.grad(lambda x: see(x).sum())(x)
    with forward_ad.dual_level():
        see(forward_ad.make_dual(x, x))
    with FakeTensorMode() as mode:
        see(torch.ones(2))
    see(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        see(x)
    see(torch.ones(2, device="meta"))
    see(x.as_subclass(Subclass))
    assert len(seen) >= 13 and all(seen)
    assert not traced(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("trainable", [False, True])
def test_traced_layers_are_right_for_other_sizes_and_dtypes_and_from_a_file(trainable):
    model = Int8Linear.from_linear(nn.Linear(8, 6))
    model.bias.requires_grad_(trainable)
    recorded = torch.jit.trace(model, torch.randn(2, 3, 8))
    file = io.BytesIO()
    torch.jit.save(recorded, file)
    file.seek(0)
    for run in (recorded, torch.jit.load(file)):
        for shape, dtype in (((4, 5, 8), torch.float32), ((1, 1, 8), torch.bfloat16)):
            x = torch.randn(shape, dtype=dtype)
            torch.testing.assert_close(run(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit", "ignore::DeprecationWarning")
def test_torchscripts_onnx_export_of_int8_layers_is_refused(tmp_path):
    pytest.importorskip("onnx")
    model = Int8Linear.from_linear(nn.Linear(8, 6))
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="distilbert_fast::dynamic_int8_linear"):
        torch.onnx.export(model, (torch.randn(2, 8),), str(tmp_path / "model.onnx"), dynamo=False)


# Masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_what_is_a_token(dtype):
    mask = torch.tensor([[1, 0, 1]]).to(dtype)
    assert torch.equal(is_token(mask), torch.tensor([[True, False, True]]))
    if dtype.is_floating_point:
        assert is_token(torch.tensor([-0.0, 0.5, -1.0], dtype=dtype)).tolist() == [False, True, True]


def test_labels_on_padding():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert not labels_padding(torch.tensor([[1, 2, -100], [-100, -100, -100]]), mask.double())
    assert labels_padding(torch.tensor([[1, 2, -100], [1, 0, -100]]), mask)
    assert not labels_padding(torch.tensor([1, 2]), mask)  # of another shape


L, B, HEADS = 3, 2, 4


@pytest.mark.parametrize("shape", [(HEADS,), (L, HEADS), (L, 1, HEADS, 1, 1), (L, B, HEADS, 1, 1)])
@pytest.mark.parametrize("kept", [[range(4)] * 3, [[0, 3], [], [2]]], ids=["whole", "pruned"])
def test_head_masks_of_layers(shape, kept):
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = head_masks("op", mask, HEADS, kept, mask.device, B)
    every = mask.flatten(2) if len(shape) == 5 else mask.expand(L, HEADS)[:, None]  # [L, 1 or B, H]
    for row, left, factors in zip(found, kept, every, strict=True):
        wanted = factors[:, list(left)]
        assert torch.equal(row, wanted if shape[1:2] == (B,) else wanted[0])
    found[0].sum().backward()
    assert mask.grad.count_nonzero() > 0


def test_a_head_mask_is_made_floating_point():
    assert parse_head_mask("op", torch.tensor([1, 0]), 2, 3, torch.device("cpu")).dtype == torch.float32
    assert head_masks("op", None, 2, [[0], [1]], torch.device("cpu")) == [None, None]


@pytest.mark.parametrize(
    ("mask", "batch", "error", "message"),
    [
        ([1.0], None, TypeError, "op: head_mask must be a tensor, got list"),
        (torch.ones(3), None, ValueError, "op: head_mask must be of shape [4] or [3, 4], got [3]"),
        (
            torch.ones(3, 1, 4, 1, 1),
            None,
            ValueError,
            "op: head_mask must be of shape [4] or [3, 4], got [3, 1, 4, 1, 1]",
        ),
        (
            torch.ones(3, 5, 4, 1, 1),
            2,
            ValueError,
            "op: head_mask must be of shape [4], [3, 4] or [3, 1 or 2, 4, 1, 1], got [3, 5, 4, 1, 1]",
        ),
    ],
)
def test_head_masks_that_are_refused(mask, batch, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        parse_head_mask("op", mask, 4, 3, torch.device("cpu"), batch)


def test_codes_and_what_they_stand_for():
    linear = nn.Linear(30, 7)
    layer = Int8Linear.from_linear(linear)
    assert layer.codes.shape == (7, 30) and layer.codes.data_ptr() == layer.weight.data_ptr()
    wrong = (layer.dequantized() - linear.weight).abs()
    assert (wrong <= layer.weight_scale[:, None] * 0.5001).all()
