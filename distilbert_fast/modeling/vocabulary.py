"""The masked-LM heads of transformers that this package knows, split into two parts: the transform of each row, and
the projection to the vocabulary, which a fused loss computes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.activations import gelu

from distilbert_fast.modeling.architectures import head_of
from distilbert_fast.ops import _check


class VocabularyHead(NamedTuple):
    """logits = projection(transform(hidden)); hidden [R, C], logits [R, V]."""

    transform: Callable[[Tensor], Tensor]
    projection: nn.Linear


def vocabulary_head(model: Any, caller: str) -> VocabularyHead:
    """The head of an encoder of ``ARCHITECTURES`` for masked LM; its modules are shared, not copied.

    Raises:
        TypeError: ``model`` is none of these, by name, as ``caller``.
    """
    architecture, head = head_of(type(model)) or (None, "")
    if architecture is None or head != "ForMaskedLM":
        _check.refuse(caller, "model", "a DistilBERT, BERT or RoBERTa for masked LM", type(model).__name__, TypeError)
    parts = architecture.heads[head]
    dense, norm, projection = (attrgetter(parts[part])(model) for part in ("transform", "norm", "projection"))
    if architecture.vocabulary_transform is not None:
        return VocabularyHead(attrgetter(architecture.vocabulary_transform)(model), projection)
    name = architecture.vocabulary_activation
    activation = gelu if name is None else attrgetter(name)(model)
    return VocabularyHead(lambda x: norm(activation(dense(x))), projection)
