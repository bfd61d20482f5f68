"""The masked-LM heads of transformers that this package knows, cut in two: what is computed for each row, and the
projection to the vocabulary, which a fused loss makes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.activations import gelu
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.roberta import modeling_roberta

from distilbert_fast.ops import _check


class VocabularyHead(NamedTuple):
    """logits = projection(transform(hidden)); hidden [R, C], logits [R, V]."""

    transform: Callable[[Tensor], Tensor]
    projection: nn.Linear


def vocabulary_head(model: Any, caller: str) -> VocabularyHead:
    """The head of a DistilBERT, BERT or RoBERTa for masked LM; its modules are shared, not copied.

    Raises:
        TypeError: ``model`` is none of these, by name, as ``caller``.
    """
    if isinstance(model, modeling_distilbert.DistilBertForMaskedLM):

        def transform(x: Tensor) -> Tensor:
            return model.vocab_layer_norm(model.activation(model.vocab_transform(x)))

        return VocabularyHead(transform, model.vocab_projector)
    if isinstance(model, modeling_bert.BertForMaskedLM):
        head = model.cls.predictions
        return VocabularyHead(head.transform, head.decoder)
    if isinstance(model, modeling_roberta.RobertaForMaskedLM):
        lm_head = model.lm_head

        def transform(x: Tensor) -> Tensor:
            return lm_head.layer_norm(gelu(lm_head.dense(x)))

        return VocabularyHead(transform, lm_head.decoder)
    _check.refuse(caller, "model", "a DistilBERT, BERT or RoBERTa for masked LM", type(model).__name__, TypeError)
