"""Inputs of attention, and oracles for it: torch's own attention, one sequence at a time."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

from distilbert_fast import padded_attention
from distilbert_fast.ops.attention import attention_reference


def cumulated(lengths, device="cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def projection(n, heads, size, dtype=torch.float64, seed=0, device="cpu") -> torch.Tensor:
    """Queries, keys and values as one matrix product leaves them, [N, 3, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, heads, size, generator=generator, dtype=torch.float64).to(device, dtype)


def sdpa(q, k, v, cu_seqlens, head_mask=None) -> torch.Tensor:
    """The oracle: one call of torch's own attention for each sequence."""
    outputs = [q[:0]]
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        o = F.scaled_dot_product_attention(*(x[begin:end].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        if head_mask is not None:
            o = o * (head_mask[b] if head_mask.dim() == 2 else head_mask)[:, None].to(o.dtype)
        outputs.append(o)
    return torch.cat(outputs)


def results(function, qkv, do, *arguments, head_mask=None, **keywords):
    """Output, gradient of q, k, v, and gradient of the head mask."""
    qkv = qkv.detach().clone().requires_grad_()
    mask = None if head_mask is None else head_mask.detach().clone().requires_grad_()
    o = function(*qkv.unbind(1), *arguments, mask, **keywords)
    inputs = [x for x in (qkv, mask) if x is not None]
    return [o.detach(), *torch.autograd.grad(o, inputs, do, materialize_grads=True)]


def padded_by_packing(q, k, v, attention_mask, head_mask=None) -> torch.Tensor:
    """The oracle of the padded form: pack, attend sequence by sequence, put back."""
    cu_seqlens = cumulated(attention_mask.sum(1).tolist(), q.device)
    packed = attention_reference(*(x[attention_mask] for x in (q, k, v)), cu_seqlens, head_mask)
    return q.new_zeros(q.shape).masked_scatter(attention_mask[:, :, None, None], packed)


def check_padded(attention_mask, shape, head_mask, dtype=torch.float64, poison=math.nan, **tolerance) -> None:
    """Any mask, holes and all, with NaN in the padding of inputs and gradient."""
    generator = torch.Generator().manual_seed(0)
    clean = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(attention_mask.device, dtype) for _ in range(4)
    ]
    head_mask = None if head_mask is None else head_mask.to(dtype)
    padding = ~attention_mask[:, :, None, None]
    q, k, v, do = (x.masked_fill(padding, poison) for x in clean)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    oracle = [x.clone().requires_grad_() for x in clean[:3]]
    theirs = None if head_mask is None else head_mask.clone().requires_grad_()
    mine = None if head_mask is None else head_mask.clone().requires_grad_()
    if mine is not None:
        inputs, oracle = [*inputs, mine], [*oracle, theirs]
    o = padded_attention(q, k, v, attention_mask, mine)
    expected = padded_by_packing(*oracle[:3], attention_mask, theirs)
    assert o.is_contiguous() and (o.masked_select(padding) == 0).all()
    torch.testing.assert_close(o, expected, **tolerance)
    gradients = torch.autograd.grad(expected, oracle, clean[3], materialize_grads=True)
    for x, y in zip(torch.autograd.grad(o, inputs, do), gradients, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
