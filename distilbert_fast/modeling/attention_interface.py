"""``attn_implementation="distilbert_fast"``: the ``attention`` op inside transformers' own encoder classes.

transformers 5 asks two registries, one for the attention and one for the mask it gets; without the second the
mask is None and padding is attended to (transformers#45811). What arrives here:

- Self-attention of the encoders in ``ENCODERS`` gets the 2-D padding mask and goes to ``padded_attention``;
  its output at padded positions is 0, as with flash_attention_2.
- Everything else (causal, sliding-window, cross-attention, grouped heads, a mask of one's own, any other
  architecture) gets the mask of "sdpa" and goes to transformers' own sdpa function, so its numbers are sdpa's. So
  does all that is exported or traced (``exported``), of which the graph holds torch's ops alone, and all on a CPU
  for which there is no vector ISA tier, since sdpa's gradient is the faster one there.

Either way ``model(..., head_mask=m)`` works again: m multiplies each head's output, as it multiplied its
probabilities in transformers 4 (m is constant along the sum over keys, so both are the same), and gets a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from distilbert_fast.backends import without_vectors
from distilbert_fast.layers import exported, is_token, parse_head_mask, traced
from distilbert_fast.modeling.architectures import ARCHITECTURES
from distilbert_fast.ops import _check
from distilbert_fast.ops.attention import padded_attention

IMPLEMENTATION = "distilbert_fast"

# Encoders known to use a plain padding mask for self-attention only, each compared with sdpa by a test. Elsewhere
# a 2-D mask could belong to a cross-attention whose queries are all real.
ENCODERS = frozenset({*ARCHITECTURES, "albert"})

# Arguments with which some model changes what attention computes. sdpa honours the first two.
_VARIANTS = ("position_bias", "cache", "softcap", "s_aux")


def is_known(implementation: str) -> bool:
    """Whether the attention that models find under this name, and its mask, are transformers' own or ours, and nobody
    else's."""
    if ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) not in _MASKS:
        return False
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return implementation == "eager" if function is None else function in FUSED


def number_layers(model: Any) -> None:
    """Give every module of layer i the ``layer_idx`` i, where it has none.

    DistilBERT and some others do not number their layers, so a head mask [L, H] cannot be told apart by layer
    until this is called once. A mask [H] needs no numbers.

    Raises:
        ValueError: no list of ``config.num_hidden_layers`` layers in the model (as in ALBERT, which shares one).
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not layers:
        _check.refuse("number_layers", "model", f"made of a list of {count} layers", type(model).__name__)
    module: Any
    for layer_list in layers:
        for index, layer in enumerate(layer_list):
            for module in layer.modules():
                if getattr(module, "layer_idx", None) is None:
                    module.layer_idx = index


def attention_mask(
    mask_function: Any = None, attention_mask: torch.Tensor | None = None, config: Any = None, **kwargs: Any
) -> torch.Tensor | None:
    """The mask that ``attention_forward`` gets: None or bool [B, T] for plain encoders, else what sdpa gets."""
    plain = (
        getattr(config, "model_type", None) in ENCODERS
        and not getattr(config, "is_decoder", False)
        and mask_function is bidirectional_mask_function
    )
    if not plain:
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, config=config, **kwargs)
    if attention_mask is None:
        return None
    attention_mask = is_token(attention_mask)
    return None if not traced(attention_mask) and bool(attention_mask.all()) else attention_mask


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    head_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: the attention module; read for is_causal, layer_idx, num_key_value_groups and config.
        query, key, value: [B, H, T, D].
        attention_mask: from ``attention_mask`` above, or the 4-D mask that the caller of the model gave.
        head_mask: as the caller of the model gave it, [H], [L, H] or [L, 1 or B, H, 1, 1].

    Returns:
        [B, T, H, D]; probabilities [B, H, T, T] with output_attentions=True, else None.

    Raises:
        ValueError: a head_mask that does not fit the model, or a model with separate masks for encoder and
            decoder; probabilities of anything but plain attention.
    """
    mask = None if head_mask is None else _of_layer(head_mask, module, query)  # [H] or [B, H]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    variant = getattr(module, "num_key_value_groups", 1) > 1 or any(kwargs.get(n) is not None for n in _VARIANTS)
    plain = not variant and not (causal and attention_mask is None and query.shape[2] > 1)

    if kwargs.get("output_attentions"):
        if not plain:
            _check.refuse(IMPLEMENTATION, "output_attentions", "False for this attention; use 'eager'", True)
        return eager_attention(module, query, key, value, attention_mask, scaling, dropout, mask)

    by_token = attention_mask is None or attention_mask.dim() == 2
    ours = torch.compiler.is_compiling() or not (query.is_cpu and without_vectors())  # a graph has the op, which asks
    if ours and plain and by_token and not exported(query) and query.shape == key.shape == value.shape:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
        return padded_attention(q, k, v, attention_mask, mask, dropout, scaling), None

    if by_token and attention_mask is not None:
        attention_mask = attention_mask[:, None, None, :]
    if kwargs.get("s_aux") is not None:
        _check.refuse(IMPLEMENTATION, "s_aux", "None: attention sinks are not supported", "a tensor")
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return (output if mask is None else output * mask[..., None, :, None].to(output.dtype)), None


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    head_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of attention, with every probability stored, as transformers calls it.

    Args:
        attention_mask: [B, T], 0 = padding; or [B or 1, H or 1, T or 1, T], bool or added to the scores.
        head_mask: this layer's factors [H] or [B, H].
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        if attention_mask.dim() == 2:
            attention_mask = is_token(attention_mask)[:, None, None, :]
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(dim=-1), dropout)  # [B, H, T, T]
    if head_mask is not None:
        probabilities = probabilities * head_mask[..., None, None].to(scores.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _of_layer(head_mask: torch.Tensor, module: nn.Module, query: torch.Tensor) -> torch.Tensor:
    """The factors [H] or [B, H] of this layer's heads."""
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        _check.refuse(IMPLEMENTATION, "head_mask", "None for an encoder-decoder model", "a tensor")
    batch, heads = query.shape[:2]
    layers = getattr(config, "num_hidden_layers", None)
    left: Any = getattr(module, "heads", None)
    pruned = isinstance(left, tuple)
    heads = getattr(config, "num_attention_heads", heads) if pruned else heads
    mask = parse_head_mask(IMPLEMENTATION, head_mask, heads, layers, query.device, batch)
    if mask.dim() > 1:
        mask = _row(mask, module, heads, head_mask)
    return mask[..., list(left)] if pruned else mask


def _row(mask: torch.Tensor, module: nn.Module, heads: int, head_mask: torch.Tensor) -> torch.Tensor:
    """That of a mask [L, …] which belongs to a layer."""
    index = getattr(module, "layer_idx", None)
    if index is None:
        expected = (
            f"of shape [{heads}], since {type(module).__name__} does not know its layer"
            " (distilbert_fast.modeling.attention_interface.number_layers(model) tells it)"
        )
        _check.refuse(IMPLEMENTATION, "head_mask", expected, list(head_mask.shape))
    return mask[index]


# Known, and none returns probabilities.
FUSED = (attention_forward, flash_attention_forward, flex_attention_forward, sdpa_attention_forward)
_MASKS = (None, attention_mask, eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask)
AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
