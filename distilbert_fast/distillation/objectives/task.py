"""What a student is trained for: the named losses of a batch, each a sum over its own rows, and how many those are.

Losses are sums because only the trainer knows by what to divide: the rows that a loss counts in all batches that are
accumulated and in all processes. A mean of the means of parts is another loss wherever parts differ in their counts.

Here are the objectives of models with a task head; ``mlm`` has that of pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distilbert_fast.data import IGNORED
from distilbert_fast.distillation.objectives.losses import task_loss
from distilbert_fast.distillation.objectives.relations import EXCLUDED
from distilbert_fast.distillation.schedule import Scheduled, at, bounds, is_zero
from distilbert_fast.distillation.teachers.model import Batch, Teacher, full, head_output, model_of
from distilbert_fast.ops._check import refuse
from distilbert_fast.ops.kl_div import kl_div

OP = "DistillationTrainer"


class Step(NamedTuple):
    """Sums of the losses [L] in the order of the objective's names; the student's output if a task head made one."""

    sums: Tensor
    output: Any


class Objective(Protocol):
    """An objective. It is frozen, and its repr names all its settings, which are compared when a run is resumed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the L losses that are computed."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a batch that the losses read, but neither model."""

    def check(self, student: Any, teacher: Teacher | None) -> None:
        """Raise TypeError or ValueError for models that do not fit each other or this objective, by name."""

    def weights(self, progress: float) -> tuple[float, ...]:
        """Weights of the losses at a share 0 … 1 of the run."""

    def counts(self, batch: Batch) -> Tensor:
        """int64 [L]: the rows that each loss counts, from the batch alone."""

    def __call__(self, student: Any, teacher: Teacher | None, batch: Batch, progress: float) -> Step: ...


class _TaughtAndLabelled:
    """Two losses: of the teacher's answers, with the weight alpha, and of the labels, with 1 - alpha."""

    alpha: Scheduled
    loss_names = ("kl", "ce")

    @property
    def names(self) -> tuple[str, ...]:
        return self.loss_names[1:] if is_zero(self.alpha) else self.loss_names

    def weights(self, progress: float) -> tuple[float, ...]:
        alpha = at(self.alpha, progress)
        return (1.0,) if is_zero(self.alpha) else (alpha, 1 - alpha)

    def _need_teacher(self, teacher: Teacher | None) -> None:
        if teacher is None and not is_zero(self.alpha):
            given = bounds(self.alpha)[1]
            refuse(OP, "teacher", "given for alpha above 0", f"None for {given}")


@dataclass(frozen=True)
class TaskObjective(_TaughtAndLabelled):
    """α · τ² KL(teacher ‖ student) + (1 − α) · CE over rows with a label, see ``losses.task_loss``.

    Sequence classification and multiple choice (logits [B, K], labels [B]), token classification ([B, T, K], [B, T]).
    """

    temperature: Scheduled
    alpha: Scheduled
    label_smoothing: float = 0.0
    columns = ("labels",)

    def check(self, student: Any, teacher: Teacher | None) -> None:
        _check_classes(student)
        self._need_teacher(teacher)
        if (model := model_of(teacher)) is not None:
            _check_classes(model)
            check_models(student, model, _CLASSES)

    def counts(self, batch: Batch) -> Tensor:
        return (need(batch, "labels") != IGNORED).sum().expand(len(self.names))

    def __call__(self, student: Any, teacher: Teacher | None, batch: Batch, progress: float) -> Step:
        output = head_output(student, batch)
        taught = None if is_zero(self.alpha) or teacher is None else teacher.answer(batch).logits().logits
        _, kl, ce = task_loss(
            output.logits,
            taught,
            need(batch, "labels"),
            at(self.temperature, progress),
            alpha=0.0,  # the weights come later
            num_items=1,
            label_smoothing=self.label_smoothing,
        )
        return Step(ce[None] if kl is None else torch.stack([kl, ce]), output)


@dataclass(frozen=True)
class MultiLabelObjective(_TaughtAndLabelled):
    """α · τ² KL(teacher ‖ student) + (1 − α) · BCE, means over all labels of all rows, which do not exclude each other.

    Of each label the KL is that of Bernoulli distributions, p = σ(logit / τ); BCE is that of transformers'
    problem_type multi_label_classification. Logits and labels [B, K], labels 0 or 1.
    """

    temperature: Scheduled
    alpha: Scheduled
    columns = ("labels",)

    def check(self, student: Any, teacher: Teacher | None) -> None:
        model = model_of(teacher)
        for name, either in (("student", student), ("teacher", model)):
            if either is not None and not is_multi_label(either):
                refuse(OP, name, "of problem_type multi_label_classification", either.config.problem_type)
        self._need_teacher(teacher)
        if model is not None:
            check_models(student, model, _CLASSES)

    def counts(self, batch: Batch) -> Tensor:
        labels = need(batch, "labels")
        return torch.full((len(self.names),), labels.numel(), device=labels.device)

    def __call__(self, student: Any, teacher: Teacher | None, batch: Batch, progress: float) -> Step:
        output = head_output(student, batch)
        logits, labels = full(output.logits), need(batch, "labels")  # [B, K]
        if labels.shape != logits.shape:
            refuse(OP, "labels", f"of shape {list(logits.shape)}, as the logits", list(labels.shape))
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        bce = loss(logits, labels.to(logits.dtype), reduction="sum")
        if is_zero(self.alpha) or teacher is None:
            return Step(bce[None], output)
        taught = full(teacher.answer(batch).logits().logits)
        kl = kl_div(_no_and_yes(logits), _no_and_yes(taught), at(self.temperature, progress), reduction="sum")
        return Step(torch.stack([kl, bce]), output)


def _no_and_yes(logits: Tensor) -> Tensor:
    """Logits [B·K, 2] whose softmax is 1 − σ and σ of the given ones."""
    return torch.stack([torch.zeros_like(logits), logits], dim=-1).flatten(0, -2)


@dataclass(frozen=True)
class RegressionObjective(_TaughtAndLabelled):
    """α · (student − teacher)² + (1 − α) · (student − label)², over all numbers that are predicted.

    Logits [B] or [B, K], labels of as many numbers.
    """

    alpha: Scheduled
    loss_names = ("teacher_mse", "label_mse")
    columns = ("labels",)

    def check(self, student: Any, teacher: Teacher | None) -> None:
        self._need_teacher(teacher)
        if (model := model_of(teacher)) is not None:
            if not is_regression(model):
                refuse(OP, "teacher", "a regression model like the student", "a classifier")
            check_models(student, model, _CLASSES[:2])

    def counts(self, batch: Batch) -> Tensor:
        labels = need(batch, "labels")
        return torch.full((len(self.names),), labels.numel(), device=labels.device)

    def __call__(self, student: Any, teacher: Teacher | None, batch: Batch, progress: float) -> Step:
        output = head_output(student, batch)
        predicted = full(output.logits.flatten())  # [B·K]
        targets = [need(batch, "labels")]
        if not is_zero(self.alpha) and teacher is not None:
            targets.insert(0, teacher.answer(batch).logits().logits)
        for target in targets:
            if target.numel() != predicted.numel():
                refuse(OP, "labels", f"{predicted.numel()} numbers, one for each that is predicted", target.numel())
        return Step(
            torch.stack([(predicted - y.flatten().to(predicted.dtype)).square().sum() for y in targets]), output
        )


@dataclass(frozen=True)
class QaObjective(_TaughtAndLabelled):
    """α · τ² KL(teacher ‖ student) + (1 − α) · CE for the start and the end of an answer, the mean of both.

    The softmax runs over the places where an answer may be, which the question and padding are not. They are those of
    ``answer_mask`` (bool [B, T]) or, without that column, of token type 1 but the last token, which is [SEP]; and the
    first token, [CLS], which stands for "no answer".

    A start or end outside of these places, such as one cut off, does not count for the CE.
    """

    temperature: Scheduled
    alpha: Scheduled
    columns = ("start_positions", "end_positions", "answer_mask", "token_type_ids", "attention_mask")

    def check(self, student: Any, teacher: Teacher | None) -> None:
        model = model_of(teacher)
        for either in (student, student if model is None else model):
            if not type(either).__name__.endswith("ForQuestionAnswering"):
                refuse(OP, "model and teacher", "for question answering", type(either).__name__, TypeError)
        self._need_teacher(teacher)
        if model is not None:
            check_models(student, model, VOCABULARY)

    def counts(self, batch: Batch) -> Tensor:
        allowed = answer_places(batch)
        ce = (_places(batch, allowed) != IGNORED).sum()
        return ce[None] if is_zero(self.alpha) else torch.stack([2 * allowed.any(dim=1).sum(), ce])

    def __call__(self, student: Any, teacher: Teacher | None, batch: Batch, progress: float) -> Step:
        output = head_output(student, batch)
        allowed = answer_places(batch)
        rows = _spans(output, allowed)  # [2B, T]
        ce = torch.nn.functional.cross_entropy(rows, _places(batch, allowed), ignore_index=IGNORED, reduction="sum")
        if is_zero(self.alpha) or teacher is None:
            return Step(ce[None], output)
        counted = allowed.any(dim=1).repeat(2)
        taught = _spans(teacher.answer(batch).logits(), allowed)
        kl = kl_div(rows, taught, at(self.temperature, progress), counted, "sum")
        return Step(torch.stack([kl, ce]), output)


def answer_places(batch: Batch) -> Tensor:
    """Where an answer may start and end, bool [B, T]."""
    real = tokens(batch)
    first = real & (real.cumsum(dim=1) == 1)
    if "answer_mask" in batch:
        return (batch["answer_mask"].bool() & real) | first
    if "token_type_ids" not in batch:
        raise ValueError(f"{OP}: a batch must hold answer_mask or token_type_ids, got {', '.join(batch)}")
    last = real & (real.cumsum(dim=1) == real.sum(dim=1, keepdim=True))
    return (batch["token_type_ids"].eq(1) & real & ~last) | first


def _spans(output: Any, allowed: Tensor) -> Tensor:
    """Logits of starts and ends [2B, T]; places where no answer may be are kept out of the softmax."""
    logits = torch.cat([full(output.start_logits), full(output.end_logits)])
    return logits.masked_fill(~allowed.repeat(2, 1), EXCLUDED)


def _places(batch: Batch, allowed: Tensor) -> Tensor:
    """The labels [2B] of ``_spans``."""
    places = torch.cat([need(batch, "start_positions"), need(batch, "end_positions")]).flatten()
    inside = places.clamp(0, allowed.shape[1] - 1)
    fits = (inside == places) & allowed.repeat(2, 1).gather(1, inside[:, None])[:, 0]
    return places.where(fits, IGNORED)


# What the objectives share -----------------------------------------------------------------------------------------


def need(batch: Batch, name: str) -> Tensor:
    if name not in batch:
        raise ValueError(f"{OP}: a batch must hold {name}, got {', '.join(batch) or 'nothing'}")
    return batch[name]


def tokens(batch: Batch) -> Tensor:
    """bool [B, T], True = no padding."""
    ids = need(batch, "input_ids")
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def is_regression(model: Any) -> bool:
    problem = model.config.problem_type
    return problem == "regression" or (problem is None and model.config.num_labels == 1)


def is_multi_label(model: Any) -> bool:
    return model.config.problem_type == "multi_label_classification"


def _check_classes(model: Any) -> None:
    name = type(model).__name__
    if model.base_model is model or name.endswith(("ForQuestionAnswering", "ForMaskedLM")):
        raise TypeError(f"{OP}: model and teacher must have logits [..., classes], got {name}")
    if model.config.num_labels < 2:
        raise ValueError(f"{OP}: {name} must have 2 classes or more, got {model.config.num_labels}")
    problem = model.config.problem_type
    if problem not in (None, "single_label_classification"):
        raise ValueError(f"{OP}: {name} must classify into one class each, got problem_type {problem}")


def _class_names(model: Any) -> list[str] | None:
    """Class names in the order of the logits; None if the model has none."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


# What must be the same of a teacher and its student.
_CLASSES: tuple[tuple[str, Any], ...] = (
    ("number of classes", lambda model: model.config.num_labels),
    ("vocabulary size", lambda model: len(model.get_input_embeddings().weight)),
    ("class names", _class_names),
)
VOCABULARY = _CLASSES[1:2]


def check_models(student: Any, teacher: Any, same: tuple[tuple[str, Any], ...]) -> None:
    if student is teacher:
        refuse(OP, "teacher", "another model than the student", "the same")
    for what, of in same:
        of_teacher, of_student = of(teacher), of(student)
        if of_teacher != of_student and None not in (of_teacher, of_student):
            raise ValueError(f"{OP}: teacher and student must have the same {what}, got {of_teacher} and {of_student}")
