"""Who reads what an encoder puts out: whether they see more than the tokens, or than the first of each sequence."""

from __future__ import annotations

import functools
import inspect
import sys
from operator import attrgetter
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from distilbert_fast.modeling.architectures import Architecture, architecture_of, first_token_reader, is_of_library
from distilbert_fast.modeling.distilbert_modules import is_blind
from distilbert_fast.modeling.snapshot import is_patched, own_class
from distilbert_fast.sparse import LINEARS

# What they put out at a position depends on what they read there alone; losses, which read labels too, see to padding.
_BY_POSITION = frozenset(
    {*LINEARS, nn.Dropout, nn.Identity, nn.LayerNorm, nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid, GELUActivation}
    | {nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss}
)
_AROUND = frozenset({nn.ModuleDict, nn.ModuleList, nn.Sequential})
_CALL = nn.Module._call_impl.__code__  # by which every module is called, whatever its forward is named


_POOLED = frozenset(  # of sentence-transformers: what reads an encoder there by its mask, and what reads that
    {"Transformer", "MLMTransformer", "Pooling", "SpladePooling", "Normalize", "Dense", "Dropout", "LayerNorm"}
)


def is_observed(encoder: nn.Module) -> bool:
    """Whether something stands between an optimized encoder and its caller: a hook, a forward or a class of somebody's
    own, or a pooler."""
    own = vars(encoder)
    between = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_call_impl" in own
    return bool(between) or "_exchanged" not in vars(type(encoder)) or not _has_own_pooler(encoder)


def is_own_head(model: PreTrainedModel, encoder: nn.Module) -> bool:
    """Whether what reads an encoder's output are the modules that transformers gave the model, and nobody looks on."""
    known, kind = architecture_of(encoder), cast(Any, own_class(model))
    if known is None or not is_of_library(kind.forward):
        return False
    heads = (child for child in model._modules.values() if child is not None and child is not encoder)
    return all(_is_plain(head, known) for head in heads) and _has_own_pooler(encoder)


def reads_first_token(model: PreTrainedModel, kind: type) -> bool:
    """Whether a model reads the encoder's output at position 0 alone.

    Args:
        kind: its class, before ``optimize``.
    """
    known, path = first_token_reader(kind)
    if known is None or path is None:
        return known is not None
    reader = attrgetter(path)(model)  # its pooler or head
    return known.defines(type(reader)) and _is_plain(reader, known)


def _has_own_pooler(encoder: nn.Module) -> bool:
    pooler, known = encoder._modules.get("pooler"), architecture_of(encoder)
    return pooler is None or (known is not None and _is_plain(pooler, known))


def _is_plain(module: nn.Module, known: Architecture) -> bool:
    own, kind = vars(module), cast(Any, type(module))
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    replaced = is_patched(module) and not is_blind(type(own.get("_hf_hook")))
    if replaced or not all(map(is_blind, hooks)):
        return False
    if is_blind(kind):
        return True
    if not is_of_library(kind.forward):
        return False
    if kind in _BY_POSITION:
        return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
    inside = (_is_plain(x, known) for x in own["_modules"].values() if x is not None)
    return (_is_head(kind, known) or kind in _AROUND) and all(inside)


@functools.cache
def _is_head(kind: type, known: Architecture) -> bool:
    """Whether a class of transformers is a head, or a part of one, that reads each position, or the first, alone."""
    named = any(part in kind.__name__ for part in ("Head", "Pooler", "Predictions", "SequenceSummary"))
    return known.defines(kind) and named and "Attention" not in kind.__name__


def is_unknown(encoder: nn.Module) -> bool:
    """Whether a module that may read padded positions calls the encoder: a module around it that was not given to
    ``optimize``, such as a head for question answering, or a class of the user's.

    Pooling of sentence-transformers does not: it reads the mask.
    """
    frame: Any = sys._getframe(1)
    inner: nn.Module | None = None  # of sentence-transformers, around the encoder
    while frame.f_back is not None:
        frame = frame.f_back
        caller = _first_argument(frame)
        if (
            not isinstance(caller, nn.Module)
            or caller is inner
            or encoder in (caller, getattr(caller, "_orig_mod", None))
        ):
            continue
        called = frame.f_code is _CALL or frame.f_code.co_name == "forward"
        if not called and not any(module is encoder for module in caller.modules()):
            continue
        if not type(caller).__module__.startswith("sentence_transformers."):
            return True
        if inner is not None:
            return not all(_pools(child) for child in caller.children())
        inner = caller
    return inner is not None


def _first_argument(frame: Any) -> Any:
    code, found = frame.f_code, frame.f_locals
    if code.co_argcount:
        return found.get(code.co_varnames[0])
    given = found.get(code.co_varnames[code.co_kwonlyargcount]) if code.co_flags & inspect.CO_VARARGS else None
    return given[0] if given else None


def _pools(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("sentence_transformers.") and kind.__name__ in _POOLED
