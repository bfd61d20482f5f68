"""An encoder computed op by op, by whichever backend serves each: on a GPU, and wherever the C++ encoder cannot.

    embedding → per layer: QKV → attention → out → LayerNorm(+x) → FFN in, GELU → FFN out → LayerNorm(+x)

Shapes: B batch, N tokens, C hidden, H heads, D head size, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from distilbert_fast.engine.weights import PRECISIONS, EncoderModules, Layer, Linear, Norm, layer_weights, norm_weights
from distilbert_fast.layers import Tokens
from distilbert_fast.ops.attention import attention
from distilbert_fast.ops.embedding import embedding, embedding_quantize
from distilbert_fast.ops.int8_linear import int8_linear
from distilbert_fast.ops.layer_norm import layer_norm, layer_norm_quantize
from distilbert_fast.ops.quantize import quantize

Codes = tuple[torch.Tensor, torch.Tensor]  # int8 codes [N, C] and their scales [N]


class TokenLayout(NamedTuple):
    """What a call computes beside its ids."""

    positions: torch.Tensor  # [N]
    types: torch.Tensor | None  # [N], where the model has them
    cu_seqlens: torch.Tensor  # int32 [B + 1]


class OpEncoder:
    """The weights of an encoder's layers, and its tables, which it shares with the model.

    Args:
        model: its modules.
        precision: of the linear layers and what flows between them, see ``Engine.from_model``.
        masks: for each layer None or a factor for each of its heads [H_l]; heads with 0 are left out.
        scales: for each layer, of what out and ffn_out read; None, or none at all: each token finds its own.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: EncoderModules,
        precision: str | None,
        masks: Sequence[torch.Tensor | None],
        scales: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]] = (),
    ) -> None:
        self.tables = model.tables
        self.word, self.position = self.tables["word"].weight, self.tables["position"].weight
        self.token_type = self.tables["token_type"].weight if "token_type" in self.tables else None
        self.norm = norm_weights(model.norm)
        self.num_heads, self.padding_idx, self.head_dim = model.num_heads, model.padding_idx, model.head_dim
        self.out_dtype = model.dtype
        self.dtype = (precision and PRECISIONS[precision]) or model.dtype  # of activations
        pairs = zip(model.layers, masks, strict=True)
        self.layers = [layer_weights(layer, model.head_dim, precision, mask) for layer, mask in pairs]
        for i, (context, gelu) in enumerate(scales):
            self.layers[i] = self.layers[i]._replace(context_scale=context, gelu_scale=gelu)
        self.heads = tuple(layer.heads for layer in self.layers)

    def layout(
        self,
        tokens: Tokens,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> TokenLayout:
        """Positions and types of a batch's tokens: input_ids [B, T], the others None or [B or 1, T]."""
        shape = input_ids.shape
        if position_ids is not None:
            position_ids = position_ids.expand(shape)
        elif self.padding_idx is not None:
            real = input_ids != self.padding_idx
            position_ids = real.cumsum(dim=1) * real + self.padding_idx
        else:
            position_ids = torch.arange(shape[1], device=input_ids.device).expand(shape)
        positions, types = tokens.rows(position_ids), None
        if self.token_type is not None:
            given = token_type_ids is not None
            types = tokens.rows(token_type_ids.expand(shape)) if given else torch.zeros_like(positions)
        return TokenLayout(positions, types, tokens.cu_seqlens)

    def run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        types: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        head_masks: Sequence[torch.Tensor | None] | None = None,
        hidden_states: bool = False,
        first: bool = False,
        largest: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        max_length: int | None = None,
    ) -> list[torch.Tensor]:
        """Hidden states [N, C] of unpadded tokens in the dtype of the word table: the last, or the embeddings and the
        output of each layer.

        Args:
            ids, positions, types: [N]; types where the model has them.
            cu_seqlens: int32 [B + 1].
            head_masks: for each layer None or a factor for each of its heads [H_i].
            first: of the last state only each sequence's first token, [B, C], 0 where it has none: in the last layer
                nothing after the attention is computed for the others. Not with ``hidden_states``.
            largest: float32 [L, 2], raised to the largest magnitudes of what each layer's out and ffn_out read.
            keys: bool [B, T], where the rows are those of a padded batch, N = B·T: which of them are anybody's keys.
            max_length: that no sequence exceeds, see ``attention``.
        """
        rows = None
        if first:
            if ids.shape[0] == 0:
                return [self.norm.weight.new_zeros(cu_seqlens.shape[0] - 1, self.word.shape[1], dtype=self.out_dtype)]
            rows = cu_seqlens[:-1].clamp(max=ids.shape[0] - 1)  # [B]; any row will do where there is no token
        x, codes = self._embed(ids, positions, types)
        states = [x]
        for i, layer in enumerate(self.layers):
            following = self.layers[i + 1] if i + 1 < len(self.layers) else None
            mask = None if head_masks is None else head_masks[i]
            seen = None if largest is None else largest[i]
            wanted = rows if following is None else None
            x, codes = self._layer(
                layer, x, codes, cu_seqlens, mask, following and following.qkv, wanted, seen, keys, max_length
            )
            states = [*states, x] if hidden_states else [x]
        if rows is not None:
            x = states[-1] if self.layers else states[-1].index_select(0, rows)
            states = [x.masked_fill((cu_seqlens.diff() == 0)[:, None], 0)]  # [B, C]
        return [state.to(self.out_dtype) for state in states]

    def _embed(
        self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None
    ) -> tuple[torch.Tensor, Codes | None]:
        """Embeddings [N, C], and their codes if the first layer reads codes."""
        weight, bias, eps = self.norm
        reader = self.layers[0].qkv if self.layers and self.layers[0].heads else None
        if any(table.scale is not None for table in self.tables.values()):
            x = self._dequantized(ids, positions, types)
            return _normalized(x, self.norm, None, reader, self.dtype)
        tables = (self.word, self.position, weight, bias, types, self.token_type, eps)
        if reader is None or reader.scale is None:
            return embedding(ids, positions, *tables).to(self.dtype), None
        x, x_q, x_scale = embedding_quantize(ids, positions, *tables)
        return x.to(self.dtype), (x_q, x_scale)

    def _dequantized(self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """The sum of the vectors that the tables give, where some are int8: float32 [N, C]."""
        terms = [
            rows.float() if scale is None else rows * scale.index_select(0, places)[:, None]
            for (weight, scale), places in zip(self.tables.values(), (ids, positions, types), strict=False)
            if places is not None
            for rows in [weight.index_select(0, places)]
        ]
        return sum(terms[1:], terms[0])

    def _layer(
        self,
        layer: Layer,
        x: torch.Tensor,
        codes: Codes | None,
        cu_seqlens: torch.Tensor,  # int32 [B+1]
        mask: torch.Tensor | None,
        reader: Linear | None,
        rows: torch.Tensor | None = None,  # of x, [M]; None = all
        largest: torch.Tensor | None = None,  # float32 [2]
        keys: torch.Tensor | None = None,  # bool [B, T]
        max_length: int | None = None,
    ) -> tuple[torch.Tensor, Codes | None]:
        """x [N or M, C] after one layer, and its codes if ``reader``, the linear layer after it, wants them."""
        if layer.heads:
            qkv = _linear(layer.qkv, x, codes).view(x.shape[0], 3, len(layer.heads), self.head_dim)
            if layer.mask is not None:
                mask = layer.mask if mask is None else mask * layer.mask
            q, k, v = qkv.unbind(1)
            if keys is None:
                context = attention(q, k, v, cu_seqlens, mask, max_length=max_length)
            else:
                q, k, v = (part.unflatten(0, keys.shape).transpose(1, 2) for part in (q, k, v))  # [B, H, T, D]
                context = F.scaled_dot_product_attention(q, k, v, keys[:, None, None, :])
                context = context.masked_fill(~keys.any(1)[:, None, None, None], 0)  # 0 without a key
                context = context if mask is None else context * mask[:, None, None]
                context = context.transpose(1, 2).flatten(0, 1)  # [N, H, D]
            context = context.flatten(1)  # [N, H_l·D]
            if rows is not None:
                context, x = context.index_select(0, rows), x.index_select(0, rows)  # [M, …]
            _raise(largest, 0, context)
            y = _linear(layer.out, context, scale=layer.context_scale)
        else:  # only its bias is left of the attention
            x = x if rows is None else x.index_select(0, rows)
            y = _bias_alone(layer.out, x)
        has_ffn = layer.ffn_in.weight.shape[0] > 0
        x, codes = _add_norm(y, x, layer.attention_norm, layer.ffn_in if has_ffn else None)
        if not has_ffn:
            y = _bias_alone(layer.ffn_out, x)
        elif layer.gelu_scale is None:
            y = _linear(layer.ffn_in, x, codes, "gelu")
            _raise(largest, 1, y)
            y = _linear(layer.ffn_out, y)
        else:  # the product's epilogue makes the codes
            y = _int8_linear(layer.ffn_in, codes, "gelu", out_scale=layer.gelu_scale)
            y = _int8_linear(layer.ffn_out, (y, layer.gelu_scale), out_dtype=x.dtype)
        return _add_norm(y, x, layer.ffn_norm, reader)


def _bias_alone(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of nothing, [N, C] as x."""
    return torch.zeros_like(x) if linear.bias is None else linear.bias.to(x.dtype).expand_as(x)


def _linear(
    linear: Linear,
    x: torch.Tensor,
    codes: Codes | None = None,
    activation: str | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [N, F] of x [N, C]; a quantized layer reads the codes of x, made here if its producer did not, by ``scale`` or
    by one a token.
    """
    if linear.scale is None:
        y = F.linear(x, linear.weight, linear.bias)
        return F.gelu(y) if activation == "gelu" else y
    return _int8_linear(linear, codes or quantize(x, scale), activation, out_dtype=x.dtype)


def _int8_linear(linear: Linear, codes: Codes | None, activation: str | None = None, **out: Any) -> torch.Tensor:
    assert codes is not None and linear.scale is not None
    return int8_linear(*codes, linear.weight, linear.scale, linear.bias, activation, **out)


def _raise(largest: torch.Tensor | None, place: int, x: torch.Tensor) -> None:
    """Let ``largest[place]`` be at least the largest magnitude in x."""
    if largest is not None and x.numel() > 0:
        largest[place] = torch.maximum(largest[place], x.abs().amax().float())


def _add_norm(y: torch.Tensor, x: torch.Tensor, norm: Norm, reader: Linear | None) -> tuple[torch.Tensor, Codes | None]:
    """LayerNorm(y + x), and its codes if ``reader`` wants them."""
    return _normalized(y, norm, x, reader, x.dtype)


def _normalized(
    y: torch.Tensor, norm: Norm, residual: torch.Tensor | None, reader: Linear | None, dtype: torch.dtype
) -> tuple[torch.Tensor, Codes | None]:
    """LayerNorm(y + residual) in a dtype, and its codes if ``reader`` wants them."""
    if reader is None or reader.scale is None:
        return layer_norm(y, norm.weight, norm.bias, residual, norm.eps).to(dtype), None
    y, y_q, y_scale = layer_norm_quantize(y, norm.weight, norm.bias, residual, norm.eps)
    return y.to(dtype), (y_q, y_scale)
