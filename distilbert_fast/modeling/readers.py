"""Who reads what an encoder puts out: whether they see more than the tokens, or than the first of each sequence."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from distilbert_fast.modeling.architectures import Architecture, architecture_of
from distilbert_fast.modeling.distilbert_modules import is_blind
from distilbert_fast.sparse import LINEARS

# What they put out at a position depends on what they read there alone; losses, which read labels too, see to padding.
_BY_POSITION = frozenset(
    {*LINEARS, nn.Dropout, nn.Identity, nn.LayerNorm, nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid, GELUActivation}
    | {nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss}
)
_AROUND = frozenset({nn.ModuleDict, nn.ModuleList, nn.Sequential})
_CALL = nn.Module._call_impl.__code__  # by which every module is called, whatever its forward is named


def is_observed(encoder: nn.Module) -> bool:
    """Whether something stands between an optimized encoder and its caller: a hook, a forward or a class of somebody's
    own, or a pooler."""
    own = vars(encoder)
    between = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    return bool(between) or "_exchanged" not in vars(type(encoder)) or not _has_own_pooler(encoder)


def is_own_head(model: PreTrainedModel, encoder: nn.Module) -> bool:
    """Whether what reads an encoder's output are the modules that transformers gave the model, and nobody looks on."""
    known = architecture_of(encoder)
    heads = (child for child in model._modules.values() if child is not None and child is not encoder)
    return known is not None and all(_is_plain(head, known) for head in heads) and _has_own_pooler(encoder)


def _has_own_pooler(encoder: nn.Module) -> bool:
    pooler, known = encoder._modules.get("pooler"), architecture_of(encoder)
    return pooler is None or (known is not None and _is_plain(pooler, known))


def _is_plain(module: nn.Module, known: Architecture) -> bool:
    own, kind = vars(module), type(module)
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    replaced = "forward" in own and not is_blind(type(own.get("_hf_hook")))
    if replaced or not all(map(is_blind, hooks)):
        return False
    if kind in _BY_POSITION or is_blind(kind):
        return True
    return (known.defines(kind) or kind in _AROUND) and all(_is_plain(x, known) for x in own["_modules"].values() if x)


def is_unknown(encoder: nn.Module) -> bool:
    """Whether a module that may read padded positions calls the encoder: a module around it that was not given to
    ``optimize``, such as a head for question answering, or a class of the user's.

    Pooling of sentence-transformers does not: it reads the mask.
    """
    frame: Any = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _CALL or frame.f_code.co_name == "forward":
            caller = frame.f_locals.get("self")
            if isinstance(caller, nn.Module) and encoder not in (caller, getattr(caller, "_orig_mod", None)):
                return not type(caller).__module__.startswith("sentence_transformers.")
    return False
