"""Packing of padded batches, attention in both layouts, LayerNorm with a residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distilbert_fast.layers import LayerNorm, Tokens, attend, pad, unpad

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


@pytest.mark.parametrize("per_sequence", [False, True])
def test_every_way_to_attend_agrees(mask, per_sequence):
    torch.manual_seed(0)
    batch, length, heads, size = 3, 5, 4, 6
    x = torch.randn(3, batch, length, heads, size, dtype=torch.float64)
    head_mask = torch.rand(batch, heads) if per_sequence else torch.rand(heads)
    results = []
    for tokens, probabilities in (
        (Tokens.packed(mask, batch, length, mask.device), False),
        (Tokens(batch, length, mask=mask.bool()), False),
        (Tokens(batch, length, mask=mask.bool()), True),
    ):
        q, k, v = (tokens.rows(part).requires_grad_() for part in x)
        m = head_mask.clone().requires_grad_()
        context, weights = attend(q, k, v, tokens, m, probabilities=probabilities)
        assert (weights is not None) == probabilities
        context = tokens.padded(context) * mask[:, :, None, None]  # [B, T, H, D]
        context.square().sum().backward()
        results.append((context.detach(), m.grad))
    for context, dm in results[1:]:
        torch.testing.assert_close(context, results[0][0])
        torch.testing.assert_close(dm, results[0][1])


def test_probabilities_are_those_used():
    tokens = Tokens(2, 3, mask=torch.tensor([[True, True, False], [False, False, False]]))
    q, k, v = torch.randn(3, 6, 2, 4).unbind()
    head_mask = torch.tensor([1.0, 0.5])
    context, weights = attend(q, k, v, tokens, head_mask, probabilities=True)
    assert weights.shape == (2, 2, 3, 3)
    torch.testing.assert_close(weights[0].sum(-1), head_mask[:, None].expand(2, 3))
    assert weights[0, :, :, 2].eq(0).all() and weights.isfinite().all()
    expected = torch.einsum("bhij,bjhd->bihd", weights, v.view(2, 3, 2, 4)).flatten(0, 1)
    torch.testing.assert_close(context, expected)


def test_layer_norm_is_torchs_and_takes_a_residual():
    ours = LayerNorm(8, eps=1e-5)
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    x, residual = torch.randn(2, 3, 5, 8).unbind()
    torch.testing.assert_close(ours(x), F.layer_norm(x, (8,), ours.weight, ours.bias, 1e-5))
    torch.testing.assert_close(ours(x, residual), F.layer_norm(x + residual, (8,), ours.weight, ours.bias, 1e-5))
    assert list(ours.state_dict()) == ["weight", "bias"]
    assert ours(x[:0]).shape == (0, 5, 8)
