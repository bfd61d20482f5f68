"""Which calls of an encoder the engine serves, by their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distilbert_fast.modeling.attention_interface import is_known

FLAGS = ("output_attentions", "output_hidden_states")
_SERVED = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "head_mask",
    "keep_padding",
    "first_rows",
    "return_dict",
    "use_cache",  # an encoder has no cache
    "num_items_in_batch",  # for losses
    "output_router_logits",  # an encoder of these has no router
    *FLAGS,
}
# With these some attention or encoder of transformers computes something else.
_CHANGES_RESULTS = {
    "inputs_embeds",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "cache",
    "is_causal",
    "softcap",
    "s_aux",
    "sliding_window",
    "seq_idx",
    *(f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"),
}
_OWN_ATTENTIONS = ("sdpa", "eager", "distilbert_fast")  # which ignore every other argument


@functools.cache
def _is_read(name: str, names: tuple[str, ...], attention: str) -> bool:
    """Whether an argument that the engine does not know may change the result.

    Args:
        names: the encoder's own; every other one goes to the attention.
    """
    if name in names or name in _CHANGES_RESULTS or attention not in _OWN_ATTENTIONS:
        return True
    function: Any = ALL_ATTENTION_FUNCTIONS.get("sdpa" if attention == "eager" else attention)
    return name in inspect.signature(function).parameters


def why_not(
    given: Mapping[str, Any],
    names: tuple[str, ...],
    attention: str,
    attentions: Any,
    hidden_states: Any,
    honoured: bool,
) -> str | None:
    """Why the encoder's own forward must serve a call; None if the engine can.

    Args:
        given: the arguments of the call, but those that are None.
        names: those that its own forward has names for.
        attention: the config's attn_implementation.
        attentions, hidden_states: whether they are wanted, by the call or else by the config.
        honoured: whether its own forward knows head masks, also of more dimensions than the engine does.
    """
    input_ids, attention_mask, head_mask = map(given.get, ("input_ids", "attention_mask", "head_mask"))
    if input_ids is None:
        return "no input_ids"
    for name in given:
        if name not in _SERVED and _is_read(name, names, attention):
            return f"argument {name}"
    if not is_known(attention):
        return f"attention {attention!r}"
    if attentions:
        return "output_attentions"
    if not isinstance(hidden_states, (bool, type(None))):
        return "output_hidden_states of some layers"
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        return "input_ids and attention_mask that are not [B, T]"
    if isinstance(head_mask, torch.Tensor) and head_mask.dim() > 2 and honoured:
        return "a head_mask of more than 2 dimensions"
    return "autocast" if torch.is_autocast_enabled(input_ids.device.type) else None
