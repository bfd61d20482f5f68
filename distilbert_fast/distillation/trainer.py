"""Distil a teacher into a student: a transformers Trainer for the losses of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from distilbert_fast.distillation.arguments import DistillationArguments, objective_of, objective_settings
from distilbert_fast.distillation.objectives.task import Objective, Step
from distilbert_fast.distillation.teachers.cache import CachedTeacher
from distilbert_fast.distillation.teachers.effect import teacher_effect
from distilbert_fast.distillation.teachers.model import ModelTeacher, Teacher, model_of
from distilbert_fast.ops._check import refuse
from distilbert_fast.runs.resumable_trainer import ResumableTrainer
from distilbert_fast.runs.training_state import random_state, set_random_state

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput

__all__ = ["DistillationArguments", "DistillationTrainer", "DivergedError"]

_AGAIN = "again"  # in a batch: all its rows are counted elsewhere


class DivergedError(ArithmeticError):
    """A loss or a weight is no longer finite. No checkpoint holds that state."""


class DistillationTrainer(ResumableTrainer):
    """Train ``model`` on the losses of an objective: on labels, and on the answers of ``teacher``.

    ``args.objective`` names the objective and what batches hold:

    - "task": sequence and token classification, multiple choice; labels are class ids [B] or [B, T] with -100 for
      none. Regression, if that is what both models are for; labels are numbers. See ``TaskObjective``.
    - "qa": extractive question answering; start_positions and end_positions [B]. See ``QaObjective``.
    - "mlm": masked language modelling, DistilBERT's triple loss and more; input_ids are corrupted, labels [B, T] hold
      what was masked. See ``MlmObjective``.

    A teacher that is a model is moved to the training device, kept in eval mode, and runs without gradients, in the
    precision of ``args.teacher_precision`` (see ``ModelTeacher``). One that was asked for by name is compared with the
    model's own forward before the first step, and what it changes is logged (see ``teacher_effect``). With
    ``args.teacher_cache`` none runs: its answers are read from the disk (see ``CachedTeacher``).

    Every loss is a sum over rows divided by the count of its own rows in the whole optimizer step, over all
    accumulated batches and processes: 1×64, 4×16 and 2 processes × 32 give the same gradient, of the same rows, in the
    last step of an epoch too. (Trainer alone does not: with a model that takes ``**kwargs`` and ignores
    ``num_items_in_batch``, as BERT's and DistilBERT's classifiers do, accumulation over 4 batches gives 4 times the
    gradient.)

    Logged beside ``loss``: every loss by its name, unweighted (kl with its τ²); evaluation returns them as
    ``eval_kl`` and so on, with ``eval_loss`` their weighted sum over the whole dataset. (Where several processes
    evaluate, the last batches are filled up with rows that were counted before; they count again.)

    Args:
        model: the student.
        teacher: its teacher, a transformers model or any other ``Teacher``; None where no loss needs one, which is
            plain training with the normalisation above. With a cache, None or the model that it must be of.
        args: the settings.
        train_dataset: rows with the columns of both models' inputs and labels; token_type_ids reach a teacher that
            has them even if the student has not. Its ``set_epoch``, if it has one, is called before each epoch.
        objective: instead of the one that ``args`` name.
        **kwargs: anything else that Trainer takes, by name: eval_dataset, processing_class, data_collator,
            compute_metrics, callbacks, optimizers …

    Raises:
        TypeError, ValueError: teacher and student do not fit each other or the objective, by name.
        DivergedError: in ``train``, a loss that is to be logged, or a weight that is to be saved, is not finite.
    """

    args: DistillationArguments

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | Teacher | None,
        args: DistillationArguments,
        train_dataset: Any = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArguments):
            refuse("DistillationTrainer", "args", "a DistillationArguments", type(args).__name__, TypeError)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("DistillationTrainer: compute_loss_func must be None, the loss is this trainer's own")
        if args.n_gpu > 1:
            refuse("DistillationTrainer", "args.n_gpu", "1", f"{args.n_gpu}: launch with torchrun, one process a GPU")
        if args.torch_compile:
            refuse("DistillationTrainer", "args.torch_compile", "off", "True: compile the models' layers")
        of = _teacher(teacher, args, train_dataset)
        self._given_objective = objective is not None
        self.objective: Objective = objective or objective_of(args, model, model_of(of))
        self.objective.check(model, of)
        if of is not None:
            of.check(self.objective)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # Trainer then leaves it to us to divide by the counts of a step
        self.model_accepts_loss_kwargs = True
        self.teacher = of
        if of is not None:
            of.prepare(self.args.device)
        self.add_callback(_AtBegin(self._begin))
        self._epoch_rows = 0
        self._train_parts = self._no_parts()
        self._eval_parts = self._no_parts()

    def _begin(self) -> None:
        self._train_parts = self._no_parts()  # without those of a larger batch that auto_find_batch_size gave up
        if self.state.global_step == 0:
            self._log_teacher_effect()
            if self.args.process_index:
                torch.manual_seed(self.args.seed + self.args.process_index)  # or all processes drop out the same units

    def _log_teacher_effect(self) -> None:
        """Log how the requested precision changes the teacher's answers and the loss, measured on the first rows."""
        teacher = self.teacher
        if not isinstance(teacher, ModelTeacher) or teacher.precision in ("auto", "model"):
            return
        state = random_state(self.args.device)
        rows: Any = self.train_dataset
        # not get_eval_dataloader, which keeps what it gives for every evaluation, where workers are persistent
        batch = next(iter(self.get_test_dataloader(rows)), None)
        set_random_state(state, self.args.device)
        if batch is None:
            return
        with self.accelerator.autocast():
            reference = ModelTeacher(teacher.model, "model")
            batches = [self._prepare_inputs(batch)]
            effect = teacher_effect(self.objective, self.model, teacher, reference, batches)
        self.log({f"teacher_{name}": value for name, value in effect.items()})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of an optimizer step, and the rows that each loss counts in it, [L]."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        batches[-1] = self._counted_once(batches[-1])
        counts = torch.stack([self.objective.counts(batch) * (_AGAIN not in batch) for batch in batches])
        counts = counts.sum(dim=0).to(device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def _counted_once(self, batch: Any) -> Any:
        """Without the rows from an epoch's beginning by which accelerate fills up the last batches of processes.

        A batch of nothing else keeps a row, for its process to take part with, and is marked.
        """
        size, processes = self.args.train_batch_size, self.args.world_size
        last = self._epoch_rows % (size * processes)  # rows of the last batches
        if last == 0 or processes == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return batch
        own = last - self.args.process_index * size
        return {name: x[: max(own, 1)] for name, x in batch.items()} | ({} if own > 0 else {_AGAIN: True})

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        self._epoch_rows = 0 if sampler is None or self.args.dataloader_drop_last else len(sampler)
        return sampler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Trainer's own count of labels, which is not used: ``get_batch_samples`` counts."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch; in training, its share of the loss of the optimizer step."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        weights = self.objective.weights(progress)
        counted = not inputs.pop(_AGAIN, False)

        def step(student: torch.nn.Module) -> Step:
            with self.accelerator.autocast():
                return self.objective(student, self.teacher, inputs, progress)

        sums, output = _as_forward_of(model, self.model, step)
        if model.training and isinstance(num_items_in_batch, torch.Tensor):
            losses = sums * counted / num_items_in_batch.clamp(min=1)
            # Without the counts of all processes, each has a mean of its own, and the mean of these is taken.
            together = self.args.average_tokens_across_devices
            processes = self.accelerator.num_processes
            self._train_parts[0] += losses.detach() / (1 if together else processes)
            self._train_parts[1] += self.accelerator.sync_gradients / processes
            # DDP takes the mean of the processes' gradients
            loss = _weighted(weights, losses) * (processes if together else 1)
        else:
            counts = self.objective.counts(inputs)
            loss = _weighted(weights, sums / counts.clamp(min=1))
            self._eval_parts += torch.stack([sums.detach(), counts.to(sums.dtype)])
        return (loss, {} if output is None else output) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As in Trainer; an objective whose logits are never stored has a loss only."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, None if isinstance(logits, tuple) and not logits else logits, labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; what reports the training loss reports its parts too, which must be finite."""
        if "loss" in logs:
            means = self._means(self._train_parts)
            if wrong := [f"{name} {mean}" for name, mean in means.items() if not math.isfinite(mean)]:
                self._diverged("losses", ", ".join(wrong))
            logs.update(means)
            self._train_parts = self._no_parts()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in ResumableTrainer, but only finite weights are saved: a run could not recover from others."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                self._diverged("weights", f"others in {name}")
        super()._save_checkpoint(model, trial)

    def _diverged(self, what: str, got: str) -> NoReturn:
        raise DivergedError(
            f"DistillationTrainer: {what} must be finite, got {got} by step {self.state.global_step}: a lower "
            "learning_rate or a longer warm-up may help"
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer; the metrics hold the parts of the loss if the dataset has labels."""
        self._eval_parts = self._no_parts()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        means = self._means(self._eval_parts)
        assert output.metrics is not None
        if means:
            weights = self.objective.weights(self.state.global_step / max(self.state.max_steps, 1))
            means["loss"] = sum(w * mean for w, mean in zip(weights, means.values(), strict=True))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def resume_settings(self) -> dict[str, Any]:
        """The settings that must be the same to resume a run, and the teacher's weights."""
        return (
            super().resume_settings()
            | {f"args.{name}": value for name, value in objective_settings(self.args).items()}
            | {
                "objective": repr(self.objective) if self._given_objective else None,
                "teacher": None if self.teacher is None else self.teacher.describe(),
            }
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher reads, such as token_type_ids, or only the losses."""
        super()._set_signature_columns_if_needed()
        of_teacher = () if self.teacher is None else self.teacher.columns
        self._signature_columns: Any = sorted({*self._signature_columns, *of_teacher, *self.objective.columns})

    def _no_parts(self) -> torch.Tensor:
        """[2, L]: sums of the losses, and what to divide them by; on the device, so that no step waits for them."""
        return torch.zeros(2, len(self.objective.names), device=self.args.device)

    def _means(self, parts: torch.Tensor) -> dict[str, float]:
        """The means by name; empty if no batch was counted."""
        sums, divisors = self.accelerator.reduce(parts, reduction="sum").tolist()
        if not any(divisors):
            return {}
        return {name: x / (n or 1) for name, x, n in zip(self.objective.names, sums, divisors, strict=True)}


class _AtBegin(TrainerCallback):
    """Runs a function before the first step of a run, and of a resumed run."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.call()


def _teacher(
    teacher: PreTrainedModel | Teacher | None, args: DistillationArguments, train_dataset: Any
) -> Teacher | None:
    """The teacher that the settings ask for."""
    if teacher is not None and not isinstance(teacher, PreTrainedModel):
        for name, default in (("teacher_precision", "auto"), ("teacher_cache", "")):
            if (given := getattr(args, name)) != default:
                raise ValueError(f"DistillationTrainer: args.{name} is for a teacher that is a model, got {given!r}")
        return teacher
    if args.teacher_cache:
        cache = CachedTeacher(args.teacher_cache, train_dataset, teacher)
        epochs = getattr(train_dataset, "cycle", None) or math.ceil(args.num_train_epochs)
        if args.max_steps <= 0 and epochs > cache.key["epochs"]:
            raise ValueError(
                f"DistillationTrainer: args.num_train_epochs must be at most {cache.key['epochs']}, the epochs of "
                f"the cache, or the cycle of train_dataset that many, got {epochs}"
            )
        return cache
    return None if teacher is None else ModelTeacher(teacher, args.teacher_precision)


def _weighted(weights: tuple[float, ...], losses: torch.Tensor) -> torch.Tensor:
    return (losses * losses.new_tensor(weights)).sum()


def _as_forward_of(wrapper: torch.nn.Module, module: Any, step: Callable[[Any], Step]) -> Step:
    """Call ``step(module)`` as if it were the forward of ``module``, through ``wrapper``, which may be a DDP of it.

    DDP has to see all that gradients flow through, and a loss from hidden states and vocabulary weights is more than a
    model's own forward returns.
    """
    replaced = module.__dict__.get("forward")  # accelerate puts one there for mixed precision

    def restore() -> None:
        if replaced is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = replaced

    def forward() -> Step:
        restore()
        return step(module)

    module.forward = forward
    try:
        return wrapper()
    finally:
        restore()
