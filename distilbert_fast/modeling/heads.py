"""Pruning of attention heads in DistilBERT.

Michel, Levy, Neubig: Are Sixteen Heads Really Better than One?, arXiv:1905.10650.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distilbert_fast.backends import run_aside
from distilbert_fast.ops import _check

NAME = "DistilBertModel"  # in messages


def prune(model: Any, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
    """Remove heads from a ``distilbert_fast.DistilBertModel``, see its ``prune_heads``."""
    config, layers = model.config, model.transformer.layer
    plan = []
    for layer, heads in heads_to_prune.items():
        if layer not in range(len(layers)):
            _check.refuse(NAME, "heads_to_prune", f"of layers in 0…{len(layers) - 1}", layer)
        for head in heads:
            if head not in range(config.n_heads):
                _check.refuse(NAME, "heads_to_prune", f"of heads in 0…{config.n_heads - 1}", head)
        attention = layers[layer].attention
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            if type(getattr(attention, name)) is not nn.Linear:
                given = type(getattr(attention, name)).__name__
                _check.refuse(NAME, f"{name} of layer {layer}", "nn.Linear to be pruned", given, TypeError)
        plan.append((attention, [head for head in attention.heads if head not in set(heads)]))

    def shrink() -> None:
        for attention, left in plan:
            if len(left) < len(attention.heads):
                _keep_heads(attention, left)

    run_aside(shrink)  # also when a pruned checkpoint is loaded
    config.pruned_heads = {
        layer: [head for head in range(config.n_heads) if head not in block.attention.heads]
        for layer, block in enumerate(layers)
        if len(block.attention.heads) < config.n_heads
    }


def _keep_heads(attention: Any, left: list[int]) -> None:
    size = attention.attention_head_size
    place = [attention.heads.index(head) for head in left]
    features = torch.arange(len(attention.heads) * size).view(-1, size)[place].flatten()  # rows of q, k and v
    for linear in (attention.q_lin, attention.k_lin, attention.v_lin):
        _shrink(linear, features, dim=0)
    _shrink(attention.out_lin, features, dim=1)
    attention.heads = tuple(left)
    attention.n_heads, attention.dim = len(left), len(left) * size


def _shrink(linear: nn.Linear, features: torch.Tensor, dim: int) -> None:
    """Keep only the given output (dim 0) or input (dim 1) features of a linear layer, in new parameters."""
    features = features.to(linear.weight.device)

    def part(parameter: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(parameter.detach().index_select(dim, features), parameter.requires_grad)

    linear.weight = part(linear.weight)
    if dim == 0:
        linear.bias = part(linear.bias)
    linear.out_features, linear.in_features = linear.weight.shape
