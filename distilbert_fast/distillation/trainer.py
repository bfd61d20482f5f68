"""Distil a teacher's answers into a student: a transformers Trainer with the loss of ``losses.task_loss``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from distilbert_fast.distillation.checkpoint import ResumableTrainer, describe_model
from distilbert_fast.distillation.losses import IGNORED, task_loss

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments, and the two numbers of the loss α·τ²KL + (1 − α)·CE.

    Raises:
        ValueError: temperature or alpha out of range.
    """

    temperature: float = field(
        default=2.0,
        metadata={"help": "τ > 0: teacher and student logits are divided by it in the KL divergence."},
    )
    alpha: float = field(
        default=0.5, metadata={"help": "Weight of the KL divergence, 0 to 1; the hard labels have 1 - alpha."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"DistillationArguments: temperature must be finite and above 0, got {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"DistillationArguments: alpha must be 0 to 1, got {self.alpha}")


class DistillationTrainer(ResumableTrainer):
    """Trains ``model`` on labels and on the logits of ``teacher``, row by row that has a label.

    For models whose logits are [B, K] or [B, T, K] and whose labels are class ids [B] or [B, T] with -100 for
    none: sequence and token classification, multiple choice. The teacher is moved to the training device,
    kept in eval mode, and runs without gradients under the autocast of the student (bf16, fp16).

    Every loss is a sum over rows divided by the count of labelled rows of the whole optimizer step, over all
    accumulated batches and processes: 1×8, 2×4 and 4×2 give the same gradient. (Trainer alone does not: with
    a model that takes ``**kwargs`` and ignores ``num_items_in_batch``, as BERT's and DistilBERT's classifiers
    do, accumulation over 4 batches gives 4 times the gradient.)

    Logged beside ``loss``: ``kl`` (with its τ²) and ``ce``, unweighted; evaluation returns ``eval_kl`` and
    ``eval_ce`` likewise. (Where several processes evaluate, the last batches are filled up with rows that were
    counted before; they count again, as in Trainer's ``eval_loss``.)

    Args:
        model: the student.
        teacher: its teacher; None with alpha 0, which is plain fine-tuning with the normalisation above.
        args: the settings.
        train_dataset: rows with the columns of both models' inputs and ``labels``; token_type_ids reach a
            teacher that has them even if the student has not.
        **kwargs: anything else that Trainer takes, by name: eval_dataset, processing_class, data_collator,
            compute_metrics, callbacks, optimizers …

    Raises:
        TypeError, ValueError: teacher and student do not fit each other or this loss, by name.
    """

    args: DistillationArguments

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        args: DistillationArguments,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"DistillationTrainer: args must be a DistillationArguments, got {type(args).__name__}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("DistillationTrainer: compute_loss_func must be None, the loss is this trainer's own")
        if args.n_gpu > 1:
            raise ValueError(
                f"DistillationTrainer: args.n_gpu must be 1, got {args.n_gpu}: launch with torchrun, one process a GPU"
            )
        _check_classes(model)
        if teacher is not None:
            _check_pair(model, teacher)
        elif args.alpha > 0:
            raise ValueError(f"DistillationTrainer: teacher must be given for alpha above 0, got None for {args.alpha}")
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # makes Trainer count the labels of a step, and leave dividing by them to us
        self.model_accepts_loss_kwargs = True
        self.teacher = teacher
        if teacher is not None:
            torch.nn.Module.to(teacher, self.args.device).eval()
        self._student_inputs = _inputs_of(model)
        self._teacher_inputs: set[str] = set() if teacher is None else _inputs_of(teacher)
        self._train_parts = self._no_parts()
        self._eval_parts = self._no_parts()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch; in training, its share of the loss of the optimizer step."""
        if "labels" not in inputs:
            raise ValueError(f"DistillationTrainer: a batch must hold labels, got {', '.join(inputs) or 'nothing'}")
        labels = inputs["labels"]
        outputs = model(**_only(inputs, self._student_inputs))
        teacher_logits = None
        if self.teacher is not None and self.args.alpha > 0:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(**_only(inputs, self._teacher_inputs)).logits
        parts = task_loss(
            outputs.logits,
            teacher_logits,
            labels,
            self.args.temperature,
            self.args.alpha,
            num_items_in_batch if model.training else None,
            self.args.label_smoothing_factor,
        )
        loss = parts.loss
        kl = torch.zeros_like(parts.ce) if parts.kl is None else parts.kl
        both = torch.stack([kl, parts.ce]).detach()
        if model.training:
            self._train_parts[:2] += both
            self._train_parts[2] += self.accelerator.sync_gradients / self.accelerator.num_processes
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        else:
            rows = (labels != IGNORED).sum()
            self._eval_parts[:2] += both * rows
            self._eval_parts[2] += rows
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in ResumableTrainer."""
        self._train_parts = self._no_parts()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; what reports the training loss reports its parts too."""
        if "loss" in logs:
            logs.update(self._means(self._train_parts))
            self._train_parts = self._no_parts()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer; the metrics hold both parts of the loss if the dataset has labels."""
        self._eval_parts = self._no_parts()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        means = self._means(self._eval_parts)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def resume_settings(self) -> dict[str, Any]:
        """What must be the same to resume; the teacher's weights are part of it."""
        return super().resume_settings() | {
            "args.temperature": self.args.temperature,
            "args.alpha": self.args.alpha,
            "teacher": None if self.teacher is None else describe_model(self.teacher, weights=True),
        }

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher reads, such as token_type_ids."""
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = sorted({*self._signature_columns, *self._teacher_inputs})

    def _no_parts(self) -> torch.Tensor:
        """Sums of kl and ce, and what to divide them by; on the device, so that no step waits for them."""
        return torch.zeros(3, device=self.args.device)

    def _means(self, parts: torch.Tensor) -> dict[str, float]:
        kl, ce, weight = self.accelerator.reduce(parts, reduction="sum").tolist()
        if weight == 0:
            return {}
        means = {"kl": kl / weight, "ce": ce / weight}
        if self.teacher is None or self.args.alpha == 0:
            del means["kl"]
        return means


def _inputs_of(model: torch.nn.Module) -> set[str]:
    """Names that the model's forward spells out; what would vanish in its ``**kwargs`` is not among them."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"labels"}


def _only(inputs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: inputs[name] for name in names if name in inputs}


def _check_classes(model: Any) -> None:
    name = type(model).__name__
    if model.base_model is model or name.endswith("ForQuestionAnswering"):
        raise TypeError(f"DistillationTrainer: model and teacher must have logits [..., classes], got {name}")
    if model.config.num_labels < 2:
        raise ValueError(f"DistillationTrainer: {name} must have 2 classes or more, got {model.config.num_labels}")
    problem = model.config.problem_type
    if problem not in (None, "single_label_classification"):
        raise ValueError(f"DistillationTrainer: {name} must classify into one class each, got problem_type {problem}")


def _check_pair(student: Any, teacher: Any) -> None:
    _check_classes(teacher)
    if student is teacher:
        raise ValueError("DistillationTrainer: teacher must be another model than the student, got the same")
    for what, of_teacher, of_student in (
        ("number of classes", teacher.config.num_labels, student.config.num_labels),
        ("vocabulary size", *(len(model.get_input_embeddings().weight) for model in (teacher, student))),
        ("class names", *(_class_names(model) for model in (teacher, student))),
    ):
        if of_teacher != of_student and None not in (of_teacher, of_student):
            raise ValueError(
                f"DistillationTrainer: teacher and student must have the same {what}, got {of_teacher} and {of_student}"
            )


def _class_names(model: Any) -> list[str] | None:
    """Names in the order of the logits; None if nobody named them."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names
