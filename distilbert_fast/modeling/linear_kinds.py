"""How a linear layer, or a table, may hold its weights, by the names that config.json gives it: docs/formats.md."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.layers import CodebookLinear, Int8Linear
from distilbert_fast.modeling.compression_config import FLOAT, INT8, SPARSE, Kind
from distilbert_fast.sparse import PackedSparseLinear, SparseLinear

STORED_FLOATS = ("F64", "F32", "BF16", "F16")  # what safetensors call the dtypes of a float layer
_INT8 = {"weight": ("I8",), "weight_scale": ("F32",)}
_CODES = {"weight": ("U8",)}
_STORED = {Int8Linear: _INT8, Int8Embedding: _INT8, CodebookLinear: _CODES, PackedSparseLinear: _CODES}
# Whose tensors in a file are others than those of a layer of floats.
STORED_OTHERWISE = tuple(_STORED)


def kind_of(module: nn.Module) -> Kind:
    """The kind of a linear layer, with its settings, or of a table."""
    if isinstance(module, CodebookLinear):
        return {"kind": "codebook", "values": module.values.shape[1], "group_size": module.group_size}
    if isinstance(module, SparseLinear):
        return SPARSE
    return INT8 if isinstance(module, (Int8Linear, Int8Embedding)) else FLOAT


def empty(linear: nn.Linear, kind: Kind, left: int = 0) -> nn.Module:
    """A layer of a kind that is not float, as large as ``linear``, for weights that are loaded afterwards.

    Args:
        left: of a sparse one, how many weights it has.
    """
    c, f, rest = linear.in_features, linear.out_features, (linear.bias is not None, linear.weight.device)
    if kind == INT8:
        return Int8Linear(c, f, *rest, linear.weight.dtype)
    if kind == SPARSE:
        return PackedSparseLinear(linear, left)
    return CodebookLinear(c, f, kind["values"], kind["group_size"], *rest, linear.weight.dtype)


def converted(
    linear: nn.Linear | SparseLinear,
    kind: Kind,
    importance: torch.Tensor | None,
    threads: int | None,
    given: Mapping[str, torch.Tensor],
) -> nn.Module:
    """``linear`` as int8 or with shared values.

    Args:
        importance, threads: as for ``CodebookLinear.from_linear``, alone.
        given: scale, or mean and mean_square, for ``Int8Linear.from_linear`` alone; or nothing.
    """
    if isinstance(linear, SparseLinear):
        linear = linear.dense()
    if kind["kind"] == "int8":
        return Int8Linear.from_linear(linear, **given)
    return CodebookLinear.from_linear(linear, kind["values"], kind["group_size"], importance, threads)


def stored_dtypes(layer: nn.Module, part: str) -> tuple[str, ...]:
    """What safetensors may call the dtype of a part of a layer."""
    return _STORED.get(type(layer), {}).get(part, STORED_FLOATS)
