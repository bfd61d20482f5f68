"""A transformer encoder packed for inference: weights laid out once, one call per batch.

    ids [B, T] → unpad once → embedding → per layer: QKV → attention → out → LayerNorm(+x)
                                                     → FFN in, GELU → FFN out → LayerNorm(+x) → x [N, C]

Only the N real tokens are computed. Packing concatenates each layer's query, key and value into one matrix
and, for another precision, converts the weights of the linear layers; every other weight is shared.

Shapes: B batch, T sequence, N tokens, L layers, C hidden, H heads, D head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from distilbert_fast.layers import Tokens
from distilbert_fast.ops import _check
from distilbert_fast.ops.attention import attention
from distilbert_fast.ops.embedding import embedding, embedding_quantize
from distilbert_fast.ops.int8_linear import int8_linear
from distilbert_fast.ops.layer_norm import layer_norm, layer_norm_quantize
from distilbert_fast.ops.quantize import quantize

OP = "engine"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": None}


# What a model is made of ------------------------------------------------------------------------------------


class LayerModules(NamedTuple):
    """One post-norm encoder layer. The linear layers are nn.Linear or hold int8 codes, see ``Int8Linear``."""

    query: nn.Module  # [C] -> [H·D]
    key: nn.Module
    value: nn.Module
    out: nn.Module  # [H·D] -> [C]
    attention_norm: nn.LayerNorm
    ffn_in: nn.Module  # [C] -> [F]
    ffn_out: nn.Module  # [F] -> [C]
    ffn_norm: nn.LayerNorm
    heads: tuple[int, ...]  # the numbers of the heads that are left, of 0…H-1


class EncoderModules(NamedTuple):
    """The modules of a DistilBERT, BERT or RoBERTa encoder: erf-GELU, LayerNorm after the residual."""

    word: nn.Embedding
    position: nn.Embedding
    token_type: nn.Embedding | None
    norm: nn.LayerNorm
    layers: Sequence[LayerModules]
    num_heads: int
    head_dim: int
    padding_idx: int | None = None  # RoBERTa counts positions from padding_idx + 1, and only of other ids


# What they are packed into ----------------------------------------------------------------------------------


class Linear(NamedTuple):
    """y = x Wᵀ + b with W = weight [F, C], or W[f] = scale[f] · weight[f] where weight holds int8 codes."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None  # float32 [F]


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


Codes = tuple[torch.Tensor, torch.Tensor]  # int8 codes [N, C] and their scales [N]


class Encoded(NamedTuple):
    """Hidden states of the real tokens, and where these stand in the batch."""

    x: torch.Tensor  # [N, C]
    tokens: Tokens
    hidden_states: tuple[torch.Tensor, ...]  # L + 1 times [N, C] if asked for, else empty


class Engine:
    """An encoder's packed weights. Immutable and thread-safe: a call changes nothing in it."""

    def __init__(self, model: EncoderModules, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.word, self.position = model.word.weight.detach(), model.position.weight.detach()
        self.token_type = None if model.token_type is None else model.token_type.weight.detach()
        self.norm = _norm(model.norm)
        self.layers = tuple(layers)
        self.num_heads, self.head_dim, self.padding_idx = model.num_heads, model.head_dim, model.padding_idx
        self.dtype = dtype  # of activations between the linear layers

    @classmethod
    @torch.no_grad()
    def from_model(
        cls, model: EncoderModules, precision: str | None = None, head_mask: torch.Tensor | None = None
    ) -> Engine:
        """Pack a model.

        Args:
            model: its modules.
            precision: "fp32", "bf16" or "fp16": the dtype of the linear layers, attention and what flows
                between them; "int8": linear layers with int8 codes, one scale a weight row and a token, and
                between them the dtype of the model. None: as the model is.
            head_mask: a fixed factor for each head, [H] or [L, H]. A head with factor 0 is left out of the
                weights: its columns of QKV and its rows of the output projection.

        Raises:
            TypeError, ValueError: an unknown precision; "fp32", "bf16" or "fp16" for a model that holds int8
                codes; query, key and value of a layer partly int8; a head mask of another shape.
        """
        if precision is not None:
            _check.choice(OP, "precision", precision, tuple(PRECISIONS))
        masks = _head_masks(head_mask, model.num_heads, model.layers, model.word.weight.device)
        layers = [
            _pack_layer(layer, model.head_dim, precision, mask) for layer, mask in zip(model.layers, masks, strict=True)
        ]
        dtype = None if precision is None else PRECISIONS[precision]
        return cls(model, layers, dtype or model.word.weight.dtype)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden state [B, T, C] that ``encode`` finds, 0 at padded positions."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, head_mask)
        return encoded.tokens.padded(encoded.x)

    @torch.no_grad()
    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        hidden_states: bool = False,
    ) -> Encoded:
        """Run the encoder on the real tokens of a batch.

        Args:
            input_ids: int64 or int32 [B, T].
            attention_mask: [B, T], 0 = padding, anywhere in its row. None: no padding.
            token_type_ids: [B or 1, T]; None is 0 everywhere. Only for a model that has token types.
            position_ids: [B or 1, T]; None counts from 0, or as RoBERTa counts.
            head_mask: factor of each head, [H] or [L, H], on top of the one the model was packed with.
            hidden_states: also return the embeddings and the output of each layer.

        Returns:
            Hidden states of the N real tokens, in the dtype of the embeddings.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
        """
        _check.tensor(OP, "input_ids", input_ids, ("B", "T"), (torch.int64, torch.int32), self.word.device)
        batch, length = input_ids.shape
        if attention_mask is not None:
            _check.tensor(OP, "attention_mask", attention_mask, (batch, length), _MASKS, self.word.device)
        tokens = Tokens.packed(attention_mask, batch, length, self.word.device)
        masks = _head_masks(head_mask, self.num_heads, self.layers, self.word.device)

        ids = tokens.rows(input_ids)  # [N]
        positions = tokens.rows(self._positions(input_ids, position_ids))  # [N]
        types = None
        if self.token_type is not None:
            if token_type_ids is None:
                types = torch.zeros_like(ids)
            else:
                types = tokens.rows(_broadcast("token_type_ids", token_type_ids, input_ids))
        elif token_type_ids is not None:
            _check.refuse(OP, "token_type_ids", "None, this model has no token types", "a tensor")

        x, codes = self._embed(ids, positions, types)
        kept = [x]
        for i, layer in enumerate(self.layers):
            reader = self.layers[i + 1].qkv if i + 1 < len(self.layers) else None
            x, codes = self._layer(layer, x, codes, tokens.cu_seqlens, masks[i], reader)
            if hidden_states:
                kept.append(x)
        out = self.word.dtype
        return Encoded(x.to(out), tokens, tuple(h.to(out) for h in kept) if hidden_states else ())

    def _positions(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Position of each token, [B, T]."""
        if position_ids is not None:
            return _broadcast("position_ids", position_ids, input_ids)
        if self.padding_idx is not None:
            real = input_ids != self.padding_idx
            return real.cumsum(dim=1) * real + self.padding_idx
        length = input_ids.shape[1]
        if length > self.position.shape[0]:
            _check.refuse(OP, "input_ids", f"at most {self.position.shape[0]} tokens long", length)
        return torch.arange(length, device=input_ids.device).expand_as(input_ids)

    def _embed(
        self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None
    ) -> tuple[torch.Tensor, Codes | None]:
        """Embeddings [N, C], and their codes if the first layer reads codes."""
        weight, bias, eps = self.norm
        tables = (self.word, self.position, weight, bias, types, self.token_type, eps)
        if not self.layers or self.layers[0].qkv.scale is None:
            return embedding(ids, positions, *tables).to(self.dtype), None
        x, x_q, x_scale = embedding_quantize(ids, positions, *tables)
        return x.to(self.dtype), (x_q, x_scale)

    def _layer(
        self,
        layer: Layer,
        x: torch.Tensor,
        codes: Codes | None,
        cu_seqlens: Any,  # int32 [B+1]
        mask: torch.Tensor | None,
        reader: Linear | None,
    ) -> tuple[torch.Tensor, Codes | None]:
        """x [N, C] after one layer, and its codes if ``reader``, the linear layer after it, wants them."""
        if layer.heads:
            qkv = _linear(layer.qkv, x, codes).view(x.shape[0], 3, len(layer.heads), self.head_dim)
            if layer.mask is not None:
                mask = layer.mask if mask is None else mask * layer.mask
            q, k, v = qkv.unbind(1)
            context = attention(q, k, v, cu_seqlens, mask)  # [N, H_l, D]
            y = _linear(layer.out, context.flatten(1))
        else:  # only its bias is left of the attention
            y = torch.zeros_like(x) if layer.out.bias is None else layer.out.bias.expand_as(x)
        x, codes = _add_norm(y, x, layer.attention_norm, layer.ffn_in)
        y = _linear(layer.ffn_out, _linear(layer.ffn_in, x, codes, "gelu"))
        return _add_norm(y, x, layer.ffn_norm, reader)


_MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *_check.FLOATS)


def _broadcast(argument: str, ids: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Ids of shape [B or 1, T] as [B, T]."""
    batch, length = input_ids.shape
    _check.tensor(OP, argument, ids, ("B", length), (torch.int64, torch.int32), input_ids.device)
    if ids.shape[0] not in (1, batch):
        _check.refuse(OP, argument, f"of shape [{batch} or 1, {length}]", list(ids.shape))
    return ids.expand(batch, length)


def _head_masks(
    head_mask: torch.Tensor | None, num_heads: int, layers: Sequence[LayerModules | Layer], device: torch.device
) -> list[torch.Tensor | None]:
    """For each layer the factors [H_l] of the heads that are left in it, or None."""
    if head_mask is None:
        return [None] * len(layers)
    if not isinstance(head_mask, torch.Tensor):
        _check.refuse(OP, "head_mask", "a tensor", type(head_mask).__name__, TypeError)
    if tuple(head_mask.shape) not in ((num_heads,), (len(layers), num_heads)):
        expected = f"of shape [{num_heads}] or [{len(layers)}, {num_heads}]"
        _check.refuse(OP, "head_mask", expected, list(head_mask.shape))
    mask = head_mask.to(device, head_mask.dtype if head_mask.is_floating_point() else torch.float32)
    rows = mask.expand(len(layers), num_heads).unbind()
    return [
        row if len(layer.heads) == num_heads else row[list(layer.heads)]
        for row, layer in zip(rows, layers, strict=True)
    ]


# Packing ----------------------------------------------------------------------------------------------------


def _pack_layer(layer: LayerModules, head_dim: int, precision: str | None, mask: torch.Tensor | None) -> Layer:
    out, ffn_in, ffn_out = (_pack(linear, precision) for linear in (layer.out, layer.ffn_in, layer.ffn_out))
    query, key, value = (_pack(linear, precision) for linear in (layer.query, layer.key, layer.value))
    heads = layer.heads
    if mask is not None:
        kept = mask.nonzero().flatten()
        columns = (kept[:, None] * head_dim + torch.arange(head_dim, device=kept.device)).flatten()
        query, key, value = (_rows(linear, columns) for linear in (query, key, value))
        out = out._replace(weight=out.weight.index_select(1, columns))
        heads, mask = tuple(heads[i] for i in kept.tolist()), mask[kept]
        mask = None if bool((mask == 1).all()) else mask
    return Layer(
        _concatenate(query, key, value),
        out,
        _norm(layer.attention_norm),
        ffn_in,
        ffn_out,
        _norm(layer.ffn_norm),
        heads,
        mask,
    )


def _pack(linear: Any, precision: str | None) -> Linear:
    """Weights of one linear layer, shared with the module if it has the precision asked for."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if weight.dtype == torch.int8:
        if precision not in (None, "int8"):
            _check.refuse(OP, "precision", "'int8' or None for a model that holds int8 weights", repr(precision))
        return Linear(weight[0], bias, linear.weight_scale)
    if precision is None:
        return Linear(weight, bias, None)
    if precision == "int8":
        codes, scale = quantize(weight)
        return Linear(codes, bias, scale)
    dtype = PRECISIONS[precision]
    return Linear(weight.to(dtype), None if bias is None else bias.to(dtype), None)


def _rows(linear: Linear, rows: torch.Tensor) -> Linear:
    parts: list[Any] = [None if part is None else part.index_select(0, rows) for part in linear]
    return Linear(*parts)


def _concatenate(query: Linear, key: Linear, value: Linear) -> Linear:
    parts: list[Any] = list(zip(query, key, value, strict=True))
    if any(len({part is None for part in three}) > 1 for three in parts):
        _check.refuse(OP, "query, key and value of a layer", "all int8 or all float, with or without bias", "both")
    joined: list[Any] = [None if three[0] is None else torch.cat(three) for three in parts]
    return Linear(*joined)


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


# Computing --------------------------------------------------------------------------------------------------


def _linear(linear: Linear, x: torch.Tensor, codes: Codes | None = None, activation: str | None = None) -> torch.Tensor:
    """y [N, F] of x [N, C]; a quantized layer reads the codes of x, made here if its producer did not."""
    if linear.scale is None:
        y = F.linear(x, linear.weight, linear.bias)
        return F.gelu(y) if activation == "gelu" else y
    x_q, x_scale = quantize(x) if codes is None else codes
    return int8_linear(x_q, x_scale, linear.weight, linear.scale, linear.bias, activation, out_dtype=x.dtype)


def _add_norm(y: torch.Tensor, x: torch.Tensor, norm: Norm, reader: Linear | None) -> tuple[torch.Tensor, Codes | None]:
    """LayerNorm(y + x), and its codes if ``reader`` wants them."""
    if reader is None or reader.scale is None:
        return layer_norm(y, norm.weight, norm.bias, x, norm.eps), None
    y, y_q, y_scale = layer_norm_quantize(y, norm.weight, norm.bias, x, norm.eps)
    return y, (y_q, y_scale)
