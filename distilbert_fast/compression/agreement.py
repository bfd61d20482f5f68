"""What a model answers, as probabilities, and how far the answers of another are from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from distilbert_fast.layers import is_token
from distilbert_fast.modeling.architectures import head_of
from distilbert_fast.ops import _check


def answers(model: Any, batch: Mapping[str, torch.Tensor], caller: str) -> torch.Tensor:
    """log p, float64 [R, K], of what a model with a task head chooses between.

    R: sequences; tokens, of taggers and masked LM; starts and ends of spans, K positions each; or, where labels do not
    exclude each other, labels of sequences, K = 2: no and yes.

    Raises:
        TypeError: a model without such a head, by name, as ``caller``.
        ValueError: one whose head gives one number (regression).
    """
    given = {name: x.to(model.device) for name, x in batch.items()}
    output = model(**given)
    if "start_logits" in output:
        return torch.cat([output["start_logits"], output["end_logits"]]).double().log_softmax(-1)
    if "logits" not in output:
        expected = "one with a task head, whose answers are probabilities"
        _check.refuse(caller, "model", expected, type(model).__name__, TypeError)
    logits = output["logits"].double()
    if logits.shape[-1] < 2:
        _check.refuse(caller, "model", "one that chooses between 2 or more labels", "a regression")
    if logits.dim() == 3 and "attention_mask" in given:
        logits = logits[is_token(given["attention_mask"])]
    if model.config.problem_type == "multi_label_classification":
        logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
    return logits.flatten(0, -2).log_softmax(-1)


def has_answers(model: Any) -> bool:
    """Whether ``answers`` takes a model: it has a task head that chooses between 2 or more."""
    head = (head_of(type(model)) or (None, "Model"))[1]
    return head != "Model" and (head not in _LABELS or model.config.num_labels > 1)


_LABELS = ("ForSequenceClassification", "ForTokenClassification")


class Agreement(NamedTuple):
    """Of answers with those of a reference."""

    answers: int = 0
    kl_sum: float = 0.0  # Σ KL(reference ‖ answer), nats
    same: int = 0  # whose likeliest choice is the reference's

    def __add__(self, other: Any) -> Agreement:
        return Agreement(self.answers + other.answers, self.kl_sum + other.kl_sum, self.same + other.same)

    @property
    def kl(self) -> float:
        """The mean, in nats."""
        return self.kl_sum / max(self.answers, 1)

    @property
    def share(self) -> float:
        return self.same / max(self.answers, 1)


def agreement_of(found: torch.Tensor, reference: torch.Tensor) -> Agreement:
    """Of log p [R, K] with reference log p [R, K]."""
    kl = (reference.exp() * (reference - found)).sum(-1)
    same = found.argmax(-1) == reference.argmax(-1)
    return Agreement(len(kl), float(kl.sum()), int(same.sum()))
