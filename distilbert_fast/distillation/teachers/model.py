"""What an objective asks of a teacher, and the teacher that is a model.

A teacher answers a batch. The answer is asked for rows of the flattened batch [B·T], so that nothing is computed, kept
or read where no loss looks. Another kind of teacher (an int8 engine, logits stored on disk) is another class with these
methods. Its soft targets bring the loss that compares them with a student's rows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from distilbert_fast.data import IGNORED
from distilbert_fast.engine.engine import PRECISIONS
from distilbert_fast.modeling.encoder import encoder_layers, part
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.modeling.vocabulary import vocabulary_head
from distilbert_fast.ops import _check
from distilbert_fast.ops.linear_kl_div import linear_kl_div
from distilbert_fast.runs.resume_settings import describe_model

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]


class SoftTargets(Protocol):
    """A teacher's distribution over the vocabulary for R rows."""

    def losses(
        self, h: Tensor, projection: torch.nn.Linear, temperature: float, kd_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of τ² KL(teacher ‖ student) over kd_mask [R] and of −log p_student[label] over labels [R] ≠ -100.

        The student's logits are projection(h), h [R, C_s]; they need never be stored.
        """

    def squared_error(self, h: Tensor, projection: torch.nn.Linear) -> Tensor:
        """Sum over all rows of Σ_v (student − teacher logit)². A teacher without all logits raises ValueError."""


class TeacherAnswer(Protocol):
    """A teacher's answer to one batch, without gradient. ``rows`` are int64 places in the flattened [B·T]."""

    def logits(self) -> Any:
        """The output of the task head, as transformers returns it."""

    def soft_targets(self, rows: Tensor) -> SoftTargets: ...

    def hidden(self, rows: Tensor, layer: int = -1) -> Tensor:
        """Hidden states [R, C_t] after a layer, by default the last one."""

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, C_t] of the last layer."""


class Teacher(Protocol):
    @property
    def model(self) -> Any:
        """The transformers model, to be checked against the student; None if the teacher is no model."""

    def answer(self, batch: Batch, hidden_states: bool = False) -> TeacherAnswer:
        """``hidden_states``: other layers than the last will be asked for, or the attention's inputs."""

    def check(self, objective: Any) -> None:
        """Raise ValueError for an objective that needs answers which this teacher cannot give."""

    def prepare(self, device: torch.device) -> None:
        """Called once before training."""

    def describe(self) -> Any:
        """The settings that must be the same to resume a run, as JSON types."""

    @property
    def columns(self) -> Iterable[str]:
        """The columns of a batch that it reads."""


class Projection(NamedTuple):
    """Soft targets that are not computed yet: logits = h Wᵀ + b; h [R, C_t], W [V, C_t], b [V] or None."""

    h: Tensor
    W: Tensor
    b: Tensor | None

    @classmethod
    def of(cls, h: Tensor, projection: torch.nn.Linear) -> Projection:
        """Without gradient."""
        bias = projection.bias
        return cls(h.detach(), projection.weight.detach(), None if bias is None else bias.detach())

    def losses(
        self, h: Tensor, projection: torch.nn.Linear, temperature: float, kd_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_student = h, projection.weight, projection.bias
        return linear_kl_div(*of_student, *self, temperature, kd_mask, labels, IGNORED, "sum")

    def squared_error(self, h: Tensor, projection: torch.nn.Linear) -> Tensor:
        total = h.new_zeros(())
        rows = max(1, 2**24 // len(self.W))  # 64 MB of logits at a time
        for of_student, of_teacher in zip(h.split(rows), self.h.split(rows), strict=True):
            total = total + checkpoint(self._squared_error, of_student, of_teacher, projection, use_reentrant=False)
        return total

    def _squared_error(self, h_s: Tensor, h_t: Tensor, projection: torch.nn.Linear) -> Tensor:
        return (full(projection(h_s)) - full(torch.nn.functional.linear(h_t, self.W, self.b))).square().sum()


TEACHER_PRECISIONS = ("auto", "model", *PRECISIONS)


class ModelTeacher:
    """A transformers model, in eval mode and without gradients.

    Args:
        model: the teacher. It is not changed; the engine's copy of its encoder follows its weights.
        precision: what computes its encoder. "fp32", "bf16", "fp16" or "int8": the engine, see ``optimize``; the
            student's autocast does not reach it, a task head keeps the dtype of the model. "model": the model's own
            forward under the student's autocast, unless one of them is float16 and the other bfloat16. "auto": on a
            CPU the engine in the precision that the model has, if it takes the model; else as "model".
            ``teacher_effect`` tells what a precision costs.

    Raises:
        TypeError, ValueError: in ``prepare``, a precision asked for by name of a model that the engine does not take.
    """

    def __init__(self, model: PreTrainedModel, precision: str = "auto") -> None:
        _check.choice("ModelTeacher", "precision", precision, TEACHER_PRECISIONS)
        self.model: Any = model
        self.precision = precision
        self._served: tuple[Any, bool] | None = None

    @property
    def columns(self) -> set[str]:
        return accepted_inputs(self.model)

    def check(self, objective: Any) -> None:
        """A model has all that an objective may ask for."""

    def prepare(self, device: torch.device) -> None:
        torch.nn.Module.to(self.model, device).eval()
        self._served = self._serve()

    def describe(self) -> Any:
        return describe_model(self.model, weights=True) | {"precision": self.precision}

    def answer(self, batch: Batch, hidden_states: bool = False) -> ModelAnswer:
        if self._served is None:
            self._served = self._serve()
        return ModelAnswer(*self._served, batch, hidden_states)

    def _serve(self) -> tuple[Any, bool]:
        """The model whose forward answers, and whether that is the engine's."""
        if self.precision not in ("auto", "model"):
            return _with_engine(self.model, self.precision), True
        if self.precision == "auto" and self.model.device.type == "cpu":
            try:
                return _with_engine(self.model, None), True
            except (TypeError, ValueError) as error:
                logger.info("the teacher runs by its own forward: %s", error)
        return self.model, False


def _with_engine(model: Any, precision: str | None) -> Any:
    """Another object of the same modules and weights, whose encoder runs on the engine."""
    whole = copy.copy(model)
    if model.base_model is not model:
        whole._modules = {**model._modules, model.base_model_prefix: copy.copy(model.base_model)}
    return optimize(whole, precision, keep_padding=False)  # no loss counts what is on padding


class ModelAnswer:
    """The encoder or the whole model runs when first asked, once."""

    def __init__(self, model: Any, by_engine: bool, batch: Batch, hidden_states: bool) -> None:
        self.model, self.by_engine, self.batch, self.hidden_states = model, by_engine, batch, hidden_states
        self._encoded: Any = None

    def logits(self) -> Any:
        with torch.no_grad(), own_precision(self.model, self.by_engine):
            return head_output(self.model, self.batch)

    def soft_targets(self, rows: Tensor) -> Projection:
        head = vocabulary_head(self.model, "teacher")
        with torch.no_grad(), own_precision(self.model):
            h = head.transform(self.hidden(rows))  # [R, C_t]
        return Projection.of(h, head.projection)

    def hidden(self, rows: Tensor, layer: int = -1) -> Tensor:
        return hidden_rows(self._encode(), rows, layer)

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self._encode()
        with torch.no_grad(), own_precision(self.model):
            return last_attention_inputs(self.model.base_model, encoded)

    def _encode(self) -> Any:
        if self._encoded is None:
            with torch.no_grad(), own_precision(self.model, self.by_engine):
                self._encoded = encode(self.model.base_model, self.batch, self.hidden_states)
        return self._encoded


def model_of(teacher: Teacher | None) -> Any:
    return None if teacher is None else teacher.model


# What students and teachers that are models have in common ---------------------------------------------------------


def own_precision(model: Any, by_engine: bool = False) -> contextlib.AbstractContextManager[Any]:
    """No autocast for an engine, nor for weights in the half precision that it is not, whose modules fail in it."""
    device = model.device.type
    other = model.dtype in {torch.bfloat16, torch.float16} - {torch.get_autocast_dtype(device)}
    return torch.autocast(device, enabled=False) if by_engine or other else contextlib.nullcontext()


def accepted_inputs(model: torch.nn.Module) -> set[str]:
    """Names that the model's forward spells out; what would vanish in its ``**kwargs`` is not among them."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - _LABELS


_LABELS = {"labels", "start_positions", "end_positions"}


def only(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: inputs[name] for name in names if name in inputs}


def full(x: Tensor) -> Tensor:
    """Convert to float32, unless the dtype is wider."""
    return x if x.dtype == torch.float64 else x.float()


def head_output(model: Any, batch: Batch) -> Any:
    """A model's output by name, whatever its config says."""
    return model(**only(batch, accepted_inputs(model)), return_dict=True)


def encode(encoder: Any, batch: Batch, hidden_states: bool = False) -> Any:
    """An encoder's output: ``last_hidden_state`` [B, T, C] and, if asked for, all ``hidden_states``."""
    return encoder(**only(batch, accepted_inputs(encoder)), output_hidden_states=hidden_states, return_dict=True)


def hidden_rows(encoded: Any, rows: Tensor, layer: int = -1) -> Tensor:
    """[R, C] after a layer; hidden_states[0] is the input of the first one."""
    states = encoded.last_hidden_state if layer == -1 else encoded.hidden_states[layer + 1]
    return states.flatten(0, 1).index_select(0, rows)


def last_attention_inputs(encoder: Any, encoded: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, C] of the last layer, computed again from its input."""
    x, layer = encoded.hidden_states[-2], encoder_layers(encoder)[-1]
    query, key, value = (part(encoder, layer, name)(x) for name in ("query", "key", "value"))
    return query, key, value
