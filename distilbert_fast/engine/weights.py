"""What an encoder is made of, and its weights laid out layer by layer in the precision that is asked for.

Each layer's query, key and value become one matrix; heads that a mask sets to 0 leave the weights. A weight that is
already in the wanted form is shared with the model.

Shapes: C hidden, H heads, D head size, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.layers import QUANTIZED_LINEARS, CodebookLinear, Int8Linear
from distilbert_fast.ops import _check
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.sparse import SparseLinear

OP = "engine"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": None}


# What a model is made of ------------------------------------------------------------------------------------


class LayerModules(NamedTuple):
    """One post-norm encoder layer. The linear layers are of ``sparse.LINEARS``."""

    query: nn.Module  # [C] -> [H·D]
    key: nn.Module
    value: nn.Module
    out: nn.Module  # [H·D] -> [C]
    attention_norm: nn.LayerNorm
    ffn_in: nn.Module  # [C] -> [F]
    ffn_out: nn.Module  # [F] -> [C]
    ffn_norm: nn.LayerNorm
    heads: tuple[int, ...]  # the numbers of the heads that are left, of 0…H-1; F and they may differ between layers

    @property
    def ffn(self) -> int:
        """F."""
        weight: Any = self.ffn_in.weight
        return int(weight.shape[-2])

    @property
    def linears(self) -> tuple[Any, ...]:
        return self.query, self.key, self.value, self.out, self.ffn_in, self.ffn_out

    def heads_under(self, mask: torch.Tensor | None) -> tuple[int, ...]:
        """The numbers of the heads that a mask [H_l] leaves."""
        return self.heads if mask is None else tuple(self.heads[i] for i in mask.nonzero().flatten().tolist())


class EncoderModules(NamedTuple):
    """The modules of a DistilBERT, BERT or RoBERTa encoder: erf-GELU, LayerNorm after the residual."""

    word: nn.Module  # nn.Embedding or Int8Embedding, as the other two
    position: nn.Module
    token_type: nn.Module | None
    norm: nn.LayerNorm
    layers: Sequence[LayerModules]
    num_heads: int
    head_dim: int
    padding_idx: int | None = None  # RoBERTa counts positions from padding_idx + 1, and only of other ids

    @property
    def tables(self) -> dict[str, EmbeddingTable]:
        named = {"word": self.word, "position": self.position, "token_type": self.token_type}
        return {name: table_weights(table) for name, table in named.items() if table is not None}

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that the tables give."""
        return table_dtype(self.word)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device


# What it is computed with ------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """y = x Wᵀ + b with W = weight [F, C], or W[f] = scale[f] · weight[f] where weight holds int8 codes.

    Where there are tables, weight holds codes uint8 below 16: W[f, c] = scale[f] · tables[f, weight[f, c]].
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None  # float32 [F]
    tables: torch.Tensor | None = None  # int8 [F, 16], the same for each four rows


class EmbeddingTable(NamedTuple):
    """Vectors [rows, C]: weight, or row by row scale · weight where that holds int8 codes."""

    weight: torch.Tensor
    scale: torch.Tensor | None  # float32 [rows]


class Norm(NamedTuple):
    weight: torch.Tensor  # [C]
    bias: torch.Tensor  # [C]
    eps: float


class Layer(NamedTuple):
    qkv: Linear  # [C] -> [3, H_l, D]
    out: Linear  # [H_l, D] -> [C]
    attention_norm: Norm
    ffn_in: Linear
    ffn_out: Linear
    ffn_norm: Norm
    heads: tuple[int, ...]  # the numbers of its H_l heads
    mask: torch.Tensor | None  # [H_l], where the model was packed with a head mask that is not only 0 and 1
    context_scale: torch.Tensor | None = None  # float32 [], of what out reads; None: each token finds its own
    gelu_scale: torch.Tensor | None = None  # of what ffn_out reads


# How they are made of it ------------------------------------------------------------------------------------


def layer_weights(
    layer: LayerModules,
    head_dim: int,
    precision: str | None,
    mask: torch.Tensor | None,
    tables: tuple[bool, bool, bool, bool] = (False, False, False, False),
) -> Layer:
    """One layer in a precision of ``PRECISIONS``, without the heads for which mask [H_l] is 0.

    None: as it is, but shared values as int8.

    Args:
        tables: whether qkv, out, ffn_in and ffn_out, if they ``have_tables``, are to keep their codes.
    """
    coded = (*tables[:1] * 3, *tables[1:])
    query, key, value, out, ffn_in, ffn_out = map(_linear_weights, layer.linears, [precision] * 6, coded)
    heads = layer.heads_under(mask)
    if mask is not None:
        kept = mask.nonzero().flatten()
        features = (kept[:, None] * head_dim + torch.arange(head_dim, device=kept.device)).flatten()
        query, key, value = (_select(linear, features) for linear in (query, key, value))
        out = out._replace(weight=out.weight.index_select(1, features))
        mask = mask[kept]
        mask = None if bool((mask == 1).all()) else mask
    return Layer(
        _concatenate(query, key, value),
        out,
        norm_weights(layer.attention_norm),
        ffn_in,
        ffn_out,
        norm_weights(layer.ffn_norm),
        heads,
        mask,
    )


def _linear_weights(linear: Any, precision: str | None, tables: bool = False) -> Linear:
    """Weights of one linear layer, shared with the module if it has the precision asked for."""
    bias = None if linear.bias is None else linear.bias.detach()
    if isinstance(linear, Int8Linear):
        if precision not in (None, "int8"):
            _check.refuse(OP, "precision", "'int8' or None for a model that holds int8 weights", repr(precision))
        return Linear(linear.codes.detach(), bias, linear.weight_scale)
    if precision in (None, "int8") and has_tables(linear):
        coded = _coded_weights(linear)
        return coded if tables else coded._replace(weight=looked_up(coded), tables=None)
    weight = float_weight(linear)
    if precision is None and isinstance(linear, CodebookLinear):
        precision = "int8"
    if precision is None:
        return Linear(weight, bias, None)
    if precision == "int8":
        codes, scale = quantize(weight)
        return Linear(codes, bias, scale)
    dtype = PRECISIONS[precision]
    return Linear(weight.to(dtype), None if bias is None else bias.to(dtype), None)


_STRIP = 4  # rows that share a table: of a byte shuffle, whose tables are of 16 bytes, see csrc/cpu/gemm/gemm.h


def has_tables(linear: Any) -> bool:
    """Whether each four rows of a linear layer share at most 16 values."""
    if not isinstance(linear, CodebookLinear) or linear.values.shape[1] != 16 or linear.out_features % _STRIP:
        return False
    return linear.group_size is None or linear.group_size % _STRIP == 0


def _coded_weights(linear: CodebookLinear) -> Linear:
    """Codes as they are and values as int8: four rows have one scale, by which the largest value that they use becomes
    127."""
    codes, values = linear.codes, linear.values.detach().to(torch.float32)
    strips = codes.shape[0] // _STRIP
    size = linear.group_size or max(codes.shape[0], 1)
    shared = values[torch.arange(strips, device=values.device) * _STRIP // size]  # [F / 4, 16]
    used = torch.zeros_like(shared, dtype=torch.bool)
    used.scatter_(1, codes.reshape(strips, _STRIP * codes.shape[1]).long(), True)
    tables, scale = quantize(torch.where(used, shared, 0.0))  # [F / 4, 16], [F / 4]
    bias = None if linear.bias is None else linear.bias.detach()
    return Linear(codes, bias, scale.repeat_interleave(_STRIP), tables.repeat_interleave(_STRIP, dim=0))


def looked_up(linear: Linear) -> torch.Tensor:
    """The int8 weights [F, C] of a linear layer with tables."""
    assert linear.tables is not None
    return linear.tables.gather(1, linear.weight.long())


def float_weight(linear: Any) -> torch.Tensor:
    """W [F, C] of any linear layer; that of a dense float one itself."""
    stored = isinstance(linear, (SparseLinear, *QUANTIZED_LINEARS))
    return (linear.dequantized() if stored else linear.weight).detach()


def _select(linear: Linear, features: torch.Tensor) -> Linear:
    """A linear layer that makes only some of its features."""
    parts: list[Any] = [None if part is None else part.index_select(0, features) for part in linear]
    return Linear(*parts)


def _concatenate(query: Linear, key: Linear, value: Linear) -> Linear:
    parts: list[Any] = list(zip(query, key, value, strict=True))
    if any(len({part is None for part in three}) > 1 for three in parts):
        _check.refuse(OP, "query, key and value of a layer", "all int8 or all float, with or without bias", "both")
    joined: list[Any] = [None if three[0] is None else torch.cat(three) for three in parts]
    return Linear(*joined)


def table_weights(table: Any) -> EmbeddingTable:
    if isinstance(table, Int8Embedding):
        return EmbeddingTable(table.codes.detach(), table.weight_scale)
    return EmbeddingTable(table.weight.detach(), None)


def table_dtype(table: Any) -> torch.dtype:
    """Of the vectors that a table of embeddings gives."""
    found: torch.dtype = table.dtype if isinstance(table, Int8Embedding) else table.weight.dtype
    return found


def norm_weights(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)
