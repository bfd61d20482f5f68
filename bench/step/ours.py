"""Our step, with the same losses, weights, clip and optimizer: the objective that DistillationTrainer trains for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.step.original import ADAMW, ALPHA_CE, ALPHA_COS, ALPHA_MLM, CLIP, TEMPERATURE
from distilbert_fast.distillation.objectives.mlm import MlmObjective


class Ours:
    """Args: student: of our classes. teacher: a Teacher of distilbert_fast.distillation. autocast: a dtype, or None."""

    def __init__(self, student: Any, teacher: Any, autocast: torch.dtype | None) -> None:
        self.student, self.teacher, self.autocast = student.train(), teacher, autocast
        self.objective = MlmObjective(TEMPERATURE, ALPHA_CE, ALPHA_MLM, ALPHA_COS, kd_positions="masked")
        teacher.check(self.objective)
        teacher.prepare(next(student.parameters()).device)
        self.optimizer = torch.optim.AdamW(student.parameters(), **ADAMW, fused=True)
        self.part: Callable[[str], None] = lambda name: None
        student.base_model.register_forward_hook(lambda *_: self.part("student forward"))

    def step(self, batch: dict[str, torch.Tensor], part: Callable[[str], None]) -> None:
        """``part(name)`` is called when a part has ended."""
        self.part = part
        kind = batch["input_ids"].device.type
        counts = self.objective.counts(batch)
        weights = torch.tensor(self.objective.weights(0.0))
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            sums, _ = self.objective(self.student, Timed(self.teacher, part), batch, 0.0)
            loss = (sums / counts.clamp(min=1) * weights.to(sums.device)).sum()
            part("losses")
        loss.backward()
        part("backward")
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        part("optimizer")


class Timed:
    """A teacher whose answers, when they are asked for, count as its part of the step."""

    def __init__(self, teacher: Any, part: Callable[[str], None]) -> None:
        self.teacher, self.part = teacher, part

    def answer(self, batch: Any, hidden_states: bool = False) -> Any:
        return TimedAnswer(self._timed(self.teacher.answer, batch, hidden_states), self._timed)

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.part("losses")
        result = call(*arguments)
        self.part("teacher")
        return result


class TimedAnswer:
    def __init__(self, answer: Any, timed: Callable[..., Any]) -> None:
        self.answer, self.timed = answer, timed

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        return self.timed(self.answer.hidden, rows)

    def soft_targets(self, rows: torch.Tensor) -> Any:
        return self.timed(self.answer.soft_targets, rows)
