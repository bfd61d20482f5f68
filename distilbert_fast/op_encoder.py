"""An encoder computed op by op, by whichever backend serves each: on a GPU, and wherever the C++ encoder cannot.

    embedding → per layer: QKV → attention → out → LayerNorm(+x) → FFN in, GELU → FFN out → LayerNorm(+x)

Shapes: B batch, N tokens, C hidden, H heads, D head size, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distilbert_fast.ops.attention import attention
from distilbert_fast.ops.embedding import embedding, embedding_quantize
from distilbert_fast.ops.int8_linear import int8_linear
from distilbert_fast.ops.layer_norm import layer_norm, layer_norm_quantize
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.packing import EncoderModules, Layer, Linear, Norm, pack_norm

Codes = tuple[torch.Tensor, torch.Tensor]  # int8 codes [N, C] and their scales [N]


class OpEncoder:
    """Packed layers and the tables they share with the model.

    Args:
        model: where the tables are.
        layers: its layers, packed.
        dtype: of activations between the linear layers.
    """

    def __init__(self, model: EncoderModules, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.word, self.position = model.word.weight.detach(), model.position.weight.detach()
        self.token_type = None if model.token_type is None else model.token_type.weight.detach()
        self.norm = pack_norm(model.norm)
        self.layers, self.head_dim, self.dtype = tuple(layers), model.head_dim, dtype

    def run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        types: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        head_masks: Sequence[torch.Tensor | None],
        hidden_states: bool = False,
    ) -> list[torch.Tensor]:
        """Hidden states [N, C] of packed tokens in the dtype of the word table: the last, or the embeddings and the
        output of each layer.

        Args:
            ids, positions, types: [N]; types where the model has them.
            cu_seqlens: int32 [B + 1].
            head_masks: for each layer None or a factor for each of its heads [H_i].
        """
        x, codes = self._embed(ids, positions, types)
        states = [x]
        for i, layer in enumerate(self.layers):
            reader = self.layers[i + 1].qkv if i + 1 < len(self.layers) else None
            x, codes = self._layer(layer, x, codes, cu_seqlens, head_masks[i], reader)
            states = [*states, x] if hidden_states else [x]
        return [state.to(self.word.dtype) for state in states]

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
        cu_seqlens: torch.Tensor,  # int32 [B+1]
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
