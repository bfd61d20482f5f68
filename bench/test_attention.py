"""attention, with and without gradients, against torch's scaled_dot_product_attention; and with half the heads masked.

Twelve heads of 64, as in DistilBERT, over sequences of one length and of many (torch gets those padded, with a mask).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad

HEADS, SIZE = 12, 64
HALF = f"{OURS}, half the heads masked"
LENGTHS = {
    "8x128": (128,) * 8,
    "1x384": (384,),
    "32 of 16 to 128": tuple(torch.randint(16, 129, (32,), generator=torch.Generator().manual_seed(0)).tolist()),
}


def sequences(lengths, dtype):
    """Packed queries, keys and values [N, 3, H, D], their offsets, and where they lie in a padded batch [B, T]."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(lengths), 3, HEADS, SIZE, generator=generator).to(DEVICE, dtype)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    mask = torch.arange(max(lengths), device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    return qkv, offsets, mask


def torchs_attention(qkv, mask):
    """[B, T, 3, H, D] -> [B, H, T, D]."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask.all() else mask[:, None, None, :])


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention(hold_contest, dtype, lengths, gradients):
    qkv, offsets, mask = sequences(lengths, dtype)
    padded = qkv.new_zeros(*mask.shape, *qkv.shape[1:])
    padded[mask] = qkv
    half = torch.arange(HEADS, device=DEVICE).remainder(2).float()
    if gradients:
        qkv.requires_grad_(), padded.requires_grad_()
    forget = forgetting(qkv, padded)

    def step(function):
        return lambda: function().sum().backward() if gradients else function()

    def ours(head_mask=None):
        return distilbert_fast.attention(*qkv.unbind(1), offsets, head_mask)

    o = torchs_attention(padded, mask).transpose(1, 2)[mask]  # right before fast
    torch.testing.assert_close(ours(), o, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)

    matrix = qkv.nbytes // 3
    moved = (4 + (7 if gradients else 0)) * matrix  # q, k, v, o; again with the gradient of each but o read once
    q, k, _ = (x.detach().contiguous() for x in qkv.unbind(1))
    contenders = {
        OURS: Contender(step(ours), forget, moved),
        HALF: Contender(step(lambda: ours(half)), forget, moved),
        "torch": Contender(step(lambda: torchs_attention(padded, mask)), forget, moved),
        TRIAD: triad(q, k),
    }
    hold_contest(contenders, matrix)
