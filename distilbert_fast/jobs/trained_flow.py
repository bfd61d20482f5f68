"""A flow that trains models, the teacher on labels and others by it, and saves, reads back and judges each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, set_seed

from distilbert_fast.distillation import trainer as trainers
from distilbert_fast.distillation.arguments import DistillationArguments
from distilbert_fast.jobs.flow import CHECKPOINTS, TEACHER, Flow, save
from distilbert_fast.jobs.settings import Training, leaves_head
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.modeling.training import for_training
from distilbert_fast.runs.processes import Processes


class TrainedFlow(Flow):
    """A `Flow` in one process or several.

    Args:
        command: what messages begin with.
        together: the processes.
        teaching: how the teacher is trained, if it has to be.
        train_body: as a whole; False: only its new head.
    """

    def __init__(self, command: str, together: Processes, teaching: Training, train_body: bool, *of_any: Any) -> None:
        super().__init__(*of_any)
        self.command, self.together, self.teaching, self.train_body = command, together, teaching, train_body

    def teach(self, path: Path) -> dict[str, Any]:
        training = self.teaching
        set_seed(training.seed)
        model, tokenizer, random = self.load(self.source, new_head=training.epochs != 0, **self.job.config)
        needed = self.job.teacher_epochs if random else 0.0
        epochs = needed if training.epochs is None else training.epochs
        made: dict[str, Any] = {"title": "teacher", "seconds": 0.0, "losses": []}
        if epochs or (random and training.max_steps):
            if not self.train_body:
                _freeze(model.base_model)
            what = "all of it" if self.train_body else "its head alone"
            self.say(f"      trained on labels, {what}; {len(random)} tensors of the head start at random")
            for_training(model)
            made |= self.fit(TEACHER, model, None, dataclasses.replace(training, epochs=epochs), self.job.untaught)
        return made | self.keep(path, model, tokenizer, None)

    def fit(
        self,
        name: str,
        model: Any,
        teacher: Any,
        training: Training,
        objective: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> dict[str, Any]:
        """Train a model on the job's rows, by a teacher or on labels alone; return what reports say of it."""
        rows = self.job.train_rows
        path = self.run.path / CHECKPOINTS / name
        settings = training.arguments(path, 0 if self.job.streaming else len(rows), self.together.count)
        settings["ddp_find_unused_parameters"] = leaves_head(self.job.kind, objective)
        arguments = DistillationArguments(objective=self.job.kind, **settings, **objective)
        own: dict[str, Any] = {"data_collator": self.job.collator, "callbacks": list(callbacks)}
        trainer = trainers.DistillationTrainer(model, teacher, arguments, rows, **own)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_ProgressBar())
        made = self.train(trainer)
        self.together.meet()  # all have read a checkpoint before the first may remove it
        parts, log = ("step", "loss", *trainer.objective.names), trainer.state.log_history
        return made | {
            "objective": dict(objective),
            "teacher_effect": {
                key.removeprefix("teacher_"): value
                for entry in log
                if "teacher_loss_change" in entry
                for key, value in entry.items()
                if key.startswith("teacher_")
            },
            "losses": [{key: entry[key] for key in parts if key in entry} for entry in log if "loss" in entry],
        }

    def keep(self, path: Path, model: Any, tokenizer: Any, teacher: Any) -> dict[str, Any]:
        """In the first process: save, read back and evaluate what was read, as it is and with int8 linear layers."""
        if not self.together.is_first:
            return {}
        model = self.read_back(path, model, tokenizer)
        row = self.size(model, path) | {"quality": self.job.evaluate(model, teacher)}
        return row | {"int8": self.job.evaluate(optimize(model, "int8"), teacher)}

    def read_back(self, path: Path, model: Any, tokenizer: Any) -> Any:
        """Save a model, and return what is read from there, which has the same tensors."""
        save(self.command, path, model, tokenizer)
        kept = model.state_dict()
        found, _, _ = self.load(path)
        lost = [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, kept[name])]
        if lost:
            where = f"{self.command}: {str(path)!r}"
            raise RuntimeError(f"{where}: tensors read back differ from those saved: {', '.join(lost)}")
        return found


def _freeze(body: Any) -> None:
    """No gradient and no dropout: a new head learns from the states that the body will have."""
    body.requires_grad_(False)
    for module in body.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


class _ProgressBar(ProgressCallback):
    """Trainer's bar, with the losses in it instead of on lines of their own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            shown = {key: f"{value:.3f}" for key, value in logs.items() if key in _SHOWN}
            self.training_bar.set_postfix(shown, refresh=False)


_SHOWN = {"loss", "kl", "ce", "mlm", "cos", "mse", "hidden", "relation", "teacher_mse", "label_mse"}
