"""A small encoder of plain modules with odd sizes, and what it computes in plain torch, one sequence at a time."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from distilbert_fast.engine.engine import EncoderModules, LayerModules
from distilbert_fast.layers import Int8Linear

C, H, D, FF, V, P = 30, 3, 10, 37, 50, 20
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]])
PRECISIONS = ("fp32", "bf16", "int8")
CLOSE = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.08}  # to ``reference``


def ragged(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [count, 20] of sequences of 0 to 20 tokens, some of which do not begin at 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (count, 20), generator=generator)
    lengths = torch.randint(0, 21, (count, 1), generator=generator)
    starts = (torch.rand(count, 1, generator=generator) * (21 - lengths)).long()
    place = torch.arange(20)
    return ids, ((place >= starts) & (place < starts + lengths)).long()


def make(layers=2, types=2, padding_idx=None, int8=False, bias=True, seed=0, dtype=torch.float32, structure=None):
    """structure: for each layer the numbers of its heads and its feed-forward width."""
    torch.manual_seed(seed)

    def linear(c, f):
        with warnings.catch_warnings(action="ignore"):  # that there is nothing to initialise
            made = nn.Linear(c, f, bias, dtype=dtype)
        return Int8Linear.from_linear(made) if int8 else made

    def norm():
        made = nn.LayerNorm(C, eps=1e-12, dtype=dtype)
        nn.init.normal_(made.weight, 1.0, 0.2), nn.init.normal_(made.bias, 0.0, 0.2)
        return made

    stack = [
        LayerModules(
            *(linear(C, len(heads) * D) for _ in range(3)),
            linear(len(heads) * D, C),
            norm(),
            linear(C, ffn),
            linear(ffn, C),
            norm(),
            heads=tuple(heads),
        )
        for heads, ffn in (((range(H), FF),) * layers if structure is None else structure)
    ]
    tables = [nn.Embedding(rows, C, dtype=dtype) if rows else None for rows in (V, P, types)]
    return EncoderModules(*tables, norm(), stack, H, D, padding_idx)


def reference(model, ids, mask=None, types=None, positions=None, head_mask=None, padding=False):
    """[B, T, C] one sequence at a time, in the dtype of the modules; 0 at padding unless that is computed too: then all
    queries meet the tokens' keys, and where there is none attention gives 0."""
    mask = torch.ones_like(ids) if mask is None else mask
    head_mask = torch.ones(len(model.layers), H) if head_mask is None else head_mask.expand(len(model.layers), H)
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions.expand_as(ids)
    types = torch.zeros_like(ids) if types is None else types
    out = torch.zeros(*ids.shape, C, dtype=model.word.weight.dtype)
    for b in range(ids.shape[0]):
        keys = mask[b].bool()
        real = torch.ones_like(keys) if padding else keys
        keys = keys[real]
        x = model.word(ids[b, real]) + model.position(positions[b, real])
        if model.token_type is not None:
            x = x + model.token_type(types[b, real])
        x = model.norm(x)
        for layer, factors in zip(model.layers, head_mask, strict=True):
            q, k, v = (
                f(x).view(len(x), len(layer.heads), D).transpose(0, 1) for f in (layer.query, layer.key, layer.value)
            )
            scores = (q @ k.transpose(1, 2) / D**0.5).masked_fill(~keys, float("-inf"))  # [H, t, t]
            p = scores.softmax(-1).nan_to_num(0)
            context = (p @ v * factors[list(layer.heads), None, None].to(v.dtype)).transpose(0, 1).flatten(1)
            x = layer.attention_norm(layer.out(context) + x)
            x = layer.ffn_norm(layer.ffn_out(F.gelu(layer.ffn_in(x))) + x)
        out[b, real] = x
    return out
