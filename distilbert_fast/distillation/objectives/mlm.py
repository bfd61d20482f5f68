"""The objective of pretraining: DistilBERT's triple loss, and what others have added to it.

    kl        τ² KL(teacher ‖ student) of the vocabulary        over tokens, or over masked tokens only
    mlm       cross-entropy                                     over masked tokens
    cos       1 − cos of the last hidden states                 over tokens
    mse       Σ_v (student − teacher logit)²                    as kl
    hidden    mean over layer pairs of squared error / C, or of 1 − cos, of hidden states      over tokens
    relation  self-attention relations of the last layer        over tokens

Sanh, Debut, Chaumond, Wolf: DistilBERT, arXiv:1910.01108 (kl, mlm, cos; mse is in its code). Sun, Cheng, Gan, Liu:
Patient Knowledge Distillation, arXiv:1908.09355, and Jiao et al.: TinyBERT, arXiv:1909.10351 (hidden). Wang et al.:
MiniLMv2, arXiv:2012.15828 (relation).

The original divides each loss by the rows of its own micro-batch; here see ``objectives``. Only rows that a loss counts
go through the head, whose logits are never stored (``linear_kl_div``), and only losses of some weight are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilbert_fast.data import IGNORED
from distilbert_fast.distillation.objectives.relations import relation_kl
from distilbert_fast.distillation.objectives.task import OP, VOCABULARY, Step, check_models, need, tokens
from distilbert_fast.distillation.schedule import Scheduled, at, is_zero
from distilbert_fast.distillation.teachers.model import (
    Batch,
    Projection,
    Teacher,
    TeacherAnswer,
    encode,
    full,
    hidden_rows,
    last_attention_inputs,
    model_of,
)
from distilbert_fast.modeling.vocabulary import vocabulary_head
from distilbert_fast.ops._check import choice, refuse
from distilbert_fast.ops.cosine_loss import cosine_loss

LOSSES = ("kl", "mlm", "cos", "mse", "hidden", "relation")


@dataclass(frozen=True)
class MlmObjective:
    """The objective of masked language modelling; the module's docstring gives the losses.

    Attributes:
        temperature: τ of kl.
        kl, mlm, cos, mse, hidden, relation: weights; the defaults are the original's recipe.
        kd_positions: "real" tokens or "masked" ones, for kl and mse.
        hidden_loss: "mse" or "cosine".
        layer_map: (layer of the student, layer of the teacher) pairs, counted from 0, for hidden.
        relation_heads: A of relation.

    A batch holds input_ids and labels [B, T], -100 where nothing was masked, and attention_mask [B, T].
    """

    temperature: Scheduled = 2.0
    kl: Scheduled = 5.0
    mlm: Scheduled = 2.0
    cos: Scheduled = 1.0
    mse: Scheduled = 0.0
    hidden: Scheduled = 0.0
    relation: Scheduled = 0.0
    kd_positions: str = "real"
    hidden_loss: str = "mse"
    layer_map: tuple[tuple[int, int], ...] = ()
    relation_heads: int = 12
    columns = ("labels", "attention_mask", "example")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in LOSSES if not is_zero(getattr(self, name)))

    def check(self, student: Any, teacher: Teacher | None) -> None:
        choice(OP, "kd_positions", self.kd_positions, ("real", "masked"))
        choice(OP, "hidden_loss", self.hidden_loss, ("mse", "cosine"))
        vocabulary_head(student, OP)
        names = self.names
        if not names:
            refuse(OP, "the weight of one loss at least", "above 0", f"0 for {', '.join(LOSSES)}")
        taught = [name for name in names if name != "mlm"]
        if teacher is None and taught:
            refuse(OP, "teacher", f"given for {', '.join(taught)}", "None")
        if (model := model_of(teacher)) is None:
            return
        check_models(student, model, VOCABULARY)
        if {"kl", "mse"} & {*names}:
            vocabulary_head(model, OP)
        widths = student.config.hidden_size, model.config.hidden_size
        for name in ("cos", "hidden"):
            if name in names and widths[0] != widths[1]:
                raise ValueError(
                    f"{OP}: the weight of {name} must be 0 for a student of another hidden size than its teacher "
                    f"(relation can take its place), got {widths[0]} and {widths[1]}"
                )
        if "relation" in names and any(width % self.relation_heads for width in widths):
            raise ValueError(
                f"{OP}: relation_heads must divide both hidden sizes, {widths[0]} and {widths[1]}, "
                f"got {self.relation_heads}"
            )
        depths = student.config.num_hidden_layers, model.config.num_hidden_layers
        if "hidden" in names and (not self.layer_map or not all(_inside(pair, depths) for pair in self.layer_map)):
            refuse(OP, "layer_map", f"pairs of 0 to {depths[0] - 1} and 0 to {depths[1] - 1}", list(self.layer_map))

    def weights(self, progress: float) -> tuple[float, ...]:
        return tuple(at(getattr(self, name), progress) for name in self.names)

    def counts(self, batch: Batch) -> Tensor:
        real, labels = tokens(batch), self._labels(batch)
        every, masked = real.sum(), (labels != IGNORED).sum()
        kd = every if self.kd_positions == "real" else masked
        rows = {"kl": kd, "mse": kd, "mlm": masked}
        return torch.stack([rows.get(name, every) for name in self.names])

    def __call__(self, student: Any, teacher: Teacher | None, batch: Batch, progress: float) -> Step:
        names, real = self.names, tokens(batch)
        deep = "relation" in names or "hidden" in names
        encoded = encode(student.base_model, batch, hidden_states=deep)
        answer = None if teacher is None or names == ("mlm",) else teacher.answer(batch, hidden_states=deep)
        losses: dict[str, Tensor] = {}
        if {"kl", "mlm", "mse"} & {*names}:
            losses |= self._vocabulary(student, encoded, answer, batch, progress)
        if answer is not None and {"cos", "hidden"} & {*names}:
            rows = _where(real)
            if "cos" in names:
                losses["cos"] = cosine_loss(hidden_rows(encoded, rows), answer.hidden(rows), reduction="sum")
            if "hidden" in names:
                losses["hidden"] = self._hidden(encoded, answer, rows)
        if answer is not None and "relation" in names:
            mine = last_attention_inputs(student.base_model, encoded)
            losses["relation"] = relation_kl(mine, answer.attention_inputs(), real, self.relation_heads)
        return Step(torch.stack([losses[name] for name in names]), None)

    def _vocabulary(
        self, student: Any, encoded: Any, answer: TeacherAnswer | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        labels = self._labels(batch).flatten()
        taught = {"kl", "mse"} & {*self.names}
        # masked tokens are tokens: the rows of both losses are the larger set of the two
        rows = _where(tokens(batch) if taught and self.kd_positions == "real" else labels != IGNORED)
        head = vocabulary_head(student, OP)
        h = head.transform(hidden_rows(encoded, rows))  # [R, C]
        labels = labels[rows] if "mlm" in self.names else labels.new_full(rows.shape, IGNORED)
        soft = (
            answer.soft_targets(rows)
            if answer is not None and taught
            else Projection.of(h, head.projection)  # no row of it is projected
        )
        kd_mask = torch.full(rows.shape, "kl" in self.names, device=rows.device)
        kl, mlm = soft.losses(h, head.projection, at(self.temperature, progress), kd_mask, labels)
        losses = {"kl": kl, "mlm": mlm}
        if "mse" in self.names:
            losses["mse"] = soft.squared_error(h, head.projection)
        return losses

    def _hidden(self, encoded: Any, answer: TeacherAnswer, rows: Tensor) -> Tensor:
        total = torch.zeros((), device=rows.device)
        for mine, theirs in self.layer_map:
            s, t = hidden_rows(encoded, rows, mine), answer.hidden(rows, theirs)  # [N, C]
            if self.hidden_loss == "cosine":
                total = total + cosine_loss(s, t, reduction="sum")
            else:
                total = total + (full(s) - full(t)).square().sum() / s.shape[1]
        return total / len(self.layer_map)

    def _labels(self, batch: Batch) -> Tensor:
        return need(batch, "labels").masked_fill(~tokens(batch), IGNORED)  # [B, T]


def even_layer_map(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pair each layer of a student with the last of its share of the teacher's (TinyBERT): 1, 3, … 11 for 6 of 12."""
    return tuple((i, (i + 1) * teacher // student - 1) for i in range(student))


def _inside(pair: tuple[int, int], depths: tuple[int, int]) -> bool:
    return all(0 <= layer < depth for layer, depth in zip(pair, depths, strict=True))


def _where(mask: Tensor) -> Tensor:
    """Places [R] in the flattened [B·T]."""
    return mask.flatten().nonzero().flatten()
